"""The Python API: `LLM` runs prompts or conversations and returns outputs like vLLM's."""

from __future__ import annotations

import dataclasses
import datetime
import numbers
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gptoss_jax.checkpoints.hub import resolve
from gptoss_jax.checkpoints.loading import EMBEDDED, load_model
from gptoss_jax.engine.engine import Engine, EngineOptions, TokenEvent
from gptoss_jax.errors import CheckpointError, EngineError, GptOssError, UsageError, expect
from gptoss_jax.runtime.compile_cache import enable_compile_cache
from gptoss_jax.text import harmony
from gptoss_jax.text.structured import GrammarCompiler
from gptoss_jax.text.tokenizer import Tokenizer
from gptoss_jax.text.transcripts import ChatTranscript, RawTranscript, TextDelta
from gptoss_jax.types import CompletionOutput, RequestOutput, SamplingParams, Scope, TokenLogprobs
from sharding import ShardingRules

Message = Mapping[str, Any]

_MARKS = ("<|start|>", "<|channel|>", "<|constrain|>", "<|message|>", "<|end|>", *harmony.STOP_TOKENS)
"""The special tokens of the harmony format; other stop tokens are not part of the text."""


_CHAT_OPTIONS = {
    "reasoning_effort",
    "builtin_tools",
    "model_identity",
    "knowledge_cutoff",
    "current_date",
    "response_format",
    "auto_drop_analysis",
}
"""The options of a conversation, besides its tools: those of `harmony.render` with which the assistant is next."""


@dataclasses.dataclass
class Request:
    """A tokenized prompt with its sampling parameters.

    `chat` parses the completion as harmony; `tools` then holds the names of the available tools. `scope` is the part of
    the completion that structured output constrains.
    """

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    chat: bool = False
    prompt: str | None = None
    scope: Scope = "text"
    tools: frozenset[str] | None = None


@dataclasses.dataclass
class Progress:
    """The effect of one token: the new text, its completion, and the output of the whole request so far."""

    deltas: list[TextDelta]
    completion: CompletionOutput
    output: RequestOutput


class LLM:
    """A model with its tokenizer and engine.

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
        self._path = path = resolve(path)
        self.tokenizer = Tokenizer.from_dir(path) if (path / "tokenizer.json").exists() else None
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
        self.engine = Engine(model, engine, eos_token_ids=eos, constrain=constrain)
        if warm_up:
            self.engine.warm_up(progress)

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
        expect(
            isinstance(prompts, str) or _is_list(prompts), "prompts", "text, token ids or a list of them", prompts
        )
        if isinstance(prompts, str) or (len(prompts) and isinstance(prompts[0], numbers.Integral)):
            prompts = [prompts]  # type: ignore[assignment]
        for i, prompt in enumerate(prompts):
            expect(isinstance(prompt, str) or _is_list(prompt), f"prompts[{i}]", "text or token ids", prompt)
        requests = [
            self.raw_request(str(i), prompt, params)  # type: ignore[arg-type]
            for i, (prompt, params) in enumerate(zip(prompts, _each(sampling_params, len(prompts)), strict=True))
        ]
        return self._run(requests, use_tqdm)

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
        auto_drop_analysis; None is the default. Each output's `message` is the assistant's next message, including its
        tool calls. Raises UsageError.
        """
        for name in options.keys() - _CHAT_OPTIONS:
            raise TypeError(f"LLM.chat() got an unexpected keyword argument {name!r}")
        expect(_is_list(messages), "messages", "a list of messages, or of such lists", messages)
        conversations = [messages] if messages and isinstance(messages[0], Mapping) else messages
        for i, conversation in enumerate(conversations):
            expect(_is_list(conversation), f"messages[{i}]", "a message, or a list of them", conversation)
        requests = [
            self.chat_request(str(i), conversation, params, tools=tools, **options)  # type: ignore[arg-type]
            for i, (conversation, params) in enumerate(
                zip(conversations, _each(sampling_params, len(conversations)), strict=True)
            )
        ]
        return self._run(requests, use_tqdm)

    def raw_request(self, request_id: str, prompt: str | Sequence[int], params: SamplingParams) -> Request:
        """A request that continues text or token ids. Raises UsageError."""
        if params.stop:
            self._need_tokenizer("stop strings")
        if isinstance(prompt, str):
            return Request(request_id, self._need_tokenizer("text").encode(prompt), params, prompt=prompt)
        return Request(request_id, list(prompt), params)

    def chat_request(
        self, request_id: str, messages: Sequence[Message], params: SamplingParams, **options: Any
    ) -> Request:
        """A request for the assistant's next message; `options` as for `chat`. Raises UsageError."""
        tokenizer = self._need_tokenizer("conversations")
        if not messages:
            raise UsageError("expected at least one", "messages")
        options = {name: value for name, value in options.items() if value is not None}
        options.setdefault("current_date", datetime.date.today().isoformat())
        scope: Scope = "final or call" if options.get("tools") or options.get("builtin_tools") else "final"
        prompt = harmony.render(messages, tokenizer, **options)
        tools = harmony.tool_names(options.get("tools"), options.get("builtin_tools", ()))
        return Request(request_id, prompt, params, chat=True, scope=scope, tools=tools)

    def check(self, request: Request) -> None:
        """Raises UsageError for a request that can never run, as `stream` does before it starts any request."""
        self.engine.check(request.prompt_token_ids, request.params, request.scope)

    def _need_tokenizer(self, purpose: str) -> Tokenizer:
        if self.tokenizer is None:
            raise UsageError(
                f"no such file, so {purpose} cannot be used; pass token ids (generate --prompt-tokens)",
                where=str(self._path / "tokenizer.json"),
            )
        return self.tokenizer

    def stream(self, requests: Iterable[Request]) -> Iterator[Progress]:
        """Run requests together and yield the progress of each token as it is generated.

        Closing the iterator cancels the requests that are still running. Raises UsageError for a request that can
        never run, before any request starts.
        """
        running: dict[str, _RunningRequest] = {}
        try:
            for request in requests:
                if request.request_id in running:
                    raise UsageError(f"{request.request_id!r} is used twice", "request_id")
                self.engine.add(request.request_id, request.prompt_token_ids, request.params, request.scope)
                running[request.request_id] = _RunningRequest(request, self.tokenizer)
            while running:
                for event in self.engine.step():
                    if (state := running.get(event.request_id)) is None:
                        continue
                    if event.error is not None:
                        del running[event.request_id]
                        raise _failure(event)
                    progress = state.push(event)
                    if progress.completion.finish_reason and not event.finish_reason:
                        # The text reached a stop string, which the engine cannot detect.
                        self.engine.stop(event.request_id, event.index)
                    if progress.output.finished:
                        del running[event.request_id]
                    yield progress
        finally:
            for request_id in running:
                self.engine.cancel(request_id)

    def _run(self, requests: list[Request], use_tqdm: bool) -> list[RequestOutput]:
        from tqdm import tqdm

        outputs: dict[str, RequestOutput] = {}
        with tqdm(total=len(requests), unit="request", file=sys.stderr, disable=not use_tqdm) as bar:
            for progress in self.stream(requests):
                outputs[progress.output.request_id] = progress.output
                bar.update(progress.output.finished)
        return [outputs[request.request_id] for request in requests]


