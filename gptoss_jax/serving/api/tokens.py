"""Tokens of text and of conversations, with the paths and shapes of vLLM."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Annotated, Any

import msgspec
from msgspec import Meta
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import BaseRoute

from gptoss_jax.serving.api.body import decode, read_body, read_json
from gptoss_jax.serving.api.encoding import JsonResponse, encode
from gptoss_jax.serving.api.errors import bad_request
from gptoss_jax.serving.api.routing import route
from gptoss_jax.serving.api.server import Server
from gptoss_jax.serving.generated import Request

ChatRequestOf = Callable[[Server, bytes], Request]
"""Makes the engine's request from the body of a Chat Completion."""


class TokenizeRequest(msgspec.Struct):
    """Text, or a conversation with the fields of a Chat Completion."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Any] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    return_token_strs: bool | None = None


class TokenizeResponse(msgspec.Struct):
    """Tokens, and the text of each of them if it was asked for."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(msgspec.Struct):
    """Tokens."""

    tokens: list[Annotated[int, Meta(ge=0, lt=2**31)]]
    model: str | None = None


class DetokenizeResponse(msgspec.Struct):
    """Text."""

    prompt: str


class RenderResponse(msgspec.Struct):
    """What the engine would run for a Chat Completion."""

    request_id: str
    token_ids: list[int]
    sampling_params: dict[str, Any]
    model: str
    stream: bool = False
    priority: int = 0


class _Rendered(msgspec.Struct):
    model: str | None = None
    stream: bool | None = None


_TOKENIZE_ONLY = {
    "prompt",
    "add_special_tokens",
    "add_generation_prompt",
    "continue_final_message",
    "return_token_strs",
}


def routes(server: Server, chat_request: ChatRequestOf) -> list[BaseRoute]:
    """POST /tokenize, /detokenize and /v1/chat/completions/render.

    `chat_request` is that of Chat Completions, so that a conversation has the same tokens here. Tokenizing runs in
    threads, since long text takes long.
    """

    async def tokenize(http: HttpRequest) -> Response:
        body = await read_body(http)
        return JsonResponse(await asyncio.to_thread(_tokenized, server, chat_request, body))

    async def detokenize(http: HttpRequest) -> Response:
        request = await read_json(http, DetokenizeRequest)
        server.name(request.model)
        return JsonResponse(DetokenizeResponse(await asyncio.to_thread(_text, server, request.tokens)))

    async def render(http: HttpRequest) -> Response:
        body = await read_body(http)
        request = await asyncio.to_thread(chat_request, server, body)
        fields = decode(body, _Rendered)
        return JsonResponse(
            RenderResponse(
                request.request_id,
                request.prompt_token_ids,
                msgspec.to_builtins(request.params, str_keys=True),
                server.name(fields.model),
                bool(fields.stream),
                request.priority,
            )
        )

    return [
        route("/tokenize", tokenize, "POST"),
        route("/detokenize", detokenize, "POST"),
        route("/v1/chat/completions/render", render, "POST"),
    ]


def _tokenized(server: Server, chat_request: ChatRequestOf, body: bytes) -> TokenizeResponse:
    request = decode(body, TokenizeRequest)
    server.name(request.model)
    if (request.prompt is None) == (request.messages is None):
        found = "neither" if request.prompt is None else "both"
        raise bad_request(f"expected prompt or messages, found {found}", "prompt")
    if request.continue_final_message:
        raise bad_request("continue_final_message: a message cannot be continued", "continue_final_message")
    if request.prompt is not None:
        tokens = server.tokenizer.encode(request.prompt)
    else:
        fields = {name: v for name, v in msgspec.json.decode(body).items() if name not in _TOKENIZE_ONLY}
        tokens = chat_request(server, encode(fields)).prompt_token_ids
        if request.add_generation_prompt is False:
            header = [server.tokenizer.encode_special("<|start|>"), *server.tokenizer.encode("assistant")]
            tokens = tokens[: -len(header)]
    texts = [server.tokenizer.decode([token]) for token in tokens] if request.return_token_strs else None
    return TokenizeResponse(len(tokens), server.max_model_len, tokens, texts)


def _text(server: Server, tokens: list[int]) -> str:
    for i, token in enumerate(tokens):
        if token not in server.tokenizer:
            raise bad_request(f"tokens[{i}]: expected a token of the vocabulary, found {token}", f"tokens[{i}]")
    return server.tokenizer.decode(tokens)
