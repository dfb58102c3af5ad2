"""The Python API: `LLM` runs prompts or conversations and returns outputs like vLLM's; `AsyncLLM` is for asyncio."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import numbers
import sys
import threading
import weakref
from collections.abc import AsyncGenerator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gptoss_jax.checkpoints.hub import resolve
from gptoss_jax.checkpoints.loading import EMBEDDED, load_model
from gptoss_jax.engine.engine import Engine
from gptoss_jax.engine.options import EngineOptions
from gptoss_jax.engine.outputs import Load, TokenEvent
from gptoss_jax.errors import CheckpointError, EngineError, GptOssError, UsageError, expect, named
from gptoss_jax.runtime.compile_cache import enable_compile_cache
from gptoss_jax.serving.generated import Completion, Request, by_completion
from gptoss_jax.serving.prompts import Message, Prompts
from gptoss_jax.serving.worker import Inbox, Worker
from gptoss_jax.text import harmony
from gptoss_jax.text.items import ChatItems
from gptoss_jax.text.structured import GrammarCompiler
from gptoss_jax.text.tokenizer import Tokenizer
from gptoss_jax.text.transcripts import ChatTranscript, RawTranscript, TextDelta
from gptoss_jax.types import CompletionOutput, RequestOutput, SamplingParams
from sharding import ShardingRules

_CHAT_OPTIONS = {
    "reasoning_effort",
    "builtin_tools",
    "model_identity",
    "knowledge_cutoff",
    "current_date",
    "response_format",
    "auto_drop_analysis",
    "tool_choice",
    "parallel_tool_calls",
}
"""The options of a conversation besides its tools: those of `harmony.render` for the assistant, and of `chat_scope`."""


@dataclasses.dataclass
class Progress:
    """The effect of one token: the new text, its completion, and the output of the whole request so far."""

    deltas: list[TextDelta]
    completion: CompletionOutput
    output: RequestOutput


class _Model(Prompts):
    """A model with its tokenizer and engine, and the thread that runs the engine; see `LLM` and `AsyncLLM`.

    `path`, `mesh`, `dtype` and `rules` are as for `load_model`; `engine` holds the engine options. `kernels` is "auto",
    "reference" or the name of a backend (see `EngineOptions`). `warm_up` compiles all programs of requests with
    plain sampling parameters at once, instead of when each is first needed.

    Raises CheckpointError or ShardingError if the model cannot be loaded, UsageError for unknown kernels.
    """

    def __init__(
        self,
        path: str | Path = EMBEDDED,
        mesh: str | jax.sharding.Mesh | None = None,
        dtype: str = "bfloat16",
        *,
        rules: ShardingRules | None = None,
        engine: EngineOptions | None = None,
        kernels: str | None = None,
        warm_up: bool = False,
        progress: bool | None = None,
    ) -> None:
        expect(isinstance(engine, EngineOptions | None), "engine", "EngineOptions", engine)
        engine = engine or EngineOptions()
        if kernels is not None:
            engine = dataclasses.replace(engine, kernels=kernels)
        path = resolve(path)
        super().__init__(path)
        enable_compile_cache()
        model = load_model(path, mesh, dtype, rules=rules, progress=progress)
        self.config = model.config
        if self.tokenizer and self.tokenizer.vocab_size > self.config.vocab_size:
            raise CheckpointError(
                f"{path / 'tokenizer.json'}: expected ids below config.json's vocab_size {self.config.vocab_size}, "
                f"found {self.tokenizer.vocab_size - 1}"
            )
        # As in transformers: those of generation_config.json if it lists any, else those of config.json.
        eos = set(self.config.eos_token_id)
        if beyond := [token for token in sorted(eos) if token >= self.config.vocab_size]:
            raise CheckpointError(
                f"{path / 'config.json'}: eos_token_id: expected ids below vocab_size {self.config.vocab_size}, "
                f"found {beyond[0]}"
            )
        if self.tokenizer and set(harmony.STOP_TOKENS) <= self.tokenizer.special_tokens.keys():
            # The released config.json lists <|return|> only, OpenAI's original one no stop token.
            eos |= set(harmony.stop_token_ids(self.tokenizer))
        constrain = GrammarCompiler(self.tokenizer, self.config.vocab_size, eos) if self.tokenizer else None
        self._own(Engine(model, engine, eos_token_ids=eos, constrain=constrain))
        if warm_up:
            self.engine.warm_up(progress)

    def _own(self, engine: Engine) -> None:
        self.engine = engine
        self._starting = threading.Lock()
        self._worker: Worker | None = None

    @property
    def worker(self) -> Worker:
        """The owner of the engine, whose thread starts when it is first needed."""
        with self._starting:
            if self._worker is None:
                self._worker = Worker(self.engine)
                # The thread ends with the process, or with the last reference to this object.
                weakref.finalize(self, self._worker.close)
            return self._worker

    def close(self) -> None:
        """End the engine's thread; requests that are running fail."""
        self.worker.close()

    def load(self) -> Load:
        """The engine's load and counters."""
        return self.worker.load()

    def _prompts(
        self,
        prompts: str | Sequence[int] | Sequence[str] | Sequence[Sequence[int]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
    ) -> list[Request]:
        """The requests of `generate`."""
        expect(
            isinstance(prompts, str) or _is_list(prompts), "prompts", "text, token ids or a list of them", prompts
        )
        if isinstance(prompts, str) or (len(prompts) and isinstance(prompts[0], numbers.Integral)):
            prompts = [prompts]  # type: ignore[assignment]
        for i, prompt in enumerate(prompts):
            expect(isinstance(prompt, str) or _is_list(prompt), f"prompts[{i}]", "text or token ids", prompt)
        return [
            self.raw_request(str(i), prompt, params)  # type: ignore[arg-type]
            for i, (prompt, params) in enumerate(zip(prompts, _each(sampling_params, len(prompts)), strict=True))
        ]

    def _conversations(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        tools: Sequence[harmony.tools.Tool] | None,
        options: dict[str, Any],
    ) -> list[Request]:
        """The requests of `chat`."""
        for name in options.keys() - _CHAT_OPTIONS:
            raise TypeError(f"{type(self).__name__}.chat() got an unexpected keyword argument {name!r}")
        expect(_is_list(messages), "messages", "a list of messages, or of such lists", messages)
        conversations = [messages] if messages and isinstance(messages[0], Mapping) else messages
        for i, conversation in enumerate(conversations):
            expect(_is_list(conversation), f"messages[{i}]", "a message, or a list of them", conversation)
        return [
            self.chat_request(str(i), conversation, params, tools=tools, **options)  # type: ignore[arg-type]
            for i, (conversation, params) in enumerate(
                zip(conversations, _each(sampling_params, len(conversations)), strict=True)
            )
        ]

    def check(self, request: Request) -> None:
        """Raises UsageError for a request that can never run, as `LLM.stream` does before it starts any request."""
        self.engine.check(request.prompt_token_ids, request.params, request.scope)


class _Running:
    """Requests that run together, and what has become of them; their events arrive in one inbox."""

    def __init__(self, model: _Model, requests: list[Request], inbox: Inbox) -> None:
        self._model = model
        self._states: dict[str, _RunningRequest] = {}
        seen = set[str]()
        for request in requests:
            if request.request_id in seen:
                raise UsageError(f"{request.request_id!r} is used twice", "request_id")
            seen.add(request.request_id)
            with named(f"request {request.request_id}"):
                model.check(request)
        try:
            for request in requests:
                state = _RunningRequest(request, model.tokenizer)
                name = model.worker.submit(
                    request.prompt_token_ids,
                    request.params,
                    inbox,
                    request.scope,
                    priority=request.priority,
                    timeout=request.timeout,
                )
                self._states[name] = state
        except BaseException:
            self.abort()
            raise

    def __bool__(self) -> bool:
        """Whether any is unfinished."""
        return bool(self._states)

    def advance(self, events: list[TokenEvent], each: bool) -> Iterator[Progress]:
        """The progress that each event makes, or all events of a completion together.

        Raises the error of a request that failed.
        """
        for own in _one_by_one(events) if each else by_completion(events):
            name, index = own[0].request_id, own[0].index
            if (state := self._states.get(name)) is None:
                continue
            if (error := own[-1].error) is not None:
                del self._states[name]
                raise _failure(state.request, error)
            progress = state.push(own)
            if progress.completion.finish_reason and not own[-1].finish_reason:
                # The text reached a stop string, which the engine cannot detect.
                self._model.worker.abort(name, index)
            if progress.output.finished:
                del self._states[name]
            yield progress

    def abort(self, wait: bool = False) -> None:
        """Drop the requests that have not finished, and with `wait` return once they have been dropped."""
        for name in self._states:
            self._model.worker.abort(name)
        if self._states and wait:
            with contextlib.suppress(EngineError):
                self._model.worker.call(lambda _: None)
        self._states.clear()


def _one_by_one(events: Iterable[TokenEvent]) -> Iterator[list[TokenEvent]]:
    return ([event] for event in events)


class LLM(_Model):
    """A model with its tokenizer and engine. Any number of threads may use it at once, and calls may be nested.

    Args:
      path, mesh, dtype, rules: as for `load_model`.
      engine: the engine options.
      kernels: "auto", "reference" or the name of a backend; see `EngineOptions`.
      warm_up: whether all programs of requests with plain sampling parameters are compiled at once, instead of when
        each is first needed.
      progress: shows or hides progress bars; None shows them.

    Raises CheckpointError or ShardingError if the model cannot be loaded, UsageError for unknown kernels.
    """

    def generate(
        self,
        prompts: str | Sequence[int] | Sequence[str] | Sequence[Sequence[int]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = False,
    ) -> list[RequestOutput]:
        """Continue prompts, given as text or as token ids, without any chat format.

        `sampling_params` is one object for all prompts or a list with one for each. Raises UsageError.
        """
        return self._run(self._prompts(prompts, sampling_params), use_tqdm)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        tools: Sequence[harmony.tools.Tool] | None = None,
        use_tqdm: bool = False,
        **options: Any,
    ) -> list[RequestOutput]:
        """Answer one conversation or several, given as OpenAI-style messages.

        `tools` are OpenAI tool objects or Python functions; `options` go to `harmony.render`: reasoning_effort,
        builtin_tools, model_identity, knowledge_cutoff, current_date (default: today), response_format and
        auto_drop_analysis; None is the default. `tool_choice` and `parallel_tool_calls` have OpenAI's values, and
        grammars enforce them, as they do the parameters of tools with `strict`. Each output's `message` is the
        assistant's next message, including its tool calls. Raises UsageError.
        """
        return self._run(self._conversations(messages, sampling_params, tools, options), use_tqdm)

    def stream(self, requests: Iterable[Request]) -> Iterator[Progress]:
        """Run requests together and yield the progress of each token as it is generated.

        Closing the iterator cancels the requests that are still running; a reader that is slow slows them. Raises
        UsageError for a request that can never run, before any request starts.
        """
        return self._stream(list(requests), each=True)

    def _stream(self, requests: list[Request], each: bool) -> Iterator[Progress]:
        inbox = Inbox(each=each)
        running = _Running(self, requests, inbox)
        try:
            while running:
                yield from running.advance(inbox.get(), each)
        except (Exception, GeneratorExit):
            running.abort(wait=True)
            raise
        finally:
            # An interrupt does not wait for the step, which may be compiling.
            running.abort()

    def _run(self, requests: list[Request], use_tqdm: bool) -> list[RequestOutput]:
        from tqdm import tqdm

        outputs: dict[str, RequestOutput] = {}
        with tqdm(total=len(requests), unit="request", file=sys.stderr, disable=not use_tqdm) as bar:
            for progress in self._stream(requests, _found_by_reader(requests)):
                outputs[progress.output.request_id] = progress.output
                bar.update(progress.output.finished)
        return [outputs[request.request_id] for request in requests]


class AsyncLLM(_Model):
    """`LLM` for asyncio: the same arguments, and methods to await or to use with `async for`."""

    async def generate(
        self,
        prompts: str | Sequence[int] | Sequence[str] | Sequence[Sequence[int]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """See LLM.generate; cancelling the task aborts the requests."""
        return await self._run(await asyncio.to_thread(self._prompts, prompts, sampling_params))

    async def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        tools: Sequence[harmony.tools.Tool] | None = None,
        **options: Any,
    ) -> list[RequestOutput]:
        """See LLM.chat; cancelling the task aborts the requests."""
        return await self._run(
            await asyncio.to_thread(self._conversations, messages, sampling_params, tools, options)
        )

    def stream(self, requests: Iterable[Request]) -> AsyncGenerator[Progress]:
        """See LLM.stream. Leaving the `async for` aborts the requests once the iterator is closed.

        Python closes an iterator that is left by `break` when it is collected, at the latest by the event loop; use
        `contextlib.aclosing` to close it at once.
        """
        return self._stream(list(requests), each=True)

    async def _stream(self, requests: list[Request], each: bool) -> AsyncGenerator[Progress]:
        loop, ready = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            # A loop that has ended has no readers.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(ready.set)

        inbox = Inbox(wake, each)
        running = _Running(self, requests, inbox)
        try:
            while running:
                await ready.wait()
                ready.clear()
                for progress in running.advance(inbox.get(0), each):
                    yield progress
        finally:
            running.abort()

    async def _run(self, requests: list[Request]) -> list[RequestOutput]:
        outputs = {}
        async with contextlib.aclosing(self._stream(requests, _found_by_reader(requests))) as stream:
            async for progress in stream:
                outputs[progress.output.request_id] = progress.output
        return [outputs[request.request_id] for request in requests]


def _found_by_reader(requests: list[Request]) -> bool:
    """Whether the reader may find the end of a request, by a stop string, and so has to read each event as it comes."""
    return any(request.params.stop for request in requests)


def _failure(request: Request, error: Exception) -> GptOssError:
    """The error of a request that the engine could not finish."""
    if isinstance(error, UsageError):
        return error
    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    failure = EngineError(f"request {request.request_id}: {reason}")
    failure.__cause__ = error
    return failure


class _RunningRequest:
    """The output of a running request, updated by its token events."""

    def __init__(self, request: Request, tokenizer: Tokenizer | None) -> None:
        self.request, n = request, request.params.n
        self._completions = [Completion(request, tokenizer) for _ in range(n)]
        self._transcripts = [_transcript(completion) for completion in self._completions]
        self._drafts = [(0, 0)] * n
        logged = request.params.logprobs is not None
        outputs = [
            CompletionOutput(i, [], transcript.text, [] if logged else None, None)
            for i, transcript in enumerate(self._transcripts)
        ]
        self._output = RequestOutput(request.request_id, request.prompt, request.prompt_token_ids, outputs, False)

    def push(self, events: list[TokenEvent]) -> Progress:
        """The progress that further events of one completion make; several at once if there are no stop strings."""
        last = events[-1]
        output, transcript = self._output.outputs[last.index], self._transcripts[last.index]
        if output.finish_reason:
            return Progress([], output, self._output)
        output.token_ids += [event.token_id for event in events]
        if output.logprobs is not None:
            output.logprobs += [event.logprobs for event in events if event.logprobs is not None]
        if events[0].prompt_logprobs is not None:
            self._output.prompt_logprobs = events[0].prompt_logprobs
        self._output.cached_tokens = max(self._output.cached_tokens, last.cached_tokens)
        if last.drafted:
            self._drafts[last.index] = last.drafted, last.accepted
            self._output.drafted_tokens, self._output.accepted_tokens = map(sum, zip(*self._drafts, strict=True))
        completion = self._completions[last.index]
        deltas = transcript.deltas(completion.push(events))
        if completion.finish_reason:
            output.text, output.message = transcript.text, transcript.message
            output.malformed = list(completion.turn.malformed)
            output.finish_reason = completion.finish_reason
            self._output.finished = all(c.finish_reason for c in self._output.outputs)
        return Progress(deltas, output, self._output)


def _transcript(completion: Completion) -> ChatTranscript | RawTranscript:
    turn = completion.turn
    return ChatTranscript(turn) if isinstance(turn, ChatItems) else RawTranscript(turn)


def _is_list(value: Any) -> bool:
    """Whether `value` is a sequence or an array, and not text."""
    if isinstance(value, np.ndarray):
        return value.ndim > 0
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _each(params: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    fine = _is_list(params) and all(isinstance(one, SamplingParams) for one in params)
    expect(fine, "sampling_params", "SamplingParams, or a list of them", params)
    if len(params) != count:
        raise UsageError(f"expected one or {count}, found {len(params)}", "sampling_params")
    return list(params)
