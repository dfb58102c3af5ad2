"""OpenAI's Completions: the model continues text or tokens, without a chat's format."""

from __future__ import annotations

import asyncio
import codecs
import contextlib
import dataclasses
import time
from collections import deque
from collections.abc import AsyncGenerator, Mapping, Sequence
from functools import partial
from typing import Annotated, Any

from msgspec import Meta
from starlette.routing import BaseRoute

from gptoss_jax.engine.outputs import TokenEvent
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
from gptoss_jax.text.items import ItemText
from gptoss_jax.types import TokenLogprobs

MAX_TOKENS = 16
"""OpenAI's default of `max_tokens`."""

MAX_CHOICES = 4096
"""The most choices of a request, over all its prompts."""

_REFUSED = REFUSED | {"suffix": Refused("the model cannot fill in text before a suffix")}


class CompletionRequest(SamplingFields, kw_only=True):
    """The fields of a Completion that have an effect."""

    prompt: str | list[Any] | None = None
    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    best_of: int | None = None
    echo: bool | None = None
    logprobs: TopLogprobs | None = None
    max_tokens: Annotated[int, Meta(ge=0)] | None = None
    response_format: dict[str, Any] | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None


def routes(server: Server) -> list[BaseRoute]:
    """The routes of Completions."""
    return [generation_route("/v1/completions", partial(prepare, server))]


def prepare(server: Server, body: bytes) -> Completion:
    """The completion that a request's body asks for. Raises ApiError, which names the field."""
    fields = decode_request(server, body, CompletionRequest, _REFUSED, IGNORED)
    model = server.name(fields.model)
    check_stream(fields.stream, fields.stream_options, fields.prompt_logprobs)
    names = {"structured_outputs": "response_format"} if fields.structured_outputs is None else {}
    try:
        return Completion(server, fields, model, names, _requests(server, fields))
    except UsageError as error:
        raise renamed(error, names) from error


def _requests(server: Server, fields: CompletionRequest) -> list[Request]:
    """The requests that the engine runs, one for each prompt. Raises UsageError and ApiError."""
    n = fields.n or 1
    if fields.best_of not in (None, n):
        raise bad_request(f"best_of: expected the value of n, {n}, found {fields.best_of}", "best_of")
    prompts = _prompts(fields.prompt, server.vocab_size)
    if len(prompts) * n > MAX_CHOICES:
        raise bad_request(
            f"prompt: expected at most {MAX_CHOICES} prompts times n, found {len(prompts) * n}", "prompt"
        )
    if fields.echo:
        server.prompts.need_tokenizer("echo")
    asked = [fields.prompt_logprobs, fields.logprobs if fields.echo else None]
    params = sampling_params(
        fields,
        # The engine generates at least one token, which is dropped if none is wanted.
        max_tokens=MAX_TOKENS if fields.max_tokens is None else max(fields.max_tokens, 1),
        logprobs=fields.logprobs,
        prompt_logprobs=max((count for count in asked if count is not None), default=None),
        structured_outputs=_structured_outputs(fields),
    )
    name = new_id("cmpl")
    requests = [server.prompts.raw_request(f"{name}-{i}", prompt, params) for i, prompt in enumerate(prompts)]
    for request in requests:
        request.priority = fields.priority or 0
    check_size(sum(len(request.prompt_token_ids) for request in requests), n)
    return requests


def _prompts(given: str | list[Any] | None, vocab_size: int) -> list[str | list[int]]:
    """The prompts of a request: text or token ids, or a list of either. Raises ApiError."""
    if isinstance(given, str):
        return [given]
    if not given:
        raise bad_request("prompt: expected text, token ids, or a list of either, found none", "prompt")
    if type(given[0]) is int:
        return [_token_ids("prompt", given, vocab_size)]
    return [
        prompt if isinstance(prompt, str) else _token_ids(f"prompt[{i}]", prompt, vocab_size)
        for i, prompt in enumerate(given)
    ]


