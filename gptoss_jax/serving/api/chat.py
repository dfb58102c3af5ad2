"""OpenAI's Chat Completions."""

from __future__ import annotations

import contextlib
import dataclasses
import time
import uuid
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal

from starlette.routing import BaseRoute

from gptoss_jax.errors import UsageError
from gptoss_jax.serving.api import sse
from gptoss_jax.serving.api.encoding import encode
from gptoss_jax.serving.api.errors import bad_request
from gptoss_jax.serving.api.fields import IGNORED, REFUSED, Refused, decode_request
from gptoss_jax.serving.api.objects import (
    StreamOptions,
    TokenTexts,
    bounded,
    check_stream,
    new_id,
    usage_object,
)
from gptoss_jax.serving.api.routing import generation_route
from gptoss_jax.serving.api.sampling import SamplingFields, TopLogprobs, check_size, renamed, sampling_params
from gptoss_jax.serving.api.server import Server
from gptoss_jax.serving.generated import Request
from gptoss_jax.serving.turns import Turn, Update, Usage
from gptoss_jax.text.harmony import SEPARATOR
from gptoss_jax.text.items import Item, ItemEvent, ItemText, TextToken
from gptoss_jax.types import StructuredOutputsParams, TokenLogprobs

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]

EFFORTS: Mapping[str, str] = {
    **{"none": "low", "minimal": "low", "low": "low"},
    "medium": "medium",
    **{"high": "high", "xhigh": "high", "max": "high"},
}
"""OpenAI's values of `reasoning_effort`, and those that the model was trained with."""

_REFUSED = REFUSED | {
    "audio": Refused("the model has text only"),
    "modalities": Refused("the model has text only", ([], ["text"])),
    "web_search_options": Refused("not supported"),
    "functions": Refused("deprecated and not supported; use tools"),
    "function_call": Refused("deprecated and not supported; use tool_choice"),
    "echo": Refused("messages are not repeated"),
    "continue_final_message": Refused("a message cannot be continued"),
    "add_generation_prompt": Refused("the next message is always the assistant's", (True,)),
    "documents": Refused("not supported; put them into a message"),
    "chat_template": Refused("the model has one format only"),
    "best_of": Refused("not supported; use n"),
}
_IGNORED = IGNORED | {"prediction", "verbosity", "mm_processor_kwargs", "media_io_kwargs"}


class ChatRequest(SamplingFields, kw_only=True):
    """The fields of a Chat Completion that have an effect."""

    messages: list[Any] | None = None
    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: bool | None = None
    top_logprobs: TopLogprobs | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    response_format: dict[str, Any] | None = None
    reasoning_effort: Effort | None = None
    include_reasoning: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None


def routes(server: Server) -> list[BaseRoute]:
    """The routes of Chat Completions."""
    return [generation_route("/v1/chat/completions", partial(prepare, server))]


def prepare(server: Server, body: bytes) -> ChatCompletion:
    """The chat completion that a request's body asks for. Raises ApiError, which names the field."""
    fields = decode_request(server, body, ChatRequest, _REFUSED, _IGNORED)
    model = server.name(fields.model)
    check_stream(fields.stream, fields.stream_options, fields.prompt_logprobs)
    names = _names(fields)
    try:
        return ChatCompletion(server, fields, model, names, _request(server, fields))
    except UsageError as error:
        raise renamed(error, names) from error


def _names(fields: ChatRequest) -> dict[str, str]:
    """The names of the request's fields by those of the engine's."""
    names = {"prompt": "messages", "logprobs": "top_logprobs"}
    if fields.max_completion_tokens is not None:
        names["max_tokens"] = "max_completion_tokens"
    if fields.structured_outputs is None:
        names["structured_outputs"] = "response_format"
    return names


