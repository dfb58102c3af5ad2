"""Errors in Anthropic's shape."""

from __future__ import annotations

from typing import Any

from starlette.responses import Response

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


def error_response(error: Exception, request_id: str) -> Response:
    """An error as a response."""
    refused = as_api_error(error)
    headers = {**refused.headers, "request-id": request_id}
    return JsonResponse(_body(refused, request_id), _status(refused), headers)


def error_body(error: Exception, request_id: str) -> dict[str, Any]:
    """An error as the body of a response, and as an event."""
    return _body(as_api_error(error), request_id)


def _body(error: ApiError, request_id: str) -> dict[str, Any]:
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