def _token_ids(where: str, given: Any, vocab_size: int) -> list[int]:
    if not isinstance(given, list):
        raise bad_request(f"{where}: expected text or token ids, found {type(given).__name__}", where)
    for token in given:
        if type(token) is not int or not 0 <= token < vocab_size:
            found = f"{token!r:.60}"
            raise bad_request(f"{where}: expected token ids from 0, below {vocab_size}, found {found}", where)
    return given


def _structured_outputs(fields: CompletionRequest) -> Any:
    """The constraint of a request; `response_format` is the same as in a chat, but the model does not see it."""
    form, given = fields.response_format, fields.structured_outputs
    if form is None or form.get("type") == "text":
        return given
    if given is not None:
        raise bad_request("structured_outputs: expected this or response_format, found both", "structured_outputs")
    inner = form.get("json_schema")
    match form.get("type"), inner.get("schema") if isinstance(inner, Mapping) else None:
        case "json_object", _:
            return {"json_object": True}
        case "json_schema", Mapping() as schema:
            return {"json": schema}
    raise bad_request(
        "response_format: expected the type text, json_object or json_schema, the latter with json_schema.schema",
        "response_format",
    )


@dataclasses.dataclass
class Logprobs:
    """OpenAI's lists of the log-probabilities of tokens: `text_offset` are the places in the choice's text."""

    tokens: list[str] = dataclasses.field(default_factory=list)
    token_logprobs: list[float | None] = dataclasses.field(default_factory=list)
    top_logprobs: list[dict[str, float] | None] = dataclasses.field(default_factory=list)
    text_offset: list[int] = dataclasses.field(default_factory=list)

    def extend(self, more: Logprobs) -> None:
        """Append the entries of `more`."""
        for field in dataclasses.fields(self):
            getattr(self, field.name).extend(getattr(more, field.name))


class _Offsets:
    """The places of tokens in a text that is the concatenation of their bytes."""

    def __init__(self, start: int = 0) -> None:
        self.end = start
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def place(self, data: bytes) -> int:
        """The number of characters before the next token, which has these bytes."""
        start = self.end
        self.end += len(self._decoder.decode(data))
        return start


@dataclasses.dataclass
class Piece:
    """What an update adds to a choice."""

    text: str
    logprobs: Logprobs | None
    token_ids: list[int]
    finish_reason: str | None


class Choice:
    """One choice: its text, which with `echo` begins with the prompt's, and its tokens.

    Every generated token is in its log-probabilities, also a special one, but for the tokens of a stop string.
    """

    def __init__(self, fields: CompletionRequest, request: Request, texts: TokenTexts, prompt: str) -> None:
        self._fields, self._request, self._texts, self._prompt = fields, request, texts, prompt
        self._offsets = _Offsets(len(prompt))
        self._echoes = bool(fields.echo)
        self._unreported: deque[TokenEvent] = deque()
        self.dropped = fields.max_tokens == 0

    def take(self, update: Update, prompt_logprobs: Sequence[TokenLogprobs | None] | None) -> Piece:
        """What an update adds; `prompt_logprobs` are known once the first one has come."""
        logprobs = Logprobs() if self._fields.logprobs is not None else None
        piece = Piece("", logprobs, [], update.finish_reason)
        if self._echoes:
            self._echoes = False
            piece.text = self._prompt
            if logprobs:
                self._echo(logprobs, prompt_logprobs or [])
        if self.dropped:
            piece.finish_reason = update.finish_reason and "length"
            return piece
        texts = [event for event in update.events if isinstance(event, ItemText)]
        piece.text += "".join(event.text for event in texts)
        piece.token_ids = [event.token_id for event in update.tokens]
        if logprobs:
            self._unreported.extend(update.tokens)
            self._report(logprobs, sum(len(event.tokens) for event in texts), update.finish_reason is not None)
        return piece

    def _echo(self, logprobs: Logprobs, known: Sequence[TokenLogprobs | None]) -> None:
        offsets = _Offsets()
        for i, token in enumerate(self._request.prompt_token_ids):
            self._append(
                logprobs, token, known[i] if i < len(known) else None, offsets.place(self._texts.decoded(token))
            )

    def _report(self, logprobs: Logprobs, count: int, ended: bool) -> None:
        """Append `count` further tokens of the text and what comes before them; at the end all but a stop string's."""
        while self._unreported and (count or ended):
            event = self._unreported.popleft()
            is_text = self._texts.is_text(event.token_id)
            if is_text and count:
                count -= 1
                place = self._offsets.place(self._texts.decoded(event.token_id))
                self._append(logprobs, event.token_id, event.logprobs, place)
            elif not is_text or event.finish_reason == "stop":
                self._append(logprobs, event.token_id, event.logprobs, self._offsets.end)

    def _append(self, lists: Logprobs, token: int, logprobs: TokenLogprobs | None, offset: int) -> None:
        lists.tokens.append(self._texts.text(token))
        lists.text_offset.append(offset)
        lists.token_logprobs.append(None if logprobs is None else bounded(logprobs.logprob))
        lists.top_logprobs.append(None if logprobs is None else self._top(logprobs))

    def _top(self, logprobs: TokenLogprobs) -> dict[str, float]:
        """The most likely tokens, and the chosen one."""
        most = list(logprobs.top.items())[: self._fields.logprobs]
        return {
            self._texts.text(token): bounded(value)
            for token, value in [(logprobs.token_id, logprobs.logprob), *most]
        }


