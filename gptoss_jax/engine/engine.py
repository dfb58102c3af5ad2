"""The engine: generates the tokens of many requests at once, with continuous batching."""

from __future__ import annotations

import dataclasses
import numbers
import os
import secrets
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from gptoss_jax.engine.compiling import as_in_this_thread, collected_once
from gptoss_jax.engine.drafts import Drafter, PromptLookup
from gptoss_jax.engine.memory import cache_budget, cache_shape, kv_dtype
from gptoss_jax.engine.pace import Pace
from gptoss_jax.engine.runner import Launched, Runner, needs_adjusting
from gptoss_jax.engine.scheduler import Limits, NeedsDrain, Scheduler, Sequence
from gptoss_jax.engine.step import Logprobs, StepShape
from gptoss_jax.errors import UsageError, expect, named
from gptoss_jax.model.gpt_oss import GptOss
from gptoss_jax.types import (
    ConstraintFactory,
    FinishReason,
    SamplingParams,
    Scope,
    TokenConstraint,
    TokenLogprobs,
    is_int,
    is_number,
)
from pallas_kernels import backend_names, backend_platforms, current_platform

COMPILERS = 8
"""The most step shapes compiled concurrently."""

HARDWARE = {"cpu": "CPUs", "cuda": "NVIDIA GPUs", "rocm": "AMD GPUs", "tpu": "TPUs"}
"""Names of pallas_kernels' platforms for error messages."""


_COUNTS = (
    "max_num_seqs",
    "max_model_len",
    "page_size",
    "long_prefill_token_threshold",
    "max_num_batched_tokens",
    "num_decode_steps",
)


@dataclasses.dataclass(frozen=True)
class EngineOptions:
    """Options of the engine, named as in vLLM where it has them. Raises UsageError, naming the invalid field.

    Args:
      max_num_seqs: maximum number of concurrent sequences, over the whole mesh.
      max_model_len: maximum length of a request, prompt and output, in tokens. None for the model's context length.
      page_size: tokens per page of the KV cache.
      kv_cache_memory: size of the KV cache on each device, in bytes.
      gpu_memory_utilization: fraction of the memory that JAX may allocate on each device for weights and KV cache
        together; the rest is for a step's temporaries. If neither this nor `kv_cache_memory` is set, the cache takes
        0.85 of the memory that the weights leave free.
      kv_cache_dtype: "bfloat16", "float32" or "float8"; None for the model's dtype.
      long_prefill_token_threshold: maximum number of prompt tokens of one sequence in a step. None for 2048 on
        accelerators and 512 on CPUs.
      max_num_batched_tokens: maximum number of prompt tokens of all sequences in a step. None for the larger of
        `long_prefill_token_threshold` and its default.
      enable_prefix_caching: whether prompts reuse the cached keys and values of earlier prompts with the same prefix.
      num_speculative_tokens: tokens drafted and verified per step and sequence; 0 disables speculative decoding.
      num_decode_steps: decode steps per launch when no prompts are being computed (multi-step decode), so that the
        host keeps up with a fast device; this many tokens are then returned at a time. None for 4 on accelerators and
        1 on CPUs.
      kernels: backend of the model's ops: "auto" for the platform's kernels, "reference" for plain JAX, or the name of
        a backend, which is used for the ops that have it.
    """

    max_num_seqs: int = 8
    max_model_len: int | None = None
    page_size: int = 32
    kv_cache_memory: int | None = None
    gpu_memory_utilization: float | None = None
    kv_cache_dtype: str | None = None
    long_prefill_token_threshold: int | None = None
    max_num_batched_tokens: int | None = None
    enable_prefix_caching: bool = True
    num_speculative_tokens: int = 0
    num_decode_steps: int | None = None
    kernels: str = "auto"

    def __post_init__(self) -> None:
        for name in _COUNTS:
            value, default = getattr(self, name), getattr(EngineOptions, name)
            expect((value is default is None) or is_int(value, 1), name, "an integer from 1, below 2**31", value)
        self._check_memory()
        caching, drafts = self.enable_prefix_caching, self.num_speculative_tokens
        expect(isinstance(caching, bool), "enable_prefix_caching", "True or False", caching)
        expect(is_int(drafts, 0, 64), "num_speculative_tokens", "an integer from 0 to 64", drafts)
        expect(self.kernels in backend_names(), "kernels", ", ".join(backend_names()), self.kernels)
        platforms = backend_platforms(self.kernels)
        if platforms and (here := current_platform()) not in platforms:
            of = " and ".join(HARDWARE[platform] for platform in sorted(platforms))
            raise UsageError(f"{self.kernels} is for {of}, found the platform {here}", "kernels")

    def _check_memory(self) -> None:
        memory, share = self.kv_cache_memory, self.gpu_memory_utilization
        expect(memory is None or is_int(memory, 1, 2**63), "kv_cache_memory", "bytes from 1 to 2**63", memory)
        fine = share is None or (is_number(share, 0, 1) and share > 0)
        expect(fine, "gpu_memory_utilization", "a number above 0, at most 1", share)
        if memory is not None and share is not None:
            raise UsageError("expected this or kv_cache_memory, found both", "gpu_memory_utilization")
        if self.kv_cache_dtype is not None:
            kv_dtype(self.kv_cache_dtype)


