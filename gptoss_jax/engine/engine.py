"""The engine: generates the tokens of many requests at once, with continuous batching."""

from __future__ import annotations

import dataclasses
import numbers
import os
import secrets
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from gptoss_jax.engine.compiling import as_in_this_thread, collected_once
from gptoss_jax.engine.drafts import Drafter, DrafterFactory, PromptLookup
from gptoss_jax.engine.inputs import SampledRow
from gptoss_jax.engine.interrupts import uninterrupted
from gptoss_jax.engine.memory import cache_budget, cache_shape, kv_dtype
from gptoss_jax.engine.options import EngineOptions
from gptoss_jax.engine.outputs import Load, TokenEvent
from gptoss_jax.engine.pace import FEW, Pace
from gptoss_jax.engine.runner import Launched, Runner
from gptoss_jax.engine.scheduler import Limits, Scheduler, Work
from gptoss_jax.engine.sequence import Sequence
from gptoss_jax.engine.step import Logprobs
from gptoss_jax.errors import UsageError, expect, named
from gptoss_jax.model.gpt_oss import GptOss
from gptoss_jax.types import (
    ConstraintFactory,
    FinishReason,
    SamplingParams,
    Scope,
    TokenConstraint,
    TokenLogprobs,
    is_constrained,
)

COMPILERS = 8
"""The most programs compiled concurrently."""