def _request(server: Server, fields: ChatRequest) -> Request:
    """The request that the engine runs. Raises UsageError and ApiError."""
    if fields.top_logprobs and not fields.logprobs:
        raise bad_request("top_logprobs: expected only with logprobs: true", "top_logprobs")
    most = fields.max_tokens if fields.max_completion_tokens is None else fields.max_completion_tokens
    params = sampling_params(
        fields,
        max_tokens=most,
        logprobs=(fields.top_logprobs or 0) if fields.logprobs else None,
        structured_outputs=_structured_outputs(fields),
    )
    options: dict[str, Any] = {
        "tools": fields.tools or None,
        "response_format": fields.response_format,
        **_template_options(server, fields),
    }
    if fields.tools:
        options |= _tool_options(fields)
    elif fields.tool_choice not in (None, "auto", "none"):
        raise bad_request("tool_choice: expected only with tools", "tool_choice")
    request = server.prompts.chat_request(new_id("chatcmpl"), _messages(fields.messages or []), params, **options)
    request.priority = fields.priority or 0
    check_size(len(request.prompt_token_ids), params.n)
    return request


def _structured_outputs(fields: ChatRequest) -> Any:
    """The constraint of a request's `response_format` or `structured_outputs`; raises ApiError if it has both."""
    form, given = fields.response_format, fields.structured_outputs
    if form is None:
        return given
    kind, inner = form.get("type", "json_schema"), form.get("json_schema", form)
    if kind == "text":
        return given
    if given is not None:
        raise bad_request("structured_outputs: expected this or response_format, found both", "structured_outputs")
    if kind == "json_object":
        return StructuredOutputsParams(json_object=True)
    schema = inner.get("schema") if isinstance(inner, Mapping) else None
    # What is no schema is refused when it is written into the prompt.
    return StructuredOutputsParams(json=schema) if isinstance(schema, Mapping) else None


def _template_options(server: Server, fields: ChatRequest) -> dict[str, Any]:
    """The options of a conversation that have defaults, also as arguments of vLLM's chat template."""
    given = dict(fields.chat_template_kwargs or {})
    effort = given.pop("reasoning_effort", None)
    if effort is not None and (not isinstance(effort, str) or effort not in EFFORTS):
        name = "chat_template_kwargs.reasoning_effort"
        raise bad_request(f"{name}: expected one of {', '.join(EFFORTS)}, found {effort!r:.60}", name)
    effort = fields.reasoning_effort or effort
    if effort is not None and EFFORTS[effort] != effort:
        server.note_once("reasoning_effort", "none and minimal mean low, and xhigh and max mean high")
    options = {"reasoning_effort": effort and EFFORTS[effort], "model_identity": given.pop("model_identity", None)}
    for name in given:
        server.note_once(f"chat_template_kwargs.{name!r:.60}", "an unknown argument, which changes nothing")
    return options


def _tool_options(fields: ChatRequest) -> dict[str, Any]:
    choice = None if fields.tool_choice == "auto" else fields.tool_choice
    return {"tool_choice": choice, "parallel_tool_calls": False if fields.parallel_tool_calls is False else None}


def _messages(given: Sequence[Any]) -> list[Any]:
    """The messages, in which refusals are text; raises ApiError for an assistant's audio and legacy calls."""
    return [
        _assistant(i, one) if isinstance(one, dict) and one.get("role") == "assistant" else one
        for i, one in enumerate(given)
    ]


def _assistant(index: int, message: dict[str, Any]) -> dict[str, Any]:
    for name, reason in (("audio", "the model has text only"), ("function_call", "deprecated; use tool_calls")):
        if message.get(name) is not None:
            raise bad_request(f"messages[{index}].{name}: {reason}", f"messages[{index}].{name}")
    content = message.get("content")
    if content is None and isinstance(message.get("refusal"), str):
        content = message["refusal"]
    elif isinstance(content, list):
        content = [
            {"type": "text", "text": part.get("refusal")}
            if isinstance(part, dict) and part.get("type") == "refusal"
            else part
            for part in content
        ]
    return message if content is message.get("content") else message | {"content": content}


@dataclasses.dataclass
class Delta:
    """What an update adds to a choice: fields of its message, and the tokens of the answer's text."""

    message: dict[str, Any]
    tokens: Sequence[TextToken] = ()


