"""A small HTTP/1.1 client over asyncio streams: its cost per streamed piece is a few microseconds.

It shares a machine with the server that it measures, so its own work must not show in the latencies. It has what a
load generator needs: persistent connections, TLS, and bodies that are chunked, sized, or ended by the connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Protocol
from urllib.parse import urlsplit

READ_BYTES = 1 << 16
MAX_HEAD_BYTES = 1 << 18


class HttpError(Exception):
    """A request without a complete response; the message is one line."""


@dataclass(frozen=True)
class Address:
    """A server's address; `path` is the prefix of all its paths, without a slash at its end."""

    tls: bool
    host: str
    port: int
    path: str

    @classmethod
    def parse(cls, url: str) -> Address:
        """Read http://HOST:PORT/PATH or https://...; raises ValueError."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise ValueError("expected http://HOST:PORT or https://HOST")
        if parts.username is not None or parts.port == 0:
            raise ValueError("expected a URL without a user, and a port from 1")
        if not parts.path.isascii() or any(character.isspace() for character in url):
            raise ValueError("expected a URL of ASCII characters without spaces")
        tls = parts.scheme == "https"
        return cls(tls, parts.hostname, parts.port or (443 if tls else 80), parts.path.rstrip("/"))

    @property
    def host_header(self) -> str:
        """The value of the Host header."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


class _Framing(Protocol):
    """Separates a body from its framing."""

    ended: bool

    def feed(self, data: bytes) -> bytes:
        """The part of the body that is complete with these bytes."""

    def closed(self) -> None:
        """The connection was closed. Raises HttpError if the body is not complete."""


class Chunked:
    """A body in chunks, each preceded by its size."""

    def __init__(self) -> None:
        self.ended, self._rest = False, b""

    def feed(self, data: bytes) -> bytes:
        """See _Framing."""
        data, pieces, at = self._rest + data, [], 0
        while (line_end := data.find(b"\r\n", at)) >= 0:
            try:
                size = int(data[at:line_end].partition(b";")[0], 16)
            except ValueError:
                raise HttpError(f"expected the size of a chunk, found {data[at:line_end]!r:.60}") from None
            start = line_end + 2
            if size == 0:
                # Trailers may follow; an empty line ends them.
                self.ended = data.startswith(b"\r\n", start) or data.find(b"\r\n\r\n", start) >= 0
                break
            if len(data) < start + size + 2:
                break
            pieces.append(data[start : start + size])
            at = start + size + 2
        self._rest = data[at:]
        return b"".join(pieces)

    def closed(self) -> None:
        """See _Framing."""
        raise HttpError("the connection was closed in the middle of the response")


class Sized:
    """A body with a Content-Length."""

    def __init__(self, size: int) -> None:
        self._left, self.ended = size, size == 0

    def feed(self, data: bytes) -> bytes:
        """See _Framing."""
        self._left -= len(data)
        self.ended = self._left <= 0
        return data

    def closed(self) -> None:
        """See _Framing."""
        raise HttpError("the connection was closed in the middle of the response")


class UntilClosed:
    """A body that ends with the connection."""

    ended = False

    def feed(self, data: bytes) -> bytes:
        """See _Framing."""
        return data

    def closed(self) -> None:
        """See _Framing."""
        self.ended = True


class Response:
    """A response whose body is read piece by piece."""

    def __init__(self, status: int, headers: Mapping[str, str], reader: asyncio.StreamReader) -> None:
        self.status, self._reader = status, reader
        self._framing = _framing(headers)
        self._persistent = "close" not in headers.get("connection", "").lower()

    @property
    def reusable(self) -> bool:
        """Whether the connection can take another request."""
        return self._persistent and self._framing.ended and not isinstance(self._framing, UntilClosed)

    async def read(self) -> bytes:
        """The next piece of the body as soon as it arrives; b"" at the end. Raises HttpError, OSError."""
        while not self._framing.ended:
            if not (data := await self._reader.read(READ_BYTES)):
                self._framing.closed()
            elif piece := self._framing.feed(data):
                return piece
        return b""

    async def read_all(self) -> bytes:
        """The rest of the body. Raises HttpError, OSError."""
        pieces = []
        while piece := await self.read():
            pieces.append(piece)
        return b"".join(pieces)


def _framing(headers: Mapping[str, str]) -> _Framing:
    if "chunked" in headers.get("transfer-encoding", "").lower():
        return Chunked()
    length = headers.get("content-length")
    if length is None:
        return UntilClosed()
    if not (length.isascii() and length.isdigit()):
        raise HttpError(f"Content-Length: expected an integer, found {length!r:.60}")
    return Sized(int(length))


async def _response(reader: asyncio.StreamReader) -> Response:
    """Read a response's status line and headers."""
    status = 100
    while 100 <= status < 200:
        first, *lines = (await reader.readuntil(b"\r\n\r\n"))[:-4].decode("latin-1").split("\r\n")
        version, _, rest = first.partition(" ")
        if not version.startswith("HTTP/1.") or not rest[:3].isdigit():
            raise HttpError(f"expected an HTTP/1.1 response, found {first!r:.60}")
        status = int(rest[:3])
    pairs = (line.partition(":") for line in lines)
    headers = {name.strip().lower(): value.strip() for name, _, value in pairs}
    if version == "HTTP/1.0":
        headers.setdefault("connection", "close")
    return Response(status, headers, reader)


_Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Client:
    """Sends requests to one server. Connections stay open and are used again.

    `headers` are sent with each request.
    """

    def __init__(self, address: Address, headers: Mapping[str, str]) -> None:
        self.address = address
        self._headers = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        self._tls = ssl.create_default_context() if address.tls else None
        self._idle: list[_Connection] = []
        self._resolved: str | None = None

    @contextlib.asynccontextmanager
    async def request(self, method: str, path: str, body: bytes = b"") -> AsyncIterator[Response]:
        """Send a request; yields its response once the headers have arrived. Raises HttpError."""
        length = f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n" if body else ""
        head = (
            f"{method} {self.address.path}{path} HTTP/1.1\r\nHost: {self.address.host_header}\r\n"
            f"Accept-Encoding: identity\r\n{self._headers}{length}\r\n"
        )
        response, connection = None, None
        try:
            connection = await self._connection()
            reader, writer = connection
            writer.write(head.encode("latin-1") + body)
            await writer.drain()
            response = await _response(reader)
            yield response
        except (OSError, EOFError, asyncio.LimitOverrunError) as error:
            raise HttpError(_reason(error)) from None
        finally:
            if connection is not None and response is not None and response.reusable:
                self._idle.append(connection)
            elif connection is not None:
                connection[1].close()

    async def _connection(self) -> _Connection:
        while self._idle:
            reader, writer = self._idle.pop()
            if not (reader.at_eof() or writer.is_closing()):
                return reader, writer
            writer.close()
        host, port, name = self.address.host, self.address.port, self.address.host if self._tls else None
        connection = await asyncio.open_connection(
            self._resolved or host, port, ssl=self._tls, server_hostname=name, limit=MAX_HEAD_BYTES
        )
        # A name is resolved once: resolving it for each request would be part of the latencies.
        self._resolved = self._resolved or connection[1].get_extra_info("peername")[0]
        return connection

    def close(self) -> None:
        """Close the idle connections."""
        while self._idle:
            self._idle.pop()[1].close()


def _reason(error: Exception) -> str:
    if isinstance(error, asyncio.IncompleteReadError):
        return "the connection was closed before the response"
    if isinstance(error, asyncio.LimitOverrunError):
        return f"the response's headers are longer than {MAX_HEAD_BYTES} bytes"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__