class Engine:
    """Generates tokens for requests: `add` them, call `step` until they have finished, `cancel` them at any time.

    A step is planned without changing anything, launched, and only then committed, so that one that fails or is
    interrupted concerns its own requests alone. Not thread-safe.

    Args:
      model: the model.
      options: see EngineOptions.
      eos_token_ids: tokens that end a request; None for those of the model's config.
      drafter: makes the drafters of speculative decoding; None for prompt lookup.
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
        drafter: DrafterFactory | None = None,
        constrain: ConstraintFactory | None = None,
    ) -> None:
        options = options or EngineOptions()
        self.config, self.options = model.config, options
        self.max_model_len = options.max_model_len or model.config.max_position_embeddings
        longest = model.config.max_position_embeddings
        fits = self.max_model_len <= longest
        expect(fits, "max_model_len", f"at most the model's {longest}", self.max_model_len)
        self._eos = frozenset(model.config.eos_token_id if eos_token_ids is None else eos_token_ids)
        ranks = model.partition.degree("batch")
        dtype = kv_dtype(options.kv_cache_dtype or str(model.embed_tokens[...].dtype))
        device = model.partition.mesh.local_devices[0] if model.partition.mesh else jax.local_devices()[0]
        slots, drafts = -(-options.max_num_seqs // ranks), options.num_speculative_tokens
        self.pace = Pace.of(
            device.platform,
            options.long_prefill_token_threshold,
            options.max_num_batched_tokens,
            options.num_decode_steps,
            slots,
            drafts,
            ranks,
        )
        self.shape = cache_shape(
            model.config,
            model.partition,
            cache_budget(device, options.kv_cache_memory, options.gpu_memory_utilization),
            slots=slots,
            max_model_len=self.max_model_len,
            page_size=options.page_size,
            dtype=dtype,
            step_tokens=self.pace.token_sizes[-1],
            ahead=max(self.pace.num_decode_steps, 1 + drafts),
            enable_prefix_caching=options.enable_prefix_caching,
        )
        self._scheduler = Scheduler(self._limits(), ranks)
        self._runner = Runner(model, self.shape, self.pace, dtype, self._eos, options.kernels)
        self._make_drafter: DrafterFactory = drafter or PromptLookup
        self._constrain = constrain
        self._sequences: dict[str, list[Sequence]] = {}
        self._drafters: dict[Sequence, Drafter] = {}
        self._constraints: dict[Sequence, TokenConstraint] = {}
        self._prompt_logprobs: dict[Sequence, list[TokenLogprobs | None]] = {}
        self._flying: deque[Launched] = deque()
        self._events: list[TokenEvent] = []
        # Processes that repeat each other's steps cannot fail one by one.
        mesh = model.partition.mesh
        self._several = mesh is not None and mesh.is_multi_process
        self.agree: Callable[[str], object] | None = None
        """Over several processes: raises an error unless the others have failed in the same way; None raises always."""
        self._load = Load()
        self._compiled_before = 0
        self._read_at = 0.0

    def _limits(self) -> Limits:
        """What bounds the scheduler's plans."""
        pace = self.pace
        return Limits(
            cache=self.shape,
            window=self.config.sliding_window,
            tokens=pace.token_sizes[-1],
            sizes=pace.token_sizes,
            chunk=pace.long_prefill_token_threshold,
            rows=pace.row_sizes[-1],
            decode_steps=pace.num_decode_steps,
            few=FEW,
            decodes=max(pace.decode_sizes, default=0),
            caching=self.options.enable_prefix_caching,
        )

    @property
    def unfinished(self) -> int:
        """The number of requests that are waiting or running."""
        return len(self._sequences)

    @property
    def failures(self) -> int:
        """How often the device failed."""
        return self._load.failures

    @property
    def programs(self) -> int:
        """How many programs have been compiled."""
        return self._runner.programs

    @property
    def busy(self) -> bool:
        """Whether `step` has anything to do; it has not if all requests are on hold."""
        scheduler = self._scheduler
        return bool(self._flying or self._events or scheduler.waiting or any(r.running for r in scheduler.ranks))

    @property
    def load(self) -> Load:
        """The current load and counters."""
        scheduler, programs = self._scheduler, self._runner.programs
        return dataclasses.replace(
            self._load,
            waiting=len(scheduler.waiting),
            running=sum(len(rank.running) for rank in scheduler.ranks),
            pages_used=sum(rank.pages.held for rank in scheduler.ranks),
            pages=sum(rank.pages.size for rank in scheduler.ranks),
            sliding_pages_used=sum(rank.sliding.held for rank in scheduler.ranks),
            sliding_pages=sum(rank.sliding.size for rank in scheduler.ranks),
            hit_tokens=scheduler.hit_tokens,
            preemptions=scheduler.preemptions,
            programs=programs,
            compiled_after_warm_up=programs - self._compiled_before,
        )

    def add(
        self,
        request_id: str,
        prompt_token_ids: Iterable[int],
        params: SamplingParams,
        scope: Scope = "text",
        priority: int = 0,
    ) -> None:
        """Queue a request; `scope` is what `params.structured_outputs` applies to, and the tool calls that it allows.

        Requests of lower `priority` numbers are admitted first and preempted last, as in vLLM.
        Raises UsageError, with the numbers, for a request that can never run or whose id is in use.
        """
        if request_id in self._sequences:
            raise UsageError(f"{request_id!r} is already running", "request_id")
        with named(f"request {request_id}"):
            prompt, max_tokens, constraints = self._admit(prompt_token_ids, params, scope)
        seed = secrets.randbits(64) if params.seed is None else params.seed
        sequences = [
            Sequence(request_id, i, prompt, params, max_tokens, (seed + i) % 2**64, priority=priority)
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
        """The prompt's tokens, int32."""
        given = tokens if isinstance(tokens, np.ndarray) else list(tokens)
        if not len(given):
            raise UsageError("expected at least one token, found none", "prompt")
        array = np.asarray(given)
        if array.ndim != 1 or array.dtype.kind not in "iu" or any(type(token) is bool for token in given):
            for token in given:
                whole = isinstance(token, numbers.Integral) and not isinstance(token, bool)
                expect(whole, "prompt", "token ids", token)
            # Python's integers have no limit.
            array = np.asarray(given, object)
        outside = (array < 0) | (array >= self.config.vocab_size)
        if outside.any():
            token = given[int(outside.argmax())]
            raise UsageError(
                f"token {token!s:.30} is outside the vocabulary of {self.config.vocab_size}", "prompt"
            )
        return array.astype(np.int32)

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
        if not is_constrained(params.structured_outputs, scope):
            return []
        if self._constrain is None:
            raise UsageError("the checkpoint has no tokenizer.json", "structured_outputs")
        # Only a stop token can follow a complete call, as SamplingParams says of a complete answer.
        expect(not params.min_tokens, "min_tokens", "0 with a constraint on tool calls", params.min_tokens)
        expect(not params.ignore_eos, "ignore_eos", "false with a constraint on tool calls", params.ignore_eos)
        return [self._constrain(params.structured_outputs, scope) for _ in range(params.n)]

    def cancel(self, request_id: str) -> bool:
        """Drop a waiting or running request and free its memory; returns False for an unknown id."""
        sequences = self._sequences.pop(request_id, [])
        for sequence in sequences:
            self._forget(sequence)
        self._events = [event for event in self._events if event.request_id != request_id]
        return bool(sequences)

    def hold(self, request_id: str) -> None:
        """Compute no more of a request until `release`, and free its memory; what is cached of it stays."""
        for sequence in self._sequences.get(request_id, []):
            self._scheduler.remove(sequence)

    def release(self, request_id: str) -> None:
        """Go on with a request that was on hold."""
        for sequence in self._sequences.get(request_id, []):
            if sequence.rank < 0 and sequence not in self._scheduler.waiting:
                self._scheduler.queue(sequence)

    def _forget(self, sequence: Sequence) -> None:
        self._scheduler.remove(sequence)
        for kept in (self._constraints, self._prompt_logprobs, self._drafters):
            kept.pop(sequence, None)

    def step(self) -> list[TokenEvent]:
        """Launch the next step, then read back the previous one, so that the device does not wait for the host.

        With constrained sequences, the forward pass is launched first; sampling follows once the previous step's
        tokens, and thus the masks, are known. On return the whole step has been launched.

        Returns the tokens read back; none while the first step is in flight. Requests that fail end with an event that
        has the error. Raises only if the engine cannot go on.
        """
        launched = self._may_launch() and self._launch()
        while self._flying and (len(self._flying) > 1 or not launched or self._must_wait()):
            self._read()
        if self._flying:
            self._sample(self._flying[-1])
        # A process that exits while a launch is in flight may abort.
        while self._flying and not self._sequences:
            self._read()
        # What an interrupted call has not returned comes with the next one.
        events, self._events = self._events, []
        return events

    def _may_launch(self) -> bool:
        """Whether the next step can be planned: with at most one launch in flight, whose sampling has been started."""
        if not self._flying:
            return True
        return len(self._flying) == 1 and not self._must_wait() and not self._flying[0].awaits_constraints

    def _sample(self, launched: Launched) -> None:
        """Start the sampling of a launch that waited for its constraints."""
        if not launched.awaits_constraints:
            return
        failure = self._failure_of_sampling(launched, self._constraints)
        if failure is not None and self._runner.intact:
            # A constraint has failed, most likely; without the constrained requests nothing else is concerned.
            self._fail([s for s in self._constraints if s.rank >= 0], failure)
            failure = self._failure_of_sampling(launched, {})
        if failure is not None:
            self._recover(failure)

    def _failure_of_sampling(
        self, launched: Launched, constraints: dict[Sequence, TokenConstraint]
    ) -> Exception | None:
        """Start the sampling; the failure that all processes have seen, if there is one."""
        try:
            self._runner.sample(launched, constraints)
        except Exception as error:
            self._agree(error)
            return error
        return None

    def _must_wait(self) -> bool:
        """Whether the next step depends on how many tokens the last one has accepted."""
        return self.options.num_speculative_tokens > 0

    def _launch(self) -> bool:
        """Plan, launch and commit; whether there was anything to do that did not fail."""
        if self._must_wait():
            self._draft()
        plan = self._scheduler.plan(lambda sequence: sequence in self._constraints)
        if not plan.work:
            return False
        planned = [work.sequence for work in plan.work]
        try:
            launched = self._runner.prepare(plan, lambda sequence: sequence in self._constraints)
            waited = bool(self._flying) and self._flying[-1].done
            with uninterrupted():
                self._runner.start(launched)
                self._commit(launched, waited)
        except Exception as error:
            self._agree(error)
            if self._runner.intact:
                self._runner.wait()
                self._fail(planned, error)
            else:
                self._recover(error, planned)
            return False
        return True

    def _commit(self, launched: Launched, waited: bool) -> None:
        plan, load = launched.plan, self._load
        self._scheduler.commit(plan)
        self._flying.append(launched)
        used = sum(work.tokens for work in plan.work)
        load.tokens += used
        load.padding += launched.shapes[0].tokens * plan.steps * len(plan.ranks) - used
        load.launches += 1
        load.idle_launches += waited
        load.steps += plan.steps

    def _agree(self, error: Exception) -> None:
        """Raise a failure that other processes do not see alike: this process cannot go on alone."""
        if not self._several:
            return
        if self.agree is None:
            raise error
        state = "intact" if self._runner.intact else "lost"
        self.agree(f"{type(error).__name__} after {self._load.launches} launches, state {state}")

    def _fail(self, sequences: Iterable[Sequence], error: Exception) -> None:
        """End the requests of these sequences."""
        for name in dict.fromkeys(sequence.request_id for sequence in sequences):
            for sequence in self._sequences.pop(name, []):
                self._forget(sequence)
                self._events.append(TokenEvent(name, sequence.index, -1, finish_reason="error", error=error))

    def _recover(self, error: Exception, planned: Iterable[Sequence] = ()) -> None:
        """End the requests of launches that the device has lost, and compute all others again from their tokens."""
        self._runner.wait()
        lost = [work.sequence for launched in self._flying for work in launched.plan.work]
        self._flying.clear()
        self._fail([s for s in (*lost, *planned) if s in self._sequences.get(s.request_id, ())], error)
        self._scheduler.reset()
        self._runner.reset()
        self._load.failures += 1

    def _draft(self) -> None:
        for rank in self._scheduler.ranks:
            for sequence in rank.running:
                most = min(self.options.num_speculative_tokens, sequence.max_tokens - sequence.generated - 1)
                exact = not sequence.adjusted and sequence not in self._constraints
                if not (sequence.decoding and exact and most > 0):
                    sequence.drafts = []
                    continue
                if sequence not in self._drafters:
                    self._drafters[sequence] = self._make_drafter(sequence.prompt)
                sequence.drafts = self._drafters[sequence].propose(sequence.tokens, most)

    def _read(self) -> None:
        """Read back the oldest launch in flight."""
        launched = self._flying[0]
        self._sample(launched)
        if not self._flying:
            return
        try:
            outputs, prompt_logprobs = jax.device_get((launched.outputs, launched.prompt_logprobs))
            if launched.outputs is None:
                jax.block_until_ready(launched.hidden)
        except Exception as error:
            self._agree(error)
            self._recover(error)
            return
        with uninterrupted():
            self._flying.popleft()
            self._measure(launched)
            self._advance(launched, outputs, prompt_logprobs)

    def _measure(self, launched: Launched) -> None:
        now, load = time.perf_counter(), self._load
        seconds = (now - self._read_at) / launched.plan.steps
        if load.launches > 1 and seconds < 1:
            load.step_seconds += (seconds - load.step_seconds) / (16 if load.step_seconds else 1)
        self._read_at = now

    def _advance(self, launched: Launched, outputs: Any, prompt_logprobs: Logprobs | None) -> None:
        """Advance the sequences by what a launch has computed."""
        for rank, works in enumerate(launched.plan.by_rank):
            token = 0
            for work in works:
                if work.sequence.epoch == work.epoch:
                    if prompt_logprobs is not None and work.sequence.params.prompt_logprobs is not None:
                        self._keep_prompt_logprobs(work, prompt_logprobs, rank, token)
                    if not work.samples:
                        self._scheduler.settle(work.sequence, work.start + work.count)
                token += work.tokens
        if launched.sampled:
            tokens = outputs.tokens.tolist()
            ends = None if outputs.ends is None else outputs.ends.tolist()
            for at in launched.sampled:
                if at.work.sequence.epoch == at.work.epoch:
                    accepted = ends[at.rank][at.row] - at.row if ends else 0
                    self._add_tokens(launched, at, tokens[at.rank], accepted, outputs.logprobs)

    def _add_tokens(
        self, launched: Launched, at: SampledRow, tokens: list[Any], accepted: int, logprobs: Logprobs | None
    ) -> None:
        """Add a sequence's new tokens, up to the one that ends it, from those of its rank's rows."""
        sequence, decodes = at.work.sequence, launched.plan.decodes
        sequence.ahead -= launched.plan.steps
        if at.work.drafts:
            sequence.computed += accepted
            sequence.drafted += len(at.work.drafts)
            sequence.accepted += accepted
            self._load.drafted += len(at.work.drafts)
            self._load.accepted += accepted
        try:
            for i, token in enumerate(tokens[at.row] if decodes else tokens[at.row : at.row + accepted + 1]):
                place = (at.rank, at.row, i) if decodes else (at.rank, at.row + i)
                event = self._token(sequence, token, logprobs, place)
                self._events.append(event)
                if event.finish_reason:
                    return
        except Exception as error:
            self._agree(error)
            self._fail([sequence], error)
            return
        self._scheduler.settle(sequence, sequence.known_length - 1)

    def _token(self, sequence: Sequence, token: int, logprobs: Logprobs | None, at: tuple[int, ...]) -> TokenEvent:
        params = sequence.params
        sequence.tokens.append(token)
        if self._constraints and sequence in self._constraints:
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
            self._prompt_logprobs.pop(sequence, None) if self._prompt_logprobs else None,
            finish,
            sequence.prefix_hits,
            sequence.drafted,
            sequence.accepted,
        )
        if len(sequence.tokens) == 1:
            event.queue_seconds = sequence.admitted - sequence.created
        if finish:
            self._scheduler.settle(sequence, sequence.known_length - 1)
            self._finish(sequence)
        return event

    def _finish(self, sequence: Sequence) -> None:
        self._scheduler.finished(sequence)
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

    def _keep_prompt_logprobs(self, work: Work, logprobs: Logprobs, rank: int, token: int) -> None:
        """Keep the log-probabilities of a prompt's tokens, of which the work's first is the rank's `token`-th."""
        sequence = work.sequence
        if sequence.tokens:
            return
        kept = self._prompt_logprobs.setdefault(sequence, [None])
        # A preempted sequence computes its prompt again.
        del kept[work.start + 1 :]
        for position in range(work.start, min(work.start + work.count, len(sequence.prompt) - 1)):
            following = int(sequence.prompt[position + 1])
            at = (rank, token + position - work.start)
            kept.append(_token_logprobs(following, logprobs, at, sequence.params.prompt_logprobs))

    def replay(self, steps: int) -> float:
        """Seconds per step when the last launch is repeated for about `steps` steps, without other work on the host.

        The time is measured between the ends of launches, with the next launch already queued. This corrupts running
        requests, which must be cancelled afterwards; it is meant for benchmarks.
        """
        return self._runner.replay(steps)

    def program(self) -> tuple[str, int]:
        """The compiled HLO text of the last launch, and the number of its decode steps."""
        return self._runner.program()

    def warm_up(self, progress: bool | None = None, every_feature: bool = False) -> int:
        """Compile the programs that requests can need; returns their number.

        These are the programs of requests without log-probabilities, penalties, biases and constraints; with
        `every_feature` all but those of prompt log-probabilities. What is left out compiles when it is first needed.
        `progress` shows or hides the progress bar; None shows it.
        """
        from tqdm import tqdm

        shapes = list(self._runner.shapes(every_feature))
        # Without a terminal, the bar is printed as a line every 10 seconds.
        often = 0.1 if sys.stderr.isatty() else 10
        # Several processes must compile in the same order, since their compilers may wait for each other.
        workers = min(COMPILERS, os.cpu_count() or 1) if jax.process_count() == 1 else 1
        with (
            collected_once(),
            tqdm(
                total=len(shapes),
                desc="Compiling programs",
                file=sys.stderr,
                mininterval=often,
                disable=progress is False,
            ) as bar,
            ThreadPoolExecutor(workers) as pool,
        ):
            for _ in pool.map(as_in_this_thread(self._runner.compile), shapes):
                bar.update()
        self._compiled_before = self._runner.programs
        return len(shapes)


def _token_logprobs(token: int, logprobs: Any, at: tuple[int, ...], top: int | None) -> TokenLogprobs | None:
    if top is None or logprobs is None:
        return None
    ids, values = logprobs.top_ids[at][:top].tolist(), logprobs.top[at][:top].tolist()
    return TokenLogprobs(token, float(logprobs.chosen[at]), dict(zip(ids, values, strict=True)))
