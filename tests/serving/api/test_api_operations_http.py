"""The HTTP protocol within limits: what floods, drips and nonsense cost, and how they are answered."""

from __future__ import annotations

import json
import os
import re
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from gptoss_jax.errors import UsageError
from gptoss_jax.serving.api.protocol import HttpLimits, server_config
from tests.serving.api.operations import GENERATE, app_of, running
from tests.serving.api.support import ScriptedOwner, server_over

LIMITS = HttpLimits(head_seconds=0.4, body_seconds=0.4, body_rate=1000, connections=20)


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with running(app_of(server_over(ScriptedOwner())), LIMITS) as found:
        yield found


def exchange(port: int, *parts: bytes, pause: float = 0.0) -> bytes:
    """Sends parts with pauses between them, and reads until the server closes; stops sending once it has answered."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        for i, part in enumerate(parts):
            try:
                if i:
                    time.sleep(pause)
                connection.sendall(part)
            except OSError:
                break
        found = b""
        try:
            while data := connection.recv(65536):
                found += data
        except ConnectionResetError:
            pass
        return found


def error_of(answer: bytes) -> tuple[int, dict[str, str]]:
    """The status and OpenAI's error object of an answer."""
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"\r\nconnection: close" in head.lower()
    assert b"\r\ncontent-type: application/json" in head.lower()
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return int(head.split()[1]), error


def get(path: str = "/v1/models", *headers: str) -> bytes:
    return "\r\n".join([f"GET {path} HTTP/1.1", "Host: localhost", *headers, "", ""]).encode()


CLOSE = "Connection: close"


def test_requests_within_the_limits_are_answered(port: int) -> None:
    wide = [f"X-{i}: {'v' * 200}" for i in range(120)]
    assert exchange(port, get("/v1/models", CLOSE, *wide)).startswith(b"HTTP/1.1 200 OK")
    # A header in small parts, and two requests in one.
    assert exchange(port, *[bytes([byte]) for byte in get("/v1/models", CLOSE)]).startswith(b"HTTP/1.1 200 OK")
    assert exchange(port, get() + get("/v1/models", CLOSE)).count(b"HTTP/1.1 200 OK") == 2


def test_too_many_headers_and_too_long_ones_are_refused(port: int) -> None:
    for head in (
        get("/", *[f"X-{i}: 1" for i in range(200)]),
        get("/", "X-Long: " + "v" * 40_000),
        get("/", *[f"X-{i}: {'v' * 400}" for i in range(100)]),
        get("/", "X" * 40_000 + ": v"),
    ):
        status, error = error_of(exchange(port, head))
        assert (status, error["type"]) == (431, "invalid_request_error")
    assert error_of(exchange(port, get("/" + "a" * 9000)))[0] == 414


def test_trailers_and_chunk_extensions_are_bounded(port: int) -> None:
    head = f"POST {GENERATE} HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    trailer = [b"X-Trailer: ", *[b"v" * 10_000] * 20]
    assert b"HTTP/1.1 431" in exchange(port, head, b"2\r\n{}\r\n0\r\n", *trailer, pause=0.01)
    assert b"HTTP/1.1 431" in exchange(port, head, b"2;", *[b"v" * 10_000] * 20, pause=0.01)


def test_what_is_not_http_is_refused(port: int) -> None:
    for data in (
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"NONSENSE\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET \xff HTTP/1.1\r\n\r\n",
    ):
        status, error = error_of(exchange(port, data))
        assert (status, error["message"]) == (400, "expected a request in HTTP/1.1")
    connect = b"CONNECT example.com:443 HTTP/1.1\r\nHost: example.com:443\r\n\r\n"
    assert error_of(exchange(port, connect))[0] == 405
    # A request that could be read as two by others.
    smuggled = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    assert b"HTTP/1.1 200" not in exchange(port, smuggled)