class Choice:
    """One choice, whose items become deltas of a single message.

    The texts of answers and preambles are the message's content, in which a blank line separates those of different
    items; so are those of reasoning. `reasoning_fields` are the names under which the message has the latter.
    """

    def __init__(self, reasoning_fields: Sequence[str]) -> None:
        self._reasoning_fields = reasoning_fields
        self._calls: dict[Item, int] = {}
        self._last: dict[bool, Item] = {}
        self.content: list[str] = []
        self.reasoning: list[str] = []
        self.calls: list[tuple[dict[str, Any], list[str]]] = []

    def deltas(self, events: Sequence[ItemEvent]) -> Iterator[Delta]:
        """The deltas of events, one for each item, and a first one for each call."""
        for item, text, tokens in _by_item(events):
            if item.kind != "call":
                yield from self._text(item, text, tokens)
                continue
            if item not in self._calls:
                yield self._call(item)
            if text:
                self.calls[self._calls[item]][1].append(text)
                yield _call_delta(self._calls[item], {"function": {"arguments": text}})

    def _text(self, item: Item, text: str, tokens: Sequence[TextToken]) -> Iterator[Delta]:
        reasons = item.kind == "reasoning"
        if not text:
            if tokens:
                yield Delta({"content": ""}, tokens)
            return
        last = self._last.get(reasons)
        self._last[reasons] = item
        text = text if last in (None, item) else SEPARATOR + text
        (self.reasoning if reasons else self.content).append(text)
        if not reasons:
            yield Delta({"content": text}, tokens)
        elif self._reasoning_fields:
            yield Delta(dict.fromkeys(self._reasoning_fields, text))

    def _call(self, item: Item) -> Delta:
        index = self._calls[item] = len(self.calls)
        call = _call(f"call_{uuid.uuid4().hex[:24]}", item.tool)
        self.calls.append((call, []))
        return _call_delta(index, call)

    def message(self, items: Sequence[Item]) -> dict[str, Any]:
        """The whole message of a completion with these items; its content is null if none of them is for the user."""
        said = any(item.kind in ("answer", "preamble") for item in items)
        message: dict[str, Any] = {"role": "assistant", "content": "".join(self.content) if said else None}
        message |= {"refusal": None, "annotations": []}
        if self.reasoning:
            message |= dict.fromkeys(self._reasoning_fields, "".join(self.reasoning))
        calls = [_call(call["id"], call["function"]["name"], "".join(texts)) for call, texts in self.calls]
        return message | ({"tool_calls": calls} if calls else {})


def _call(call_id: str, name: str | None, arguments: str = "") -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def _call_delta(index: int, call: dict[str, Any]) -> Delta:
    return Delta({"tool_calls": [{"index": index, **call}]})


def _by_item(events: Sequence[ItemEvent]) -> Iterator[tuple[Item, str, list[TextToken]]]:
    """The text and the tokens that events add to each item, in their order; also of items without text."""
    item: Item | None = None
    texts: list[str] = []
    tokens: list[TextToken] = []
    for event in events:
        if event.item is not item:
            if item:
                yield item, "".join(texts), tokens
            item, texts, tokens = event.item, [], []
        if isinstance(event, ItemText):
            texts.append(event.text)
            tokens += event.tokens
    if item:
        yield item, "".join(texts), tokens


