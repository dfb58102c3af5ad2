"""Bounds what a client can make the server hold before its request reaches the application, and configures uvicorn."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import ssl
from pathlib import Path
from typing import Any, Literal

import httptools
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from gptoss_jax.errors import UsageError
from gptoss_jax.serving.api.encoding import encode
from gptoss_jax.serving.api.errors import RETRY_SECONDS, ApiError

LINGER_SECONDS = 1.0
"""Seconds for which input is discarded after a refusal, because a reset could reach the client before the answer."""

DISCARDED_BYTES = 8 * 2**20
"""Bytes that are discarded after a refusal, or of a body whose response was sent, before the connection is closed."""

CLOSE_SECONDS = 30.0
"""Seconds that a client may take to read the rest of a response once its idle connection is being closed."""

_UPGRADES = (b"upgrade", b"http2-settings")


@dataclasses.dataclass(frozen=True)
class HttpLimits:
    """What one connection may cost.

    Args:
      headers: header fields of a request, trailers included.
      header_bytes: bytes of their names and values.
      target_bytes: bytes of the request target.
      head_seconds: seconds in which a connection's first request, or what has begun of a later one, must have sent all
        of its header.
      body_seconds, body_rate: a body must arrive with `body_rate` bytes a second, in every `body_seconds` seconds.
      connections: open connections of the server.
      keep_alive_seconds: seconds after which an idle connection is closed; longer than those of common load balancers,
        which would otherwise send requests to connections that are being closed.
    """

    headers: int = 128
    header_bytes: int = 32 * 1024
    target_bytes: int = 8 * 1024
    head_seconds: float = 10.0
    body_seconds: float = 20.0
    body_rate: float = 500.0
    connections: int = 8192
    keep_alive_seconds: int = 75


class BoundedProtocol(HttpToolsProtocol):
    """uvicorn's HTTP/1.1 protocol within limits: refusals have OpenAI's error shape and end the connection.

    uvicorn and httptools bound neither the number nor the size of header fields, and wait without end for a header or
    a body.
    """

    limits = HttpLimits()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._refusal: ApiError | None = None
        self._in_head, self._in_body = True, False
        self._header_bytes = self._unreported = self._body_bytes = self._discarded = 0
        self._timer: asyncio.TimerHandle | None = None
        self._timed: Literal["head", "body"] | None = None
        self._cycles: list[RequestResponseCycle] = []

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """See asyncio.Protocol."""
        super().connection_made(transport)
        if len(self.connections) > self.limits.connections:
            headers = {"retry-after": str(RETRY_SECONDS)}
            self._refuse(ApiError(503, "too many connections", "server_error", code="overloaded", headers=headers))
        self._time()

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio.Protocol; all requests of the connection learn of it, pipelined ones included."""
        self._stop_timer()
        for cycle in self._cycles:
            cycle.disconnected = True
            cycle.message_event.set()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol."""
        self._unset_keepalive_if_required()
        if self._refusal is not None:
            self._discarded += len(data)
            if self._discarded > DISCARDED_BYTES:
                self.transport.abort()
            return
        # httptools holds a header field until it is complete, so bytes that lead to no call are counted, too.
        self._unreported += len(data)
        try:
            self._feed(data)
            if self._unreported > self.limits.header_bytes + self.limits.target_bytes:
                raise self._too_large()
        except (httptools.HttpParserError, ApiError):
            self._refuse(self._refusal or ApiError(400, "expected a request in HTTP/1.1"))
        self._time()

    def _feed(self, data: bytes) -> None:
        while data:
            try:
                return self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as upgrade:
                # The request is answered in HTTP/1.1. Some clients ask for HTTP/2 even with a body, which httptools
                # takes for the new protocol's, so the request is read again without its wish.
                data = self._without_upgrade() + data[upgrade.args[0] :]

    def _without_upgrade(self) -> bytes:
        """The header of the request, without its wish for another protocol."""
        lines = [b"%b %b HTTP/1.1" % (self.parser.get_method(), self.url)]
        for name, value in self.headers:
            if name == b"connection":
                tokens = [token.strip() for token in value.split(b",")]
                value = b", ".join(token for token in tokens if token.lower() not in _UPGRADES)
            if name not in _UPGRADES:
                lines.append(name + b": " + value)
        return b"\r\n".join([*lines, b"", b""])

    def on_message_begin(self) -> None:
        """See httptools."""
        super().on_message_begin()
        self._in_head, self._header_bytes = True, 0

    def on_url(self, url: bytes) -> None:
        """See httptools."""
        if len(self.url) + len(url) > self.limits.target_bytes:
            self._refusal = ApiError(
                414, f"expected a request target of at most {self.limits.target_bytes} bytes, found more"
            )
            raise self._refusal
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """See httptools."""
        self._header_bytes += len(name) + len(value)
        if len(self.headers) >= self.limits.headers or self._header_bytes > self.limits.header_bytes:
            raise self._too_large()
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """See httptools."""
        if self.parser.get_method() == b"CONNECT":
            self._refusal = ApiError(405, "the server is no proxy")
            raise self._refusal
        if self.parser.should_upgrade():
            return
        super().on_headers_complete()
        self._in_head, self._in_body = False, True
        self._body_bytes = self._discarded = self._unreported = 0
        self._cycles.append(self.cycle)

    def on_chunk_header(self) -> None:
        """See httptools."""
        self._unreported = 0

    def on_body(self, body: bytes) -> None:
        """See httptools."""
        self._unreported = 0
        self._body_bytes += len(body)
        if self.cycle.response_complete:
            self._discarded += len(body)
            if self._discarded > DISCARDED_BYTES:
                self._refusal = ApiError(413, "the body of an answered request is too long")
                raise self._refusal
        super().on_body(body)

    def on_message_complete(self) -> None:
        """See httptools."""
        if self.parser.should_upgrade():
            return
        self._in_body = False
        self._unreported = 0
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """See uvicorn."""
        self._cycles = [cycle for cycle in self._cycles if not cycle.response_complete]
        super().on_response_complete()

    def send_400_response(self, msg: str) -> None:
        """See uvicorn."""
        self._refuse(ApiError(400, msg))

    def timeout_keep_alive_handler(self) -> None:
        """See uvicorn; a client that does not read the rest of a response loses it after a while."""
        super().timeout_keep_alive_handler()
        self.loop.call_later(CLOSE_SECONDS, self.transport.abort)

    def _too_large(self) -> ApiError:
        self._refusal = ApiError(
            431,
            f"expected at most {self.limits.headers} header fields of at most {self.limits.header_bytes} bytes, "
            "found more",
        )
        return self._refusal

    def _time(self) -> None:
        """Start the timer of what is awaited: the rest of a header or of a body."""
        waiting: Literal["head", "body"] | None = None
        if self._refusal is None:
            waiting = "body" if self._in_body else "head" if self._in_head or self._unreported else None
        if waiting == self._timed:
            return
        self._stop_timer()
        self._timed = waiting
        if waiting == "head":
            self._timer = self.loop.call_later(self.limits.head_seconds, self._head_is_late)
        elif waiting == "body":
            self._timer = self.loop.call_later(self.limits.body_seconds, self._check_rate)

    def _stop_timer(self) -> None:
        if self._timer:
            self._timer.cancel()
        self._timer = self._timed = None

    def _head_is_late(self) -> None:
        self._refuse(ApiError(408, f"expected the request's header within {self.limits.head_seconds:g} seconds"))

    def _check_rate(self) -> None:
        enough = self._body_bytes >= self.limits.body_seconds * self.limits.body_rate
        if enough or self.flow.read_paused:
            self._body_bytes = 0
            self._timer = self.loop.call_later(self.limits.body_seconds, self._check_rate)
        else:
            self._refuse(ApiError(408, f"expected a body with at least {self.limits.body_rate:g} bytes a second"))

    def _refuse(self, error: ApiError) -> None:
        """Answer what is being received with an error, if no other answer could be mistaken for it, and close."""
        self._refusal, self._discarded = error, 0
        self._stop_timer()
        if self.transport.is_closing():
            return
        current = [self.cycle] if self._in_body else []
        clear = self._cycles == current and not (current and self.cycle.response_started)
        for cycle in self._cycles:
            cycle.disconnected = True
            cycle.message_event.set()
        # Reading goes on, without keeping anything, even if the application had paused it.
        self.flow.resume_reading()
        if clear:
            self._answer(error)
        self.loop.call_later(LINGER_SECONDS, self.transport.close)

    def _answer(self, error: ApiError) -> None:
        body = encode({"error": error.body})
        headers = {
            **error.headers,
            "content-type": "application/json",
            "content-length": str(len(body)),
            "connection": "close",
        }
        lines = [name + b": " + value + b"\r\n" for name, value in self.server_state.default_headers]
        lines += [f"{name}: {value}\r\n".encode() for name, value in headers.items()]
        self.transport.write(b"".join([STATUS_LINE[error.status], *lines, b"\r\n", body]))
        if self.transport.can_write_eof():
            self.transport.write_eof()


def bounded(limits: HttpLimits) -> type[BoundedProtocol]:
    """The protocol with these limits."""
    return type("BoundedProtocol", (BoundedProtocol,), {"limits": limits})


def server_config(
    app: ASGIApp,
    host: str = "127.0.0.1",
    port: int = 8000,
    *,
    uds: str | None = None,
    ssl_certfile: Path | None = None,
    ssl_keyfile: Path | None = None,
    access_log: bool = False,
    limits: HttpLimits | None = None,
    backlog: int = 2048,
    graceful_seconds: int | None = None,
) -> uvicorn.Config:
    """The configuration of the HTTP server of an application.

    Args:
      app: the application.
      host, port: the address that it listens on; port 0 takes a free one.
      uds: a Unix domain socket to listen on instead.
      ssl_certfile, ssl_keyfile: PEM files for TLS; the key may be in the certificate's file.
      access_log: whether to log each request.
      limits: what a connection may cost.
      backlog: connections that may wait to be accepted.
      graceful_seconds: seconds after which a shutdown cancels what is running; None waits without end.

    Raises UsageError for files that TLS cannot use.
    """
    limits = limits or HttpLimits()
    _check_tls(ssl_certfile, ssl_keyfile)
    config = uvicorn.Config(
        app,
        host,
        port,
        uds=uds,
        loop="uvloop",
        http=bounded(limits),
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=access_log,
        proxy_headers=False,
        server_header=False,
        backlog=backlog,
        timeout_keep_alive=limits.keep_alive_seconds,
        timeout_graceful_shutdown=graceful_seconds,
        ssl_certfile=ssl_certfile,
        ssl_keyfile=ssl_keyfile,
    )
    if access_log:
        _log_access()
    return config


def _log_access() -> None:
    logger = logging.getLogger("uvicorn.access")
    logger.setLevel(logging.INFO)
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        logger.addHandler(handler)


def _check_tls(certfile: Path | None, keyfile: Path | None) -> None:
    if certfile is None:
        if keyfile is not None:
            raise UsageError("expected --ssl-certfile with it", "--ssl-keyfile")
        return
    for flag, file in (("--ssl-certfile", certfile), ("--ssl-keyfile", keyfile)):
        try:
            if file is not None:
                file.open("rb").close()
        except OSError as error:
            raise UsageError(f"{file}: {error.strerror}", flag) from None
    try:
        # Without a password for it, OpenSSL would ask for that of an encrypted key at the terminal.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certfile, keyfile, password="")
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise UsageError(
            f"{certfile}: expected a certificate and its private key in PEM: {reason}", "--ssl-certfile"
        ) from None