def test_headers_that_do_not_come_in_time_are_refused(port: int) -> None:
    began = time.monotonic()
    assert error_of(exchange(port))[0] == 408
    assert error_of(exchange(port, b"GET / HTTP/1.1\r\nX-Slow: ", *[b"v"] * 12, pause=0.05))[0] == 408
    assert time.monotonic() - began < 5
    # A connection that is kept alive, and then drips line ends.
    assert b"HTTP/1.1 408" in exchange(port, get(), *[b"\r\n"] * 12, pause=0.05)


def test_a_body_must_arrive_at_a_rate(port: int) -> None:
    head = f"POST {GENERATE} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n\r\n".encode()
    status, error = error_of(exchange(port, head, *[b" "] * 20, pause=0.05))
    assert status == 408
    assert "1000 bytes a second" in error["message"]
    # One that is slow but fast enough goes through.
    body = json.dumps({"prompt": "hi"}).encode().ljust(1500)
    head = f"POST {GENERATE} HTTP/1.1\r\nHost: a\r\n{CLOSE}\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    parts = [body[i : i + 150] for i in range(0, len(body), 150)]
    assert exchange(port, head, *parts, pause=0.1).startswith(b"HTTP/1.1 200 OK")


def test_a_stream_is_not_disturbed_by_what_its_client_sends_meanwhile() -> None:
    owner = ScriptedOwner("<|channel|>final<|message|>" + "word " * 60 + "<|return|>", 1, delay=0.02)
    body = b'{"prompt": "hi", "stream": true}'
    head = f"POST {GENERATE} HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with running(app_of(server_over(owner)), LIMITS) as port:
        # Nothing that follows a request may be answered within its stream.
        for more in (b"GET / HT", b"\x00\x01\x02", get("/", *[f"X-{i}: 1" for i in range(200)])):
            answer = exchange(port, head + body, more, pause=0.3)
            assert answer.count(b"HTTP/1.1") == 1
            assert b"data: " in answer
        deadline = time.monotonic() + 5
        while len(owner.aborted) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
    assert len(owner.aborted) == 3


def test_an_upgrade_to_http_2_is_answered_in_http_1(port: int) -> None:
    upgrade = ["Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABk"]
    answer = exchange(port, get("/v1/models", *upgrade), get("/v1/models", CLOSE), pause=0.1)
    assert answer.count(b"HTTP/1.1 200 OK") == 2
    # With a body, which is read, too.
    body = json.dumps({"prompt": "hi"}).encode()
    lines = [f"POST {GENERATE} HTTP/1.1", "Host: a", *upgrade, f"Content-Length: {len(body)}", "", ""]
    head = "\r\n".join(lines).encode()
    for parts in ([head, body, get("/v1/models", CLOSE)], [head + body + get("/v1/models", CLOSE)]):
        assert exchange(port, *parts, pause=0.1).count(b"HTTP/1.1 200 OK") == 2
    websocket = ["Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Key: x", "Sec-WebSocket-Version: 13"]
    assert (
        exchange(port, get("/v1/models", *websocket), get("/v1/models", CLOSE), pause=0.1).count(b" 200 OK") == 2
    )


def test_connections_are_bounded(port: int) -> None:
    opened = [socket.create_connection(("127.0.0.1", port)) for _ in range(20)]
    time.sleep(0.1)
    answer = exchange(port, b"")
    status, error = error_of(answer)
    assert (status, error["code"]) == (503, "overloaded")
    assert b"\r\nretry-after: " in answer.lower()
    for connection in opened:
        connection.close()
    time.sleep(0.1)
    assert exchange(port, get("/v1/models", CLOSE)).startswith(b"HTTP/1.1 200 OK")