class Completion:
    """A completion: requests for the engine, one for each prompt, and its response, streamed or not.

    `names` has the names of the request's fields by those that the engine's errors name.
    """

    def __init__(
        self,
        server: Server,
        fields: CompletionRequest,
        model: str,
        names: Mapping[str, str],
        requests: Sequence[Request],
    ) -> None:
        self._server, self.fields, self._names, self._requests = server, fields, names, requests
        tokenizer = server.prompts.tokenizer
        self._texts = TokenTexts(tokenizer, bool(fields.return_tokens_as_token_ids))
        self._n = fields.n or 1
        self._usages = [Usage(len(request.prompt_token_ids)) for request in requests]
        self._prompt_logprobs: list[list[TokenLogprobs | None] | None] = [None] * len(requests)
        self._choices = [
            Choice(fields, request, self._texts, self._echo(request))
            for request in requests
            for _ in range(self._n)
        ]
        self._options = fields.stream_options or StreamOptions()
        self._with_usage = bool(fields.stream and self._options.include_usage)
        self._head: dict[str, Any] = {
            "id": requests[0].request_id.rpartition("-")[0],
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": server.fingerprint,
        }

    @property
    def streams(self) -> bool:
        """See Generation."""
        return bool(self.fields.stream)

    def _echo(self, request: Request) -> str:
        if not self.fields.echo:
            return ""
        return (
            self._server.tokenizer.decode(request.prompt_token_ids) if request.prompt is None else request.prompt
        )

    @contextlib.asynccontextmanager
    async def _pieces(self) -> AsyncGenerator[AsyncGenerator[tuple[int, Piece]]]:
        """Runs the requests; the pieces have their choices' indices. Raises UsageError and EngineError."""
        async with contextlib.AsyncExitStack() as stack:
            turns = await _start_all(self._server, self._requests, stack)
            yield await stack.enter_async_context(contextlib.aclosing(self._take(turns)))

    async def _take(self, turns: Sequence[Turn]) -> AsyncGenerator[tuple[int, Piece]]:
        async with contextlib.aclosing(_merged(turns)) as updates:
            async for number, update in updates:
                self._usages[number] = update.usage
                self._prompt_logprobs[number] = update.prompt_logprobs or self._prompt_logprobs[number]
                index = number * self._n + update.index
                yield index, self._choices[index].take(update, self._prompt_logprobs[number])

    async def answer(self) -> dict[str, Any]:
        """The response. Raises ApiError."""
        wholes = [Piece("", None if self.fields.logprobs is None else Logprobs(), [], None) for _ in self._choices]
        texts: list[list[str]] = [[] for _ in self._choices]
        try:
            async with self._pieces() as pieces:
                async for index, piece in pieces:
                    whole = wholes[index]
                    texts[index].append(piece.text)
                    whole.token_ids += piece.token_ids
                    whole.finish_reason = piece.finish_reason
                    if whole.logprobs and piece.logprobs:
                        whole.logprobs.extend(piece.logprobs)
        except UsageError as error:
            raise renamed(error, self._names) from error
        for index, whole in enumerate(wholes):
            whole.text = "".join(texts[index])
        choices = [self._choice(index, whole, True) for index, whole in enumerate(wholes)]
        return self._head | {"choices": choices, "usage": self._usage()}

    async def events(self) -> AsyncGenerator[bytes]:
        """The events of the response; the first is b"" once the engine has the requests. Raises ApiError before it.

        Later errors are events.
        """
        started = False
        try:
            async with self._pieces() as pieces:
                started = True
                yield b""
                first = set(range(len(self._choices)))
                async for index, piece in pieces:
                    if (
                        piece.text
                        or piece.finish_reason
                        or (piece.logprobs and piece.logprobs.tokens)
                        or piece.token_ids
                    ):
                        yield self._chunk([self._choice(index, piece, index in first)])
                        first.discard(index)
                if self._with_usage:
                    yield sse.event(encode(self._head | {"choices": [], "usage": self._usage()}))
        except Exception as error:
            known = renamed(error, self._names)
            if not started:
                raise known from error
            yield sse.event(encode({"error": known.body}))
        yield sse.DONE

    def _chunk(self, choices: list[dict[str, Any]]) -> bytes:
        chunk = self._head | {"choices": choices}
        if self._with_usage:
            chunk["usage"] = self._usage() if self._options.continuous_usage_stats else None
        return sse.event(encode(chunk))

    def _choice(self, index: int, piece: Piece, first: bool) -> dict[str, Any]:
        """A choice in a response or a chunk; the first chunk also has the data of the prompt."""
        choice: dict[str, Any] = {
            "index": index,
            "text": piece.text,
            "logprobs": piece.logprobs,
            "finish_reason": piece.finish_reason,
        }
        number = index // self._n
        if self.fields.return_token_ids:
            choice["token_ids"] = piece.token_ids
            if first:
                choice["prompt_token_ids"] = self._requests[number].prompt_token_ids
        known = self._prompt_logprobs[number]
        if self.fields.prompt_logprobs is not None and known is not None:
            choice["prompt_logprobs"] = self._texts.prompt_logprobs(known)
        return choice

    def _usage(self) -> dict[str, Any]:
        usage = usage_object(self._usages)
        if self._choices[0].dropped:
            usage |= {"completion_tokens": 0, "total_tokens": usage["prompt_tokens"]}
        return usage


