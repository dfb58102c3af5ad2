"""Mutual authentication of two processes that share a secret, before either trusts or forwards anything.

    caller     hello: magic, protocol, kind of connection, whether it has a secret, its place, a nonce
    process 0  challenge: magic, protocol, verdict, a nonce
    caller     its proof
    process 0  verdict, its proof

All frames have fixed sizes, so neither side allocates memory at the other's request. A proof is
HMAC-SHA256(secret, role + hello + challenge): both nonces are in it, so an old proof is worthless, and so is the role,
so a proof cannot be sent back to the process that made it. Process 0 proves last: a stranger that connects to it gets
nothing that depends on the secret. Without a secret, which only a loopback address allows, the key is empty.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import hmac
import secrets
import socket
import struct
import time
from collections.abc import Callable, Iterator
from typing import NoReturn

from sharding.errors import ClusterError
from sharding.processes.links import Gone
from sharding.processes.secret import FLAG

PROTOCOL = 2
"""Version of the handshake and of the messages after it. Magic and version begin a hello in every version."""

HANDSHAKE_SECONDS = 10.0
"""Time limit of a handshake, from connecting to the last proof."""

_MAGIC = b"gptoss\r\n"
_PREFIX = struct.Struct("!8sB")
_PLACE = struct.Struct("!B?II32s")
_CHALLENGE = struct.Struct("!8sBB32s")
_VERDICT = struct.Struct("!B32s")
_NONE = bytes(32)
_CALLER, _LEADER = b"caller", b"leader"


class Kind(enum.IntEnum):
    """What a connection carries: messages between the processes, or jax's coordination service."""

    CONTROL = 0
    JAX = 1


class _Verdict(enum.IntEnum):
    OK = 0
    OTHER_PROTOCOL = 1
    SECRET_MISSING = 2
    SECRET_UNKNOWN = 3
    SECRET_DIFFERS = 4


@dataclasses.dataclass(frozen=True)
class Caller:
    """The process that connects to process 0, and what it connects for."""

    kind: Kind
    process: int
    num_processes: int


class Stranger(Gone):
    """The peer is not a process of this program."""