def test_a_body_of_1_gb_is_cut(port: int) -> None:
    """With and without its length; the connection is closed after the answer, instead of reading on."""
    length = 10**9
    head = f"POST {GENERATE} HTTP/1.1\r\nHost: localhost\r\n".encode()
    block = b"\r\n".join([b"100000", b" " * 2**20, b""])
    for framing, part in ((f"Content-Length: {length}", b" " * 2**20), ("Transfer-Encoding: chunked", block)):
        sent, answers = 0, list[bytes]()
        with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
            connection.sendall(head + framing.encode() + b"\r\n\r\n")
            reader = threading.Thread(target=lambda c=connection, to=answers: to.append(c.recv(65536)))
            reader.start()
            try:
                while sent < length:
                    connection.sendall(part)
                    sent += len(part)
            except OSError:
                pass
            reader.join(5)
        [answer] = answers
        assert answer.startswith(b"HTTP/1.1 413 ")
        assert "at most" in json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["message"]
        assert sent < length


MEASURE = """
import sys, threading
from tests.serving.api.operations import app_of, running
from tests.serving.api.support import ScriptedOwner, server_over
with running(app_of(server_over(ScriptedOwner()))) as port:
    print(port, flush=True)
    sys.stdin.readline()
"""


def test_60_mb_of_headers_do_not_grow_the_memory() -> None:
    """uvicorn with httptools alone grows by about 70 MB (CVE-2025-48956 of servers without this limit)."""
    command = [sys.executable, "-c", MEASURE]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin
        assert process.stdout
        port = int(process.stdout.readline())
        assert exchange(port, get("/v1/models", CLOSE)).startswith(b"HTTP/1.1 200")
        before = memory(process.pid)
        for start, part in (
            (b"X-Long: ", b"v" * 60_000),
            (b"", b"".join(b"X-%d: v\r\n" % i for i in range(6000))),
        ):
            answer = exchange(port, b"GET / HTTP/1.1\r\nHost: a\r\n" + start, *[part] * 1000)
            assert answer.startswith(b"HTTP/1.1 431 "), answer[:100]
        grown = memory(process.pid) - before
        assert exchange(port, get("/v1/models", CLOSE)).startswith(b"HTTP/1.1 200")
        process.stdin.write("\n")
        process.stdin.flush()
    assert process.returncode == 0
    assert grown < 8_000_000


def memory(pid: int) -> int:
    """The peak of a process's memory, in bytes."""
    match = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert match
    return int(match[1]) * 1024


def certificate(folder: Path, password: str = "") -> tuple[Path, Path]:
    """A certificate of localhost and its private key."""
    key, cert = folder / f"key{password}.pem", folder / f"cert{password}.pem"
    protect = ["-passout", f"pass:{password}"] if password else ["-noenc"]
    name = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-days", "2", "-keyout", key, "-out", cert]
    subprocess.run([*command, *protect, *name], check=True, capture_output=True)
    return cert, key


@pytest.mark.skipif(
    not any(os.access(f"{p}/openssl", os.X_OK) for p in os.get_exec_path()), reason="needs openssl"
)
def test_tls(tmp_path: Path) -> None:
    cert, key = certificate(tmp_path)
    app = app_of(server_over(ScriptedOwner()))
    with running(app, LIMITS, ssl_certfile=cert, ssl_keyfile=key) as port:
        trusting = ssl.create_default_context(cafile=str(cert))
        url = f"https://localhost:{port}"
        assert httpx.get(f"{url}/v1/models", verify=trusting).status_code == 200
        answer = httpx.get(f"{url}/v1/models", headers={"x-long": "v" * 40_000}, verify=trusting)
        assert answer.status_code == 431
    locked, locked_key = certificate(tmp_path, "secret")
    other = tmp_path / "other.pem"
    other.write_text("nonsense")
    for files, flag in (
        ((None, key), "--ssl-keyfile"),
        ((tmp_path / "none.pem", key), "--ssl-certfile"),
        ((cert, tmp_path / "none.pem"), "--ssl-keyfile"),
        ((other, key), "--ssl-certfile"),
        ((locked, locked_key), "--ssl-certfile"),
        ((cert, locked_key), "--ssl-certfile"),
    ):
        with pytest.raises(UsageError) as caught:
            server_config(app, ssl_certfile=files[0], ssl_keyfile=files[1])
        assert caught.value.field == flag
        assert "\n" not in str(caught.value)