def _failure(event: TokenEvent) -> GptOssError:
    """The error of a request that the engine could not finish."""
    if isinstance(event.error, GptOssError):
        return event.error
    reason = str(event.error).strip().partition("\n")[0] or type(event.error).__name__
    failure = EngineError(f"request {event.request_id}: {reason}")
    failure.__cause__ = event.error
    return failure


class _RunningRequest:
    """The output of a running request, updated by its token events."""

    def __init__(self, request: Request, tokenizer: Tokenizer | None) -> None:
        self._params = request.params
        special = tokenizer.special_tokens if tokenizer and request.chat else {}
        self._marks = {special[name] for name in _MARKS if name in special}
        self._transcripts: list[ChatTranscript | RawTranscript] = []
        self._drafts = [(0, 0)] * request.params.n
        completions = []
        for index in range(request.params.n):
            self._transcripts.append(_transcript(request, tokenizer))
            logprobs: list[TokenLogprobs] | None = None if request.params.logprobs is None else []
            completions.append(CompletionOutput(index, [], self._transcripts[index].text, logprobs, None))
        self._output = RequestOutput(
            request.request_id, request.prompt, request.prompt_token_ids, completions, False
        )

    def push(self, event: TokenEvent) -> Progress:
        completion, transcript = self._output.outputs[event.index], self._transcripts[event.index]
        if completion.finish_reason:
            return Progress([], completion, self._output)
        completion.token_ids.append(event.token_id)
        if completion.logprobs is not None and event.logprobs is not None:
            completion.logprobs.append(event.logprobs)
        if event.prompt_logprobs is not None:
            self._output.prompt_logprobs = event.prompt_logprobs
        self._output.cached_tokens = max(self._output.cached_tokens, event.cached_tokens)
        self._drafts[event.index] = event.drafted, event.accepted
        self._output.drafted_tokens, self._output.accepted_tokens = map(sum, zip(*self._drafts, strict=True))
        may_stop = len(completion.token_ids) >= self._params.min_tokens
        unseen = event.finish_reason == "stop" and event.token_id not in self._marks
        deltas = [] if unseen else transcript.push(event.token_id, may_stop)
        finish = "stop" if transcript.stopped else event.finish_reason
        if finish:
            deltas += transcript.finish()
            completion.text = transcript.text
            completion.message, completion.malformed = transcript.message, list(transcript.malformed)
            called = finish == "stop" and completion.message and completion.message.get("tool_calls")
            completion.finish_reason = "tool_calls" if called else finish
            self._output.finished = all(c.finish_reason for c in self._output.outputs)
        return Progress(deltas, completion, self._output)


def _transcript(request: Request, tokenizer: Tokenizer | None) -> ChatTranscript | RawTranscript:
    if not request.chat:
        return RawTranscript(tokenizer, request.params.stop)
    assert tokenizer is not None
    return ChatTranscript(tokenizer, request.params.stop, request.tools)


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