@dataclasses.dataclass
class TokenEvent:
    """A new token of completion `index` of a request.

    `prompt_logprobs` come with the first token, and `finish_reason` with the last. `cached_tokens` is the number of
    prompt tokens found in the prefix cache. `drafted` and `accepted` count the sequence's drafts so far.
    """

    request_id: str
    index: int
    token_id: int
    logprobs: TokenLogprobs | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    finish_reason: FinishReason | None = None
    cached_tokens: int = 0
    drafted: int = 0
    accepted: int = 0


@dataclasses.dataclass
class Load:
    """The engine's current load and its counters since the start, summed over all data-parallel ranks.

    Args:
      waiting: sequences that wait to be admitted.
      running: sequences that are being computed.
      pages_used: pages of the KV cache held by running sequences.
      pages: all pages of the KV cache.
      preemptions: how often a running sequence was preempted.
      steps: steps launched.
      launches: launches, each of one or more steps.
      idle_launches: launches that came after the device had finished the previous one, and so had waited for the host.
      drafted: tokens drafted by speculative decoding.
      accepted: drafts accepted.
      programs_compiled: step programs compiled.
    """

    waiting: int
    running: int
    pages_used: int
    pages: int
    preemptions: int
    steps: int
    launches: int
    idle_launches: int
    drafted: int
    accepted: int
    programs_compiled: int