async def _start_all(server: Server, requests: Sequence[Request], stack: contextlib.AsyncExitStack) -> list[Turn]:
    """Submit requests; `stack` closes them. Raises the error of the first that is refused."""
    turns: dict[int, Turn] = {}

    async def start(number: int, request: Request) -> None:
        turn = await server.start(request)
        stack.push_async_callback(turn.aclose)
        turns[number] = turn

    try:
        async with asyncio.TaskGroup() as group:
            for number, request in enumerate(requests):
                group.create_task(start(number, request))
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [turns[number] for number in range(len(requests))]


async def _merged(turns: Sequence[Turn]) -> AsyncGenerator[tuple[int, Update]]:
    """The updates of several turns as they come, each with the number of its turn."""
    if len(turns) == 1:
        async for update in turns[0]:
            yield 0, update
        return
    # Small, so that a client that reads slowly slows its requests.
    queue: asyncio.Queue[tuple[int, Update | Exception | None]] = asyncio.Queue(len(turns))

    async def drain(number: int, turn: Turn) -> None:
        end: Exception | None = None
        try:
            async for update in turn:
                await queue.put((number, update))
        except Exception as error:
            end = error
        await queue.put((number, end))

    tasks = [asyncio.ensure_future(drain(number, turn)) for number, turn in enumerate(turns)]
    try:
        left = len(turns)
        while left:
            number, found = await queue.get()
            if isinstance(found, Exception):
                raise found
            if found is None:
                left -= 1
            else:
                yield number, found
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
