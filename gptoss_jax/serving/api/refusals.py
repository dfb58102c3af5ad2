"""Errors as responses, in the shape of the API that a path belongs to: Anthropic's or OpenAI's."""

from __future__ import annotations

from typing import Any

from starlette.responses import Response
from starlette.types import Scope

from gptoss_jax.serving.api.encoding import JsonResponse
from gptoss_jax.serving.api.errors import ApiError, as_api_error

_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    504: "timeout_error",
    529: "overloaded_error",
}
"""Anthropic's types of errors by their status."""


def is_anthropic(path: str) -> bool:
    """Whether a path belongs to Anthropic's API."""
    return path == "/v1/messages" or path.startswith("/v1/messages/")


def error_response(error: Exception, scope: Scope) -> Response:
    """The response to a request that failed."""
    refused = as_api_error(error)
    if not is_anthropic(scope["path"]):
        return refused.response()
    body = _anthropic(refused, scope.get("state", {}).get("request_id"))
    return JsonResponse(body, _status(refused), refused.headers)


def anthropic_error(error: Exception, request_id: str | None) -> dict[str, Any]:
    """An error in Anthropic's shape, as the body of a response or an event."""
    return _anthropic(as_api_error(error), request_id)


def _anthropic(error: ApiError, request_id: str | None) -> dict[str, Any]:
    status = _status(error)
    kind = _KINDS.get(status, "invalid_request_error" if status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": _message(error)}, "request_id": request_id}


def _status(error: ApiError) -> int:
    return 529 if error.code == "overloaded" else error.status


def _message(error: ApiError) -> str:
    if error.code == "context_length_exceeded" and error.param == "prompt":
        # Clients shorten the conversation on this wording, which is Anthropic's.
        return f"prompt is too long: {error.message.removeprefix('prompt: ')}"
    return error.message