class Engine:
    """Generates tokens for requests: `add` them, call `step` until they have finished, `cancel` them at any time.

    Not thread-safe.

    Args:
      model: the model.
      options: see EngineOptions.
      eos_token_ids: tokens that end a request; None for those of the model's config.
      drafter: proposes the drafts of speculative decoding; None for prompt lookup.
      constrain: makes the constraints of structured output; without it such requests are rejected.

    Raises:
      UsageError: if `max_model_len` exceeds the model's context, or the cache does not fit in memory.
    """

    def __init__(
        self,
        model: GptOss,
        options: EngineOptions | None = None,
        *,
        eos_token_ids: Iterable[int] | None = None,
        drafter: Drafter | None = None,
        constrain: ConstraintFactory | None = None,
    ) -> None:
        options = options or EngineOptions()
        self.config, self.options = model.config, options
        self.max_model_len = options.max_model_len or model.config.max_position_embeddings
        longest = model.config.max_position_embeddings
        fits = self.max_model_len <= longest
        expect(fits, "max_model_len", f"at most the model's {longest}", self.max_model_len)
        self._eos = frozenset(model.config.eos_token_id if eos_token_ids is None else eos_token_ids)
        parts = model.partition.degree("batch")
        dtype = kv_dtype(options.kv_cache_dtype or str(model.embed_tokens[...].dtype))
        device = model.partition.mesh.local_devices[0] if model.partition.mesh else jax.local_devices()[0]
        self.pace = Pace.of(
            device.platform,
            options.long_prefill_token_threshold,
            options.max_num_batched_tokens,
            options.num_decode_steps,
        )
        self.shape = cache_shape(
            model.config,
            model.partition,
            cache_budget(device, options.kv_cache_memory, options.gpu_memory_utilization),
            slots=-(-options.max_num_seqs // parts),
            max_model_len=self.max_model_len,
            page_size=options.page_size,
            dtype=dtype,
            enable_prefix_caching=options.enable_prefix_caching,
            ring_slack=options.num_speculative_tokens,
        )
        max_num_batched_tokens = max(self.pace.max_num_batched_tokens // parts, 1)
        self._limits = Limits(
            self.shape.slots,
            self.shape.pages,
            options.page_size,
            self.shape.snapshots,
            max_num_batched_tokens,
            min(self.pace.long_prefill_token_threshold, max_num_batched_tokens),
            options.enable_prefix_caching,
        )
        self._scheduler = Scheduler(self._limits, parts)
        self._runner = Runner(
            model,
            self.shape,
            self._limits,
            self.pace,
            self.max_model_len,
            dtype,
            options.num_speculative_tokens,
            self._eos,
            options.kernels,
        )
        self._drafter = drafter or PromptLookup()
        self._constrain = constrain
        self._sequences: dict[str, list[Sequence]] = {}
        self._constraints: dict[Sequence, TokenConstraint] = {}
        self._prompt_logprobs: dict[Sequence, list[TokenLogprobs | None]] = {}
        self._in_flight: Launched | None = None
        self._steps = self._launches = self._idle_launches = self._drafted = self._accepted = 0

    @property
    def unfinished(self) -> int:
        """The number of requests that are waiting or running."""
        return len(self._sequences)

    @property
    def load(self) -> Load:
        """The current load and counters."""
        parts = self._scheduler.parts
        return Load(
            len(self._scheduler.waiting),
            sum(len(part.running) for part in parts),
            sum(part.prefixes.pages.held for part in parts),
            sum(part.prefixes.pages.size for part in parts),
            sum(part.preemptions for part in parts),
            self._steps,
            self._launches,
            self._idle_launches,
            self._drafted,
            self._accepted,
            self._runner.compiled,
        )

    def add(
        self,
        request_id: str,
        prompt_token_ids: Iterable[int],
        params: SamplingParams,
        scope: Scope = "text",
    ) -> None:
        """Queue a request; `scope` is the part of its text that `params.structured_outputs` applies to.

        Raises UsageError, with the numbers, for a request that can never run or whose id is in use.
        """
        if request_id in self._sequences:
            raise UsageError(f"{request_id!r} is already running", "request_id")
        with named(f"request {request_id}"):
            prompt, max_tokens, constraints = self._admit(prompt_token_ids, params, scope)
        seed = secrets.randbits(64) if params.seed is None else params.seed
        sequences = [
            Sequence(request_id, i, prompt.astype(np.int32), params, max_tokens, (seed + i) % 2**64)
            for i in range(params.n)
        ]
        for sequence in sequences:
            sequence.leader = sequences[0] if sequence.index and self.options.enable_prefix_caching else None
            self._scheduler.add(sequence)
        self._constraints |= zip(sequences, constraints, strict=False)
        self._sequences[request_id] = sequences

    def check(self, prompt_token_ids: Iterable[int], params: SamplingParams, scope: Scope = "text") -> None:
        """Raise UsageError for a request that `add` would reject, without queueing it."""
        self._admit(prompt_token_ids, params, scope)

    def _admit(
        self, prompt_token_ids: Iterable[int], params: SamplingParams, scope: Scope
    ) -> tuple[np.ndarray, int, list[TokenConstraint]]:
        """A request's prompt, the most tokens that it may generate, and its completions' constraints."""
        prompt = self._read_prompt(prompt_token_ids)
        return prompt, self._room(prompt, params), self._constraints_of(params, scope)

    def _read_prompt(self, tokens: Iterable[int]) -> np.ndarray:
        tokens, vocab = list(tokens), self.config.vocab_size
        if not tokens:
            raise UsageError("expected at least one token, found none", "prompt")
        for token in tokens:
            is_id = isinstance(token, numbers.Integral) and not isinstance(token, bool)
            expect(is_id, "prompt", "token ids", token)
            if not 0 <= int(token) < vocab:
                raise UsageError(f"token {token!s:.30} is outside the vocabulary of {vocab}", "prompt")
        return np.asarray(tokens, np.int64)

    def _room(self, prompt: np.ndarray, params: SamplingParams) -> int:
        """The most tokens that the request may generate."""
        vocab, context = self.config.vocab_size, self.max_model_len
        for name, tokens in (("logit_bias", params.logit_bias or {}), ("stop_token_ids", params.stop_token_ids)):
            for token in tokens:
                if token >= vocab:
                    raise UsageError(f"token {token} is outside the vocabulary of {vocab}", name)
        held = self.shape.pages * self.shape.page_size - self.options.num_speculative_tokens
        limit = "max_model_len" if self.options.max_model_len else "the model's context"
        for room, what in ((context, limit), (held, "the KV cache")):
            if prompt.size + (params.max_tokens or 1) > room:
                name = "max_tokens" if prompt.size < room else "prompt"
                raise UsageError(
                    f"{prompt.size} prompt tokens and {params.max_tokens or 1} new tokens exceed {what} of {room}",
                    name,
                )
        return params.max_tokens or min(context, held) - prompt.size

    def _constraints_of(self, params: SamplingParams, scope: Scope) -> list[TokenConstraint]:
        """One for each of the request's completions; none for free ones."""
        if params.structured_outputs is None:
            return []
        if self._constrain is None:
            raise UsageError("the checkpoint has no tokenizer.json", "structured_outputs")
        return [self._constrain(params.structured_outputs, scope) for _ in range(params.n)]

    def cancel(self, request_id: str) -> bool:
        """Drop a waiting or running request and free its memory; returns False for an unknown id."""
        sequences = self._sequences.pop(request_id, [])
        for sequence in sequences:
            self._forget(sequence)
        return bool(sequences)

    def _forget(self, sequence: Sequence) -> None:
        self._scheduler.remove(sequence)
        self._constraints.pop(sequence, None)
        self._prompt_logprobs.pop(sequence, None)

    def step(self) -> list[TokenEvent]:
        """Launch the next step, then read back the previous one, so that the device does not wait for the host.

        With constrained sequences, the forward pass is launched first; sampling follows once the previous step's
        tokens, and thus the masks, are known. On return the whole step has been launched.

        Returns the tokens read back; none while the first step is in flight.
        """
        launched = self._launch()
        events = self._read()
        if launched:
            self._runner.choose(launched, self._constraints)
            self._in_flight = launched
        return self._read() if launched and self._must_wait() else events

    def _must_wait(self) -> bool:
        """Whether the next step's pass depends on how many tokens the last one has sampled."""
        return self.options.num_speculative_tokens > 0

    def _launch(self) -> Launched | None:
        if self._in_flight and self._must_wait():
            return None
        if self._must_wait():
            self._draft()
        try:
            plans = self._scheduler.plan(draining=self._in_flight is None)
        except NeedsDrain:
            return None
        if not any(plan.decodes or plan.chunks for plan in plans):
            return None
        one = self._must_wait() or any(sequence.part >= 0 for sequence in self._constraints)
        rounds = 1 if one else self._scheduler.rounds(plans, self.pace.num_decode_steps)
        self._idle_launches += self._in_flight is not None and self._in_flight.done
        self._launches += 1
        launched = self._runner.launch(plans, self._constraints, rounds)
        self._steps += launched.kind.rounds
        for plan in plans:
            for sequence in plan.decodes:
                sequence.ahead += launched.kind.rounds
            for chunk in plan.chunks:
                chunk.sequence.ahead += chunk.finishing
        return launched

    def _draft(self) -> None:
        for part in self._scheduler.parts:
            for sequence in part.running:
                most = min(self.options.num_speculative_tokens, sequence.max_tokens - sequence.generated - 1)
                exact = not needs_adjusting(sequence) and sequence not in self._constraints
                able = sequence.prefilled and exact and most > 0
                sequence.drafts = self._drafter.propose(sequence.known, most) if able else []

    def _read(self) -> list[TokenEvent]:
        launched, self._in_flight = self._in_flight, None
        if launched is None:
            return []
        outputs = jax.device_get(launched.outputs)
        events: list[TokenEvent] = []
        for part, rows in enumerate(launched.decodes):
            for row, (sequence, epoch) in enumerate(rows):
                accepted = int(outputs.accepted[part, row])
                if sequence.epoch == epoch:
                    sequence.ahead -= launched.kind.rounds
                    # Without guesses the row holds the tokens of several rounds.
                    right = accepted if launched.kind.drafts else 0
                    sequence.drafted += len(sequence.drafts)
                    sequence.accepted += right
                    self._drafted += len(sequence.drafts)
                    self._accepted += right
                for i, token in enumerate(outputs.decoded[part, row, : 1 + accepted].tolist()):
                    if sequence.epoch == epoch:
                        events.append(self._token(sequence, token, outputs.decode_logprobs, (part, row, i)))
        for part, chunks in enumerate(launched.chunks):
            for row, (sequence, epoch, start, stop, finishing) in enumerate(chunks):
                if sequence.epoch != epoch:
                    continue
                if sequence.params.prompt_logprobs is not None and not sequence.tokens:
                    assert outputs.prompt_logprobs is not None
                    self._keep_prompt_logprobs(sequence, outputs.prompt_logprobs, part, row, start, stop)
                if finishing:
                    sequence.ahead -= 1
                    token = int(outputs.first[part, row])
                    events.append(self._token(sequence, token, outputs.first_logprobs, (part, row)))
        return events

    def _token(self, sequence: Sequence, token: int, logprobs: Logprobs | None, at: tuple[int, ...]) -> TokenEvent:
        params = sequence.params
        sequence.tokens.append(token)
        if sequence in self._constraints:
            self._constraints[sequence].accept(token)
        stops = token in params.stop_token_ids or (token in self._eos and not params.ignore_eos)
        finish: FinishReason | None = None
        if stops:
            finish = "stop"
        elif len(sequence.tokens) >= sequence.max_tokens:
            finish = "length"
        event = TokenEvent(
            sequence.request_id,
            sequence.index,
            token,
            _token_logprobs(token, logprobs, at, params.logprobs),
            self._prompt_logprobs.pop(sequence, None),
            finish,
            sequence.prefix_hits,
            sequence.drafted,
            sequence.accepted,
        )
        if finish:
            self._finish(sequence)
        return event

    def _finish(self, sequence: Sequence) -> None:
        self._forget(sequence)
        siblings = self._sequences[sequence.request_id]
        siblings.remove(sequence)
        if not siblings:
            del self._sequences[sequence.request_id]

    def stop(self, request_id: str, index: int) -> None:
        """Drop one completion of a request."""
        for sequence in self._sequences.get(request_id, []):
            if sequence.index == index:
                self._finish(sequence)
                return

    def _keep_prompt_logprobs(
        self, sequence: Sequence, logprobs: Logprobs, part: int, row: int, start: int, stop: int
    ) -> None:
        kept = self._prompt_logprobs.setdefault(sequence, [None])
        # A preempted sequence computes its prompt again.
        del kept[start + 1 :]
        for position in range(start, min(stop, len(sequence.prompt) - 1)):
            token = int(sequence.prompt[position + 1])
            at = (part, row, position - start)
            kept.append(_token_logprobs(token, logprobs, at, sequence.params.prompt_logprobs))

    def replay(self, steps: int) -> float:
        """Seconds per step when the last launch is repeated for about `steps` steps, without other work on the host.

        The time is measured between the ends of launches, with the next launch already queued. This corrupts running
        requests, which must be cancelled afterwards; it is meant for benchmarks.
        """
        return self._runner.replay(steps)

    def program(self) -> tuple[str, int]:
        """The compiled HLO text of the last launch, and the number of its decode steps."""
        return self._runner.program()

    def warm_up(self, progress: bool | None = None, rehearse: Callable[[], object] | None = None) -> int:
        """Compile all step shapes that plain requests can need; returns their number.

        Plain requests ask for no log-probabilities, penalties, biases or constraints; step shapes with these compile
        on first use. With `rehearse`, only the step shapes that it uses are compiled, including those with
        log-probabilities of new tokens (it must not ask for prompt log-probabilities). `rehearse` adds requests and
        calls `step` until they have finished; meanwhile nothing is computed, and all tokens are 0. `progress` shows
        or hides the progress bar; None shows it. Raises UsageError if requests are unfinished before or after.
        """
        from tqdm import tqdm

        kinds = list(self._runner.kinds()) if rehearse is None else self._rehearsed(rehearse)
        # Without a terminal, the bar is printed as a line every 10 seconds.
        often = 0.1 if sys.stderr.isatty() else 10
        # Several processes must compile in the same order, since their compilers may wait for each other.
        workers = min(COMPILERS, os.cpu_count() or 1) if jax.process_count() == 1 else 1
        with (
            collected_once(),
            tqdm(
                total=len(kinds),
                desc="Compiling step shapes",
                file=sys.stderr,
                mininterval=often,
                disable=progress is False,
            ) as bar,
            ThreadPoolExecutor(workers) as pool,
        ):
            for _ in pool.map(as_in_this_thread(self._runner.compile), kinds):
                bar.update()
            if self.options.enable_prefix_caching:
                self._runner.compile_restores()
        return len(kinds)

    def _rehearsed(self, rehearse: Callable[[], object]) -> list[StepShape]:
        expect(not self.unfinished, "rehearse", "no unfinished requests before it", self.unfinished)
        with self._runner.rehearsal() as kinds:
            rehearse()
        expect(not self.unfinished, "rehearse", "no unfinished requests after it", self.unfinished)
        # The rehearsal's prompts were not computed, so they must not be in the prefix cache.
        self._scheduler = Scheduler(self._limits, self._runner.parts)
        return [kind for kind in kinds if not kind.adjusted]


def _token_logprobs(token: int, logprobs: Any, at: tuple[int, ...], top: int | None) -> TokenLogprobs | None:
    if top is None or logprobs is None:
        return None
    ids, values = logprobs.top_ids[at][:top].tolist(), logprobs.top[at][:top].tolist()
    return TokenLogprobs(token, float(logprobs.chosen[at]), dict(zip(ids, values, strict=True)))
