"""The handshake of two processes, against an implementation from its description, and attempts to get around it."""

import contextlib
import hashlib
import hmac
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sharding import ClusterError
from sharding.processes import current, handshake, leader, start
from sharding.processes.handshake import Caller, Kind, answer, call
from sharding.processes.leader import Leader
from sharding.processes.links import Gone, connect, listen
from sharding.processes.membership import Membership, membership
from sharding.processes.reception import Reception
from sharding.processes.secret import VARIABLE, cluster_secret

SECRET, OTHER = b"the secret of the cluster", b"the secret of another one"
CALLER = Caller(Kind.CONTROL, 3, 8)
HELLO, CHALLENGE, PROOF = 51, 42, 32
"""Sizes of the frames in bytes."""


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """A connection's two ends: that of process 0, and the caller's."""
    with listen("127.0.0.1", 0) as server:
        caller = socket.create_connection(server.getsockname(), timeout=5)
        accepted, _ = server.accept()
        with accepted, caller:
            yield accepted, caller


def outcome(function: Callable[..., object], *arguments: object) -> object:
    """What a function returns or raises; closes the connection after an error, as its users do."""
    try:
        return function(*arguments)
    except (ClusterError, Gone) as error:
        arguments[0].close()  # type: ignore[attr-defined]
        return error


def both(pair: tuple[socket.socket, socket.socket], first: bytes | None, second: bytes | None) -> list[object]:
    """The outcomes of process 0 and of the caller."""
    with ThreadPoolExecutor() as pool:
        answered = pool.submit(outcome, answer, pair[0], first)
        called = pool.submit(outcome, call, pair[1], "gpu1:8476", CALLER, second)
        return [answered.result(10), called.result(10)]


def hello(nonce: bytes, kind: int = 0, protocol: int = 2, has_secret: int = 1) -> bytes:
    place = bytes([kind, has_secret]) + (3).to_bytes(4, "big") + (8).to_bytes(4, "big")
    return b"gptoss\r\n" + bytes([protocol]) + place + nonce


def prove(role: bytes, hello: bytes, challenge: bytes, secret: bytes = SECRET) -> bytes:
    return hmac.new(secret, role + hello + challenge, hashlib.sha256).digest()


def read(connection: socket.socket, size: int) -> bytes:
    return connection.recv(size, socket.MSG_WAITALL)


@contextlib.contextmanager
def answering(connection: socket.socket) -> Iterator[Callable[[], object]]:
    """Process 0 in a thread; yields a function that waits for its outcome."""
    with ThreadPoolExecutor() as pool:
        result = pool.submit(outcome, answer, connection, SECRET)
        yield lambda: result.result(10)


@pytest.mark.parametrize("secret", [SECRET, None])
def test_the_same_secret_connects(pair: tuple[socket.socket, socket.socket], secret: bytes | None) -> None:
    assert both(pair, secret, secret) == [CALLER, None]
    pair[1].sendall(b"more")
    assert read(pair[0], 4) == b"more"


@pytest.mark.parametrize(
    ("first", "second", "at_0", "at_3"),
    [
        (SECRET, OTHER, "has another secret than process 0", "has another secret than this process"),
        (SECRET, None, "has no secret, but process 0 has one", "has a secret, but this process has none"),
        (None, SECRET, "has a secret, but process 0 has none", "has no secret, but this process has one"),
    ],
)
def test_another_secret_is_refused_on_both_sides(
    pair: tuple[socket.socket, socket.socket], first: bytes | None, second: bytes | None, at_0: str, at_3: str
) -> None:
    errors = both(pair, first, second)
    assert all(type(error) is ClusterError for error in errors)
    assert str(errors[0]) == f"--cluster-secret-file: process 3 at 127.0.0.1 {at_0}"
    assert str(errors[1]) == f"--cluster-secret-file: process 0 at gpu1:8476 {at_3}"


def test_process_0_follows_the_description(pair: tuple[socket.socket, socket.socket]) -> None:
    ours = hello(b"n" * 32, kind=1)
    with answering(pair[0]) as result:
        pair[1].sendall(ours)
        challenge = read(pair[1], CHALLENGE)
        assert challenge[:10] == b"gptoss\r\n\x02\x00"
        pair[1].sendall(prove(b"caller", ours, challenge))
        assert read(pair[1], 1 + PROOF) == b"\0" + prove(b"leader", ours, challenge)
        assert result() == Caller(Kind.JAX, 3, 8)


def test_process_0_reveals_nothing_before_the_caller_has_proved(pair: tuple[socket.socket, socket.socket]) -> None:
    with answering(pair[0]):
        pair[1].sendall(hello(b"n" * 32))
        read(pair[1], CHALLENGE)
        pair[1].sendall(bytes(PROOF))
        assert read(pair[1], 1000) == b"\4" + bytes(PROOF)