class ChatCompletion:
    """A chat completion: a request for the engine, and its response, streamed or not.

    `names` has the names of the request's fields by those that the engine's errors name.
    """

    def __init__(
        self, server: Server, fields: ChatRequest, model: str, names: Mapping[str, str], request: Request
    ) -> None:
        self._server, self.fields, self._names, self._request = server, fields, names, request
        reasoning = () if fields.include_reasoning is False else server.reasoning_fields
        self._choices = [Choice(reasoning) for _ in range(request.params.n)]
        self._head: dict[str, Any] = {
            "id": request.request_id,
            "object": "chat.completion.chunk" if fields.stream else "chat.completion",
            "created": int(time.time()),
            "model": model,
            "service_tier": "default",
            "system_fingerprint": server.fingerprint,
        }
        self._options = fields.stream_options or StreamOptions()
        self._with_usage = bool(self._options.include_usage)
        asks = bool(fields.logprobs) or fields.prompt_logprobs is not None
        self._texts = TokenTexts(server.tokenizer, bool(fields.return_tokens_as_token_ids)) if asks else None

    @property
    def request(self) -> Request:
        """What the engine runs."""
        return self._request

    @property
    def streams(self) -> bool:
        """See Generation."""
        return bool(self.fields.stream)

    async def _start(self) -> Turn:
        try:
            return await self._server.start(self._request)
        except UsageError as error:
            raise renamed(error, self._names) from error

    async def answer(self) -> dict[str, Any]:
        """The response. Raises ApiError."""
        ends: dict[int, Update] = {}
        logprobs: list[list[TextToken]] = [[] for _ in self._choices]
        token_ids: list[list[int]] = [[] for _ in self._choices]
        prompt_logprobs: list[TokenLogprobs | None] | None = None
        async with contextlib.aclosing(await self._start()) as turn:
            try:
                async for update in turn:
                    for delta in self._choices[update.index].deltas(update.events):
                        logprobs[update.index] += delta.tokens
                    token_ids[update.index] += [event.token_id for event in update.tokens]
                    prompt_logprobs = update.prompt_logprobs or prompt_logprobs
                    if update.finish_reason:
                        ends[update.index] = update
            except UsageError as error:
                raise renamed(error, self._names) from error
        choices = [
            {
                "index": index,
                "message": choice.message(ends[index].items),
                "logprobs": self._logprobs(logprobs[index]) if self.fields.logprobs else None,
                "finish_reason": ends[index].finish_reason,
                **({"token_ids": token_ids[index]} if self.fields.return_token_ids else {}),
            }
            for index, choice in enumerate(self._choices)
        ]
        response = self._head | {"choices": choices, "usage": usage_object([ends[0].usage])}
        if self.fields.return_token_ids:
            response["prompt_token_ids"] = self._request.prompt_token_ids
        if prompt_logprobs is not None and self.fields.prompt_logprobs is not None and self._texts:
            response["prompt_logprobs"] = self._texts.prompt_logprobs(prompt_logprobs)
        return response

    async def events(self) -> AsyncGenerator[bytes]:
        """The events of the response, the first of them once the engine has the request. Raises ApiError before it.

        Later errors are events.
        """
        usage: Usage | None = None
        async with contextlib.aclosing(await self._start()) as turn:
            yield b"".join(self._first(index) for index in range(len(self._choices)))
            try:
                async for update in turn:
                    usage = update.usage
                    if data := self._chunks(update):
                        yield data
                if self._with_usage and usage:
                    yield sse.event(encode(self._head | {"choices": [], "usage": usage_object([usage])}))
            except Exception as error:
                yield sse.event(encode({"error": renamed(error, self._names).body}))
            yield sse.DONE

    def _first(self, index: int) -> bytes:
        chunk = self._chunk(index, Delta({"role": "assistant", "content": ""}), None)
        if self.fields.return_token_ids and not index:
            chunk["prompt_token_ids"] = self._request.prompt_token_ids
        return sse.event(encode(chunk))

    def _chunks(self, update: Update) -> bytes:
        """The events of an update."""
        deltas = list(self._choices[update.index].deltas(update.events))
        chunks = [self._chunk(update.index, delta, None) for delta in deltas]
        if update.finish_reason:
            chunks.append(self._chunk(update.index, Delta({}), update.finish_reason))
        if self.fields.return_token_ids:
            chunks = chunks or [self._chunk(update.index, Delta({}), None)]
            chunks[0]["choices"][0]["token_ids"] = [event.token_id for event in update.tokens]
        if self._with_usage and self._options.continuous_usage_stats and chunks:
            chunks[-1]["usage"] = usage_object([update.usage])
        return b"".join(sse.event(encode(chunk)) for chunk in chunks)

    def _chunk(self, index: int, delta: Delta, finish_reason: str | None) -> dict[str, Any]:
        choice = {
            "index": index,
            "delta": delta.message,
            "logprobs": self._logprobs(delta.tokens) if delta.tokens else None,
            "finish_reason": finish_reason,
        }
        chunk = self._head | {"choices": [choice]}
        return chunk | {"usage": None} if self._with_usage else chunk

    def _logprobs(self, tokens: Sequence[TextToken]) -> dict[str, Any]:
        """The log-probabilities of tokens of the answer's text."""
        return {
            "content": [
                {
                    **self._token(token.token_id, token.logprobs.logprob),
                    "top_logprobs": [self._token(*top) for top in token.logprobs.top.items()],
                }
                for token in tokens
            ],
            "refusal": None,
        }

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        assert self._texts is not None
        data = self._texts.data(token)
        return {
            "token": self._texts.text(token),
            "logprob": bounded(logprob),
            "bytes": None if data is None else list(data),
        }
