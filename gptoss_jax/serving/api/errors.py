"""Errors over HTTP, in OpenAI's shape."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.responses import Response

from gptoss_jax.errors import DeadlineError, EngineError, OverloadedError, UsageError
from gptoss_jax.serving.api.encoding import JsonResponse

RETRY_SECONDS = 2
"""Seconds after which a client that was refused for load should try again."""

_logger = logging.getLogger(__name__)


class ApiError(Exception):
    """A request that cannot be answered.

    Args:
      status: the HTTP status.
      message: one line.
      kind: OpenAI's `type` of the error.
      param: the field of the request that it concerns.
      code: OpenAI's `code`, such as "context_length_exceeded".
      headers: further headers of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.kind, self.param, self.code = status, message, kind, param, code
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """The error object, as it stands under "error"."""
        return {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}

    def response(self) -> Response:
        """The error as a response."""
        return JsonResponse({"error": self.body}, self.status, self.headers)


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A request with status 400."""
    return ApiError(400, message, param=param, code=code)


def not_found(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A request with status 404."""
    return ApiError(404, message, param=param, code=code)


def as_api_error(error: Exception) -> ApiError:
    """The error that a client sees for any exception; unexpected ones are logged and keep their text to the log."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, UsageError):
        return _usage_error(error)
    if isinstance(error, RecursionError):
        return bad_request("nested too deeply")
    if isinstance(error, OverloadedError):
        return ApiError(
            503, str(error), "server_error", code="overloaded", headers={"retry-after": str(RETRY_SECONDS)}
        )
    if isinstance(error, DeadlineError):
        return ApiError(504, str(error), "server_error", code="timeout", headers={"x-should-retry": "false"})
    if isinstance(error, EngineError):
        return ApiError(503, str(error), "server_error", code="engine_error")
    if isinstance(error, ClientDisconnect):
        return ApiError(499, "the client closed the connection before it had sent the body")
    _logger.error("a request failed", exc_info=error)
    return ApiError(500, "internal error; the server's log has the details", "server_error")


def _usage_error(error: UsageError) -> ApiError:
    too_long = "exceed" in error.message and error.field in ("prompt", "max_tokens")
    code = "context_length_exceeded" if too_long else None
    return bad_request(f"{error.field}: {error.message}" if error.field else error.message, error.field, code)