def test_callers_refuse_a_process_0_that_returns_their_own_proof(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    with ThreadPoolExecutor() as pool:
        called = pool.submit(outcome, call, pair[1], "gpu1:8476", CALLER, SECRET)
        theirs = read(pair[0], HELLO)
        pair[0].sendall(challenge := b"gptoss\r\n\x02\x00" + b"n" * 32)
        proof = read(pair[0], PROOF)
        assert proof == prove(b"caller", theirs, challenge)
        pair[0].sendall(b"\0" + proof)
        assert "has another secret" in str(called.result(10))


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("role", [b"caller", b"leader"])
def test_old_proofs_and_those_of_process_0_are_refused(
    pair: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch, fresh: bool, role: bytes
) -> None:
    """Only the caller's own proof for the same two nonces would be accepted."""
    ours, old = hello(b"n" * 32), b"gptoss\r\n\x02\x00" + b"o" * 32
    if not fresh:
        monkeypatch.setattr(handshake.secrets, "token_bytes", lambda size: b"o" * size)
    with answering(pair[0]) as result:
        pair[1].sendall(ours + prove(role, ours, old))
        challenge = read(pair[1], CHALLENGE)
        assert (challenge == old) is not fresh
        if not fresh and role == b"caller":
            assert result() == CALLER
        else:
            assert "has another secret" in str(result())


def test_the_kind_of_a_connection_cannot_be_changed_on_the_way(pair: tuple[socket.socket, socket.socket]) -> None:
    sent, changed = hello(b"n" * 32, kind=0), hello(b"n" * 32, kind=1)
    with answering(pair[0]) as result:
        pair[1].sendall(changed)
        pair[1].sendall(prove(b"caller", sent, read(pair[1], CHALLENGE)))
        assert "has another secret" in str(result())


def test_other_versions_are_named(
    pair: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    with answering(pair[0]) as result:
        pair[1].sendall(hello(b"n" * 32, protocol=3))
        assert read(pair[1], CHALLENGE)[:10] == b"gptoss\r\n\x02\x01"
        assert str(result()) == "the process at 127.0.0.1 runs another version of this program"


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (b"gptoss\r\n\x03\x01" + bytes(32), "process 0 at gpu1:8476 runs another version of this program"),
        (b"HTTP/1.1 400 Bad Request\r\n", "--coordinator-address: gpu1:8476 does not speak this protocol"),
        (b"gptoss\r\n\x02\x63" + bytes(32), "--coordinator-address: gpu1:8476 does not speak this protocol"),
    ],
)
def test_callers_name_what_answers_instead(
    pair: tuple[socket.socket, socket.socket], reply: bytes, expected: str
) -> None:
    pair[0].sendall(reply)
    assert str(outcome(call, pair[1], "gpu1:8476", CALLER, SECRET)) == expected


@pytest.mark.parametrize(
    "sent", [b"GET / HTTP/1.1\r\n\r\n", b"\0\0\0\0\0\0\0\2{}", b"gptoss\r\n\x02\x09" + bytes(41), b"x"]
)
def test_garbage_is_closed_at_once_without_an_answer(
    pair: tuple[socket.socket, socket.socket], sent: bytes
) -> None:
    with answering(pair[0]) as result:
        pair[1].sendall(sent)
        assert type(result()) is handshake.Stranger
        with contextlib.suppress(ConnectionResetError):
            assert pair[1].recv(1) == b""


def test_slow_strangers_have_one_time_limit(
    pair: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handshake, "HANDSHAKE_SECONDS", 0.5)
    started = time.monotonic()
    with answering(pair[0]) as result, contextlib.suppress(OSError):
        for byte in hello(b"n" * 32):
            pair[1].sendall(bytes([byte]))
            time.sleep(0.05)
    assert isinstance(result(), Gone)
    assert 0.4 < time.monotonic() - started < 2


class Open:
    """A reception at a free port, with the connections that it admits and the lines of those that it refuses."""

    def __init__(self, limit: int) -> None:
        self.server = listen("localhost", 0)
        self.host, self.port = self.server.getsockname()[:2]
        self.admitted: list[Caller] = []
        self.refused: list[str] = []
        reception = Reception(self.server, SECRET, limit, self._admit, self.refused.append)
        threading.Thread(target=reception.accept, daemon=True).start()

    def _admit(self, connection: socket.socket, caller: Caller) -> None:
        connection.sendall(b"welcome")
        self.admitted.append(caller)
        connection.close()

    def call(self, secret: bytes, timeout: float = 5) -> bytes:
        with connect(self.host, self.port, timeout, lambda c: call(c, "here:1", CALLER, secret)) as connection:
            return read(connection, 7)


@pytest.fixture
def opened() -> Iterator[Open]:
    here = Open(limit=4)
    yield here
    with contextlib.suppress(OSError):
        here.server.shutdown(socket.SHUT_RDWR)
    here.server.close()


