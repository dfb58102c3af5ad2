"""The OpenAPI document of the server's routes."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import msgspec
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from gptoss_jax.serving.api.encoding import JsonResponse
from gptoss_jax.serving.api.models import Model, ModelList
from gptoss_jax.serving.api.routing import route
from gptoss_jax.serving.api.tokens import (
    DetokenizeRequest,
    DetokenizeResponse,
    RenderResponse,
    TokenizeRequest,
    TokenizeResponse,
)

Schema = dict[str, Any]

_ERROR: Schema = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_STATUS: Schema = {
    "type": "object",
    "required": ["status"],
    "properties": {
        "status": {"enum": ["starting", "ready", "draining", "failed"]},
        "reason": {"type": "string"},
    },
}


@dataclasses.dataclass(frozen=True)
class Operation:
    """What a route does.

    Args:
      summary: one line.
      body: the type of its JSON body, or True for an object that the document does not describe.
      answer: the type or schema of its JSON response, or the media type of another one.
      streams: whether it can answer with server-sent events.
      query: the schemas of query parameters.
      free: whether it needs no API key.
    """

    summary: str
    body: type | bool = False
    answer: type | Schema | str = dataclasses.field(default_factory=lambda: {"type": "object"})
    streams: bool = False
    query: Mapping[str, Schema] = dataclasses.field(default_factory=dict)
    free: bool = False


_PAGE: dict[str, Schema] = {
    "after": {"type": "string"},
    "limit": {"type": "integer", "minimum": 1, "maximum": 100},
    "order": {"enum": ["asc", "desc"]},
}

OPERATIONS: Mapping[str, Operation] = {
    "POST /v1/chat/completions": Operation("Chat Completions", True, streams=True),
    "POST /v1/chat/completions/render": Operation("The tokens of a Chat Completion", True, RenderResponse),
    "POST /v1/completions": Operation("Completions", True, streams=True),
    "POST /v1/responses": Operation("Responses", True, streams=True),
    "POST /v1/responses/input_tokens": Operation("The number of a response's input tokens", True),
    "POST /v1/responses/compact": Operation("A shorter conversation", True),
    "GET /v1/responses/{}": Operation(
        "A stored response",
        streams=True,
        query={"stream": {"type": "boolean"}, "starting_after": {"type": "integer", "minimum": 0}},
    ),
    "DELETE /v1/responses/{}": Operation("Deletes a stored response"),
    "POST /v1/responses/{}/cancel": Operation("Cancels a response in the background"),
    "GET /v1/responses/{}/input_items": Operation("The input of a stored response", query=_PAGE),
    "POST /v1/messages": Operation("Anthropic's Messages", True, streams=True),
    "POST /v1/messages/count_tokens": Operation("The number of a message's input tokens", True),
    "GET /v1/models": Operation("The models", answer=ModelList),
    "GET /v1/models/{}": Operation("A model", answer=Model),
    "POST /tokenize": Operation("The tokens of text or of a conversation", TokenizeRequest, TokenizeResponse),
    "POST /detokenize": Operation("The text of tokens", DetokenizeRequest, DetokenizeResponse),
    "GET /health": Operation("Whether the server takes requests", answer=_STATUS, free=True),
    "GET /health/ready": Operation("Whether the server takes requests", answer=_STATUS, free=True),
    "GET /health/live": Operation("Whether the engine runs", answer=_STATUS, free=True),
    "GET /metrics": Operation("Metrics for Prometheus", answer="text/plain"),
    "GET /openapi.json": Operation("This document"),
}
"""All operations by method and path, with {} for path parameters."""


def routes(bodies: Mapping[str, type] | None = None) -> list[BaseRoute]:
    """GET /openapi.json; `bodies` are the types of bodies by their operations' keys in `OPERATIONS`."""

    async def openapi(http: HttpRequest) -> Response:
        return JsonResponse(document(http.app.routes, bodies or {}))

    return [route("/openapi.json", openapi, "GET")]


def document(all_routes: Iterable[BaseRoute], bodies: Mapping[str, type] | None = None) -> Schema:
    """The document of an application's routes, as far as they are in `OPERATIONS`."""
    known = [(key, path, method) for key, path, method in operations(all_routes) if key in OPERATIONS]
    described = {key: _with_body(OPERATIONS[key], (bodies or {}).get(key)) for key, _, _ in known}
    types = {kind for one in described.values() for kind in (one.body, one.answer) if isinstance(kind, type)}
    ordered = sorted(types, key=lambda kind: kind.__name__)
    found, components = msgspec.json.schema_components(ordered, ref_template="#/components/schemas/{name}")
    schemas = dict(zip(ordered, found, strict=True))
    paths: dict[str, Schema] = {}
    for key, path, method in known:
        paths.setdefault(path, {})[method.lower()] = _described(described[key], path, schemas)
    return {
        "openapi": "3.1.0",
        "info": {"title": "gptoss-jax", "version": "1"},
        "paths": paths,
        "components": {
            "schemas": {**components, "Error": _ERROR},
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "header": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
        },
        "security": [{"bearer": []}, {"header": []}],
    }


def operations(all_routes: Iterable[BaseRoute]) -> Iterator[tuple[str, str, str]]:
    """The keys in `OPERATIONS` of all operations of an application, with their paths and methods."""
    for one in all_routes:
        if isinstance(one, Route):
            path = re.sub(r"\{(\w+)(:\w+)?\}", r"{\1}", one.path)
            for method in sorted((one.methods or set()) - {"HEAD"}):
                yield f"{method} {re.sub(r'{[^}]*}', '{}', path)}", path, method


def _with_body(operation: Operation, body: type | None) -> Operation:
    return operation if body is None else dataclasses.replace(operation, body=body)


def _described(operation: Operation, path: str, schemas: Mapping[type, Schema]) -> Schema:
    parameters = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in re.findall(r"{(\w+)}", path)
    ] + [{"name": name, "in": "query", "schema": schema} for name, schema in operation.query.items()]
    answer = operation.answer
    if isinstance(answer, str):
        content: Schema = {answer: {"schema": {"type": "string"}}}
    else:
        content = {"application/json": {"schema": schemas[answer] if isinstance(answer, type) else answer}}
    if operation.streams:
        content["text/event-stream"] = {"schema": {"type": "string"}}
    error = {"description": "An error", "content": {"application/json": {"schema": {"$ref": _ERROR_NAME}}}}
    described: Schema = {
        "summary": operation.summary,
        "parameters": parameters,
        "responses": {"200": {"description": "OK", "content": content}, "default": error},
    }
    if operation.free:
        described["security"] = []
        described["responses"]["503"] = {"description": "No", "content": content}
    if operation.body:
        schema = schemas[operation.body] if isinstance(operation.body, type) else {"type": "object"}
        described["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    return described


_ERROR_NAME = "#/components/schemas/Error"
