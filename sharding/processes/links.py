"""Messages between two processes over a socket, with heartbeats that detect a lost peer."""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

SILENCE_SECONDS = 20.0
"""Time without a message after which a process counts as dead; every process sends one each `PING_SECONDS`."""

PING_SECONDS = 2.0

NOTE_SECONDS = 10.0
"""Time that a process waits for another one before it prints a note."""

_LENGTH = struct.Struct("!Q")
_CHUNK = 1 << 20


class Gone(Exception):
    """The connection to the peer is lost; the message gives the symptom."""


class Link:
    """JSON messages of any size over a connected socket. Any thread may send; only one may receive."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        connection.settimeout(SILENCE_SECONDS)
        with contextlib.suppress(OSError):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._sending = threading.Lock()

    def send(self, message: Any, timeout: float = SILENCE_SECONDS) -> None:
        """Send one message. Raises Gone, also if an earlier message blocks the link for longer than `timeout`."""
        payload = json.dumps(message, ensure_ascii=False).encode()
        if not self._sending.acquire(timeout=timeout):
            raise Gone("it does not accept messages")
        try:
            self._connection.sendall(_LENGTH.pack(len(payload)) + payload[:_CHUNK])
            for start in range(_CHUNK, len(payload), _CHUNK):
                self._connection.sendall(payload[start : start + _CHUNK])
        except TimeoutError:
            raise Gone(f"it accepted no message for {SILENCE_SECONDS:.0f} s") from None
        except OSError as error:
            raise Gone(f"the connection broke: {error.strerror or error}") from None
        finally:
            self._sending.release()

    def receive(self) -> Any:
        """The next message. Raises Gone, also after `SILENCE_SECONDS` of silence."""
        try:
            (length,) = _LENGTH.unpack(self._read(_LENGTH.size))
            return json.loads(self._read(length))
        except TimeoutError:
            raise Gone(f"no sign of life for {SILENCE_SECONDS:.0f} s") from None
        except OSError as error:
            raise Gone(f"the connection broke: {error.strerror or error}") from None
        except ValueError:
            raise Gone("it does not speak this protocol") from None

    def _read(self, size: int) -> bytes:
        parts = bytearray()
        while len(parts) < size:
            part = self._connection.recv(min(size - len(parts), _CHUNK))
            if not part:
                raise Gone("its connection closed")
            parts += part
        return bytes(parts)


def close(connection: socket.socket) -> None:
    """Close a connection; also ends the other threads' calls on it."""
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. An empty host means all interfaces, in IPv4 and, if available, IPv6. Raises OSError."""
    if not host and socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0] if host else socket.AF_INET
    return socket.create_server((host, port), family=family)


def connect(
    host: str, port: int, timeout: float, greet: Callable[[socket.socket], None] = lambda connection: None
) -> socket.socket:
    """Connect to a process, retrying until it listens and `greet` does not raise Gone.

    Each attempt resolves the host name again, because a cluster may register it only once the host is up. Raises
    OSError or Gone after `timeout` seconds, and at once what else `greet` raises.
    """
    started, noted = time.monotonic(), False
    while True:
        try:
            return _greeted(socket.create_connection((host, port), timeout=10), greet)
        except (OSError, Gone) as error:
            waited = time.monotonic() - started
            if waited > timeout:
                raise
            if waited > NOTE_SECONDS and not noted:
                noted = True
                why = getattr(error, "strerror", None) or error
                print(f"waiting up to {timeout:.0f} s for {host}:{port}: {why}", file=sys.stderr, flush=True)
            time.sleep(0.2)


def _greeted(connection: socket.socket, greet: Callable[[socket.socket], None]) -> socket.socket:
    try:
        greet(connection)
    except BaseException:
        close(connection)
        raise
    return connection


def forward(network: socket.socket, local: socket.socket) -> None:
    """Forward bytes in both directions, in background threads.

    The local connection stays open when the network side closes: jax aborts a process whose coordinator disconnects,
    while the thread that watches the processes reports a clearer error.
    """
    for connection in (network, local):
        connection.settimeout(None)
        with contextlib.suppress(OSError):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    threading.Thread(target=_pump, args=(network, local, False), daemon=True).start()
    threading.Thread(target=_pump, args=(local, network, True), daemon=True).start()


def _pump(source: socket.socket, target: socket.socket, close_target: bool) -> None:
    with contextlib.suppress(OSError):
        while part := source.recv(1 << 16):
            target.sendall(part)
    if close_target:
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_WR)