def test_idle_strangers_neither_use_up_threads_nor_keep_processes_out(opened: Open) -> None:
    before = threading.active_count()
    with contextlib.ExitStack() as strangers:
        for i in range(40):
            stranger = strangers.enter_context(socket.create_connection((opened.host, opened.port)))
            with contextlib.suppress(OSError):
                stranger.sendall(hello(b"n" * 32)[: i % 20])
        started = time.monotonic()
        assert opened.call(SECRET) == b"welcome"
        assert time.monotonic() - started < 3
        assert threading.active_count() <= before + 4
    assert opened.admitted == [CALLER]
    assert opened.refused == []


def test_a_wrong_secret_is_reported_and_admits_nobody(opened: Open) -> None:
    with pytest.raises(ClusterError, match="has another secret"):
        opened.call(OTHER)
    assert opened.call(SECRET) == b"welcome"
    assert opened.admitted == [CALLER]
    assert opened.refused == [
        "--cluster-secret-file: process 3 at 127.0.0.1 has another secret than process 0"
    ] or opened.refused == ["--cluster-secret-file: process 3 at ::1 has another secret than process 0"]


def test_many_processes_connect_at_a_time(opened: Open) -> None:
    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(lambda _: opened.call(SECRET, 20), range(32))) == [b"welcome"] * 32


def test_secrets_are_read_from_files_and_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert cluster_secret(None) is None
    monkeypatch.setenv(VARIABLE, "0123456789abcdef")
    assert cluster_secret(None) == b"0123456789abcdef"
    file = tmp_path / "secret"
    file.write_bytes(b"fedcba9876543210\n")
    for mode in (0o600, 0o400):
        file.chmod(mode)
        assert cluster_secret(file) == b"fedcba9876543210"


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o644, 0o666, 0o601])
def test_secret_files_that_others_can_access_are_refused(tmp_path: Path, mode: int) -> None:
    file = tmp_path / "secret"
    file.write_bytes(SECRET)
    file.chmod(mode)
    with pytest.raises(
        ClusterError, match=rf"^--cluster-secret-file: {file}: expected .* found mode {mode:04o}; .*$"
    ):
        cluster_secret(file)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "expected a secret of at least 16 bytes, found 0"),
        (b"too short a one\n", "expected a secret of at least 16 bytes, found 15"),
        (b" " * 40, "expected a secret of at least 16 bytes, found 0"),
        (b"x" * 4097, "expected a secret of at most 4096 bytes, found more"),
    ],
)
def test_secrets_of_other_lengths_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, expected: str
) -> None:
    file = tmp_path / "secret"
    file.write_bytes(content)
    file.chmod(0o600)
    monkeypatch.setenv(VARIABLE, content.decode())
    for source, name in ((file, f"--cluster-secret-file: {file}"), (None, VARIABLE)):
        with pytest.raises(ClusterError) as caught:
            cluster_secret(source)
        assert str(caught.value) == f"{name}: {expected}"


def test_secret_files_that_cannot_be_read(tmp_path: Path) -> None:
    for path, reason in ((tmp_path / "none", "No such file or directory"), (tmp_path, "Is a directory")):
        with pytest.raises(ClusterError) as caught:
            cluster_secret(path)
        assert str(caught.value) == f"--cluster-secret-file: {path}: {reason}"


@pytest.mark.parametrize(
    "host", ["gpu1", "10.0.0.1", "0.0.0.0", "[::]", "[2001:db8::1]", "localhost.example", "128.0.0.1"]
)
def test_other_addresses_need_a_secret(host: str) -> None:
    for process in (0, 1):
        member = membership(f"{host}:8476", 2, process)
        assert member is not None
        with pytest.raises(
            ClusterError, match=r"^--cluster-secret-file: expected a secret .*umask 077.*CLUSTER_SECRET$"
        ):
            start(member, 1)
    assert current() is None


@pytest.mark.parametrize(
    ("host", "interface"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("127.1.2.3", "127.1.2.3"),
        ("localhost", "localhost"),
        ("[::1]", "::1"),
        ("gpu1", ""),
    ],
)
def test_process_0_listens_at_a_loopback_address_alone(
    host: str, interface: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def refuse(host: str, port: int) -> socket.socket:
        asked.append(host)
        raise OSError(98, "in use")

    monkeypatch.setattr(leader, "listen", refuse)
    with pytest.raises(ClusterError, match="cannot listen"):
        Leader(Membership(f"{host}:8476", 2, 0), SECRET).rendezvous(1)
    assert asked == [interface]


def test_secrets_are_not_among_the_compared_flags() -> None:
    from gptoss_jax.commands.agreement import ENVIRONMENT, flags_of
    from gptoss_jax.generate import flags

    options = flags().parse_args(["--cluster-secret-file", "somewhere"])
    assert "somewhere" not in str(flags_of("generate", options))
    assert VARIABLE not in ENVIRONMENT