class _Frames:
    """Frames of known sizes over a connection, all within one time limit. Raises Gone."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._deadline = time.monotonic() + HANDSHAKE_SECONDS

    def read(self, size: int, start: bytes = b"") -> bytes:
        """The next `size` bytes; raises Stranger as soon as they do not begin with `start`."""
        frame = b""
        while len(frame) < size:
            with self._within_limit():
                part = self._connection.recv(size - len(frame))
            if not part:
                raise Gone("its connection closed")
            frame += part
            if frame[: len(start)] != start[: len(frame)]:
                raise Stranger("it does not speak this protocol")
        return frame

    def write(self, frame: bytes) -> None:
        """Send a frame."""
        with self._within_limit():
            self._connection.sendall(frame)

    @contextlib.contextmanager
    def _within_limit(self) -> Iterator[None]:
        try:
            if (left := self._deadline - time.monotonic()) <= 0:
                raise TimeoutError
            self._connection.settimeout(left)
            yield
        except TimeoutError:
            raise Gone(f"no handshake within {HANDSHAKE_SECONDS:.0f} s") from None
        except OSError as error:
            raise Gone(f"the connection broke: {error.strerror or error}") from None


def answer(connection: socket.socket, secret: bytes | None, proved: Callable[[], None] = lambda: None) -> Caller:
    """Authenticate the process that has connected to process 0, and prove process 0's identity to it.

    `proved` is called once the caller has proved that it knows the secret, before the caller is answered.
    Raises Gone for a connection that breaks or does not speak this protocol, for example a port scanner's, and
    ClusterError for a process with another secret or another version of this program.
    """
    frames = _Frames(connection)
    prefix = frames.read(_PREFIX.size, _MAGIC)
    where = _peer(connection)
    if prefix[len(_MAGIC)] != PROTOCOL:
        frames.write(_challenge(_Verdict.OTHER_PROTOCOL))
        raise ClusterError(f"the process at {where} runs another version of this program")
    place = frames.read(_PLACE.size)
    kind, has_secret, process, num_processes, _ = _PLACE.unpack(place)
    if kind not in set(Kind):
        raise Stranger("it does not speak this protocol")
    caller = Caller(Kind(kind), process, num_processes)
    verdict = _compare_presence(has_secret, secret)
    frames.write(challenge := _challenge(verdict))
    if verdict == _Verdict.SECRET_MISSING:
        raise ClusterError(f"{FLAG}: process {process} at {where} has no secret, but process 0 has one")
    if verdict == _Verdict.SECRET_UNKNOWN:
        raise ClusterError(f"{FLAG}: process {process} at {where} has a secret, but process 0 has none")
    transcript = prefix + place + challenge
    if not hmac.compare_digest(frames.read(len(_NONE)), _proof(secret, _CALLER, transcript)):
        frames.write(_VERDICT.pack(_Verdict.SECRET_DIFFERS, _NONE))
        raise ClusterError(f"{FLAG}: process {process} at {where} has another secret than process 0")
    proved()
    frames.write(_VERDICT.pack(_Verdict.OK, _proof(secret, _LEADER, transcript)))
    return caller


def call(connection: socket.socket, address: str, caller: Caller, secret: bytes | None) -> None:
    """Authenticate process 0, which listens at `address`, and prove the caller's identity to it.

    Raises Gone if the connection breaks, and ClusterError if process 0 has another secret or another version.
    """
    frames = _Frames(connection)
    hello = _PREFIX.pack(_MAGIC, PROTOCOL) + _PLACE.pack(
        caller.kind, secret is not None, caller.process, caller.num_processes, secrets.token_bytes(32)
    )
    frames.write(hello)
    try:
        challenge = frames.read(_CHALLENGE.size, _MAGIC)
    except Stranger:
        raise ClusterError(_other_program(address)) from None
    _, _, verdict, _ = _CHALLENGE.unpack(challenge)
    if verdict != _Verdict.OK:
        _refused(verdict, address)
    frames.write(_proof(secret, _CALLER, hello + challenge))
    verdict, proof = _VERDICT.unpack(frames.read(_VERDICT.size))
    if verdict != _Verdict.OK or not hmac.compare_digest(proof, _proof(secret, _LEADER, hello + challenge)):
        _refused(_Verdict.SECRET_DIFFERS, address)


def _challenge(verdict: _Verdict) -> bytes:
    return _CHALLENGE.pack(_MAGIC, PROTOCOL, verdict, secrets.token_bytes(32))


def _compare_presence(has_secret: bool, secret: bytes | None) -> _Verdict:
    if has_secret == (secret is not None):
        return _Verdict.OK
    return _Verdict.SECRET_UNKNOWN if has_secret else _Verdict.SECRET_MISSING


def _proof(secret: bytes | None, role: bytes, transcript: bytes) -> bytes:
    return hmac.digest(secret or b"", role + transcript, "sha256")


def _refused(verdict: int, address: str) -> NoReturn:
    reasons: dict[int, str] = {
        _Verdict.OTHER_PROTOCOL: f"process 0 at {address} runs another version of this program",
        _Verdict.SECRET_MISSING: f"{FLAG}: process 0 at {address} has a secret, but this process has none",
        _Verdict.SECRET_UNKNOWN: f"{FLAG}: process 0 at {address} has no secret, but this process has one",
        _Verdict.SECRET_DIFFERS: f"{FLAG}: process 0 at {address} has another secret than this process",
    }
    raise ClusterError(reasons.get(verdict, _other_program(address)))


def _other_program(address: str) -> str:
    return f"--coordinator-address: {address} does not speak this protocol"


def _peer(connection: socket.socket) -> str:
    try:
        return str(connection.getpeername()[0]).removeprefix("::ffff:")
    except OSError as error:
        raise Gone(f"the connection broke: {error.strerror}") from None
