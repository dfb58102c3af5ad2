"""Runs the scheduler's plans on the device: fills in a step's inputs, compiles its step shape, and launches it."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import time
import weakref
from collections.abc import Callable, Iterator, MutableMapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from gptoss_jax.engine.adjusting import Adjustments, Penalties
from gptoss_jax.engine.compiling import compiler_options, graphs_collectives
from gptoss_jax.engine.pace import Pace
from gptoss_jax.engine.packing import Packed
from gptoss_jax.engine.sampling import SamplingMode, SamplingState
from gptoss_jax.engine.scheduler import Limits, Plan, Sequence, buckets
from gptoss_jax.engine.step import (
    DeviceState,
    Rows,
    StepInputs,
    StepOutputs,
    StepShape,
    Structure,
    run_choice,
    run_pass,
    run_step,
    seed_key,
)
from gptoss_jax.errors import UsageError
from gptoss_jax.model.gpt_oss import GptOss
from gptoss_jax.model.kv_cache import CacheShape, KVCache, Segments
from gptoss_jax.runtime.xla_options import in_order
from gptoss_jax.types import SamplingParams, TokenConstraint
from pallas_kernels import dispatch_settings, use_backend
from sharding import Partition, replicate, zeros

SNAPSHOTS_A_CHUNK = 2
BIASES = 64
"""Tokens of a row that may be biased, in steps of this."""

_PROGRAMS: MutableMapping[tuple[Any, ...], Callable[..., Any]] = weakref.WeakValueDictionary()
"""The programs of the engines that there are; they hold no weights."""


@dataclasses.dataclass
class Launched:
    """A step in flight, and which sequence each row is for, with its epoch at the start.

    Of a masked step `rows` is what the pass leaves until tokens are chosen; `outputs` come with the choosing.
    """

    kind: StepShape
    inputs: Packed[StepInputs]
    adjustments: Adjustments | None
    decodes: list[list[tuple[Sequence, int]]]
    chunks: list[list[tuple[Sequence, int, int, int, bool]]]
    rows: Rows | None = None
    outputs: StepOutputs | None = None

    @property
    def done(self) -> bool:
        """Whether the device has finished all of it, if it was started at all."""
        ready = [getattr(x, "is_ready", None) for x in jax.tree.leaves(self.outputs)]
        return all(is_ready is not None and is_ready() for is_ready in ready)


class Runner:
    """The model, the cache and what else stays on the device."""

    def __init__(
        self,
        model: GptOss,
        shape: CacheShape,
        limits: Limits,
        pace: Pace,
        max_model_len: int,
        dtype: DTypeLike,
        drafts: int,
        eos: frozenset[int],
        kernels: str = "auto",
    ) -> None:
        self._config, self._partition = model.config, model.partition
        self._structure, self._weights = Structure.of(model)
        self._shape, self._limits, self._drafts, self._eos = shape, limits, drafts, eos
        # Guesses for a step need the tokens of the one before.
        self._kernels, self._rounds = kernels, 1 if drafts else pace.num_decode_steps
        self._last: Launched | None = None
        self._rehearsed: dict[StepShape, None] | None = None
        self.parts = model.partition.degree("batch")
        most_pages = -(-max_model_len // shape.page_size)
        self._page_counts = buckets(pace.pages_factor, pace.least_pages, min(most_pages, shape.pages))
        self._tables = np.zeros((self.parts, shape.slots, self._page_counts[-1]), np.int32)
        self._filled = np.zeros((self.parts, shape.slots), np.int64)
        self._settings = _Settings.empty(self.parts, shape.slots)
        self._programs: dict[tuple[Callable[..., Any], StepShape], Callable[..., Any]] = {}
        self._in_order = in_order(self._partition.mesh)
        self._copy_rings = jax.jit(partial(_copy_rings, model), donate_argnums=0, compiler_options=self._in_order)
        self._set_counts = jax.jit(_set_counts, donate_argnums=0, compiler_options=self._in_order)
        last = zeros((self.parts, shape.slots), jnp.int32, self._partition.sharding(("batch", None)))
        self._state = DeviceState(KVCache.empty(model.config, shape, dtype, self._partition), last)

    def launch(self, plans: list[Plan], constraints: dict[Sequence, TokenConstraint], rounds: int = 1) -> Launched:
        """Start a step, or as many decode steps as `rounds` if they need nothing of the host; returns at once.

        Of a masked step this is the pass alone: `choose` goes on when the constraints have the tokens before.
        """
        for number, plan in enumerate(plans):
            for sequence in itertools.chain(plan.decodes, (chunk.sequence for chunk in plan.chunks)):
                self._note(number, sequence)
        kind = self._kind(plans, constraints)
        if not (kind.prefills or kind.drafts or kind.masked):
            kind = dataclasses.replace(kind, rounds=rounds)
        launched = Launched(
            kind,
            Packed.of(self._inputs(kind, plans)),
            self._adjustments(kind, plans) if kind.adjusted else None,
            [[(s, s.epoch) for s in plan.decodes] for plan in plans],
            [
                [(c.sequence, c.sequence.epoch, c.start, c.stop, c.finishing) for c in plan.chunks]
                for plan in plans
            ],
        )
        if self._rehearsed is not None:
            self._rehearsed[kind] = None
            launched.outputs = _no_outputs(kind, self.parts)
            return launched
        self._last = launched
        self._restore(plans)
        self._prepare_counts(plans, kind)
        self._start(launched)
        _send(launched, self._in_order)
        return launched

    @contextlib.contextmanager
    def rehearsal(self) -> Iterator[dict[StepShape, None]]:
        """The kinds of the steps that are launched during the block: planned, but not started, and all tokens are 0."""
        kinds = self._rehearsed = {}
        try:
            yield kinds
        finally:
            self._rehearsed = None

    def choose(self, launched: Launched, constraints: dict[Sequence, TokenConstraint]) -> None:
        """Start the choosing of a masked step, with what the constraints allow now; of others nothing is left."""
        if launched.rows is None:
            return
        assert launched.adjustments is not None
        allowed: Any = self._allowed(launched, constraints)
        launched.adjustments = dataclasses.replace(launched.adjustments, allowed=allowed)
        self._resume(launched)
        _send(launched, self._in_order)

    def _start(self, step: Launched) -> None:
        """Start a step, or the pass of a masked one."""
        arguments = (self._weights, self._state, step.inputs)
        if step.kind.masked:
            step.rows, self._state = self._pass(step.kind)(*arguments)
        else:
            step.outputs, self._state = self._step(step.kind)(*arguments, _packed(step.adjustments))

    def _resume(self, step: Launched) -> None:
        """Start the choosing of a masked step."""
        choice = self._choice(step.kind)
        step.outputs, self._state = choice(step.rows, self._state, _packed(step.adjustments))
        step.rows = None

    def _note(self, part: int, sequence: Sequence) -> None:
        """Bring the slot's table and settings up to date."""
        slot, filled = sequence.slot, self._filled[part, sequence.slot]
        if self._settings.owner[part][slot] != (sequence, sequence.epoch):
            self._settings.set(part, slot, sequence)
            filled = 0
        pages = sequence.pages
        if filled < len(pages):
            self._tables[part, slot, filled : len(pages)] = pages[filled:]
            self._filled[part, slot] = len(pages)

    def _restore(self, plans: list[Plan]) -> None:
        count = max(len(plan.restores) for plan in plans)
        if count:
            pairs = self._no_rings(_doubled(count))
            for part, plan in enumerate(plans):
                for i, (row, slot) in enumerate(plan.restores):
                    pairs[:, part, i] = row, slot
            self._copy(pairs)

    def _no_rings(self, count: int) -> np.ndarray:
        """Pairs of ring rows [2, B, count], from and to, of which none is copied."""
        return np.full((2, self.parts, count), self._shape.rings, np.int32)

    def _copy(self, pairs: np.ndarray) -> None:
        self._state = self._copy_rings(self._state, np.minimum(pairs[0], self._shape.rings - 1), pairs[1])

    def compile_restores(self) -> None:
        """Compile the copies of cached rings that precede steps with prefix-cache hits, for all bucket sizes."""
        for count in buckets(2, 1, _doubled(self._shape.slots)):
            self._copy(self._no_rings(count))

    def _prepare_counts(self, plans: list[Plan], kind: StepShape) -> None:
        if not kind.penalised:
            return
        if self._state.counts is None:
            shape = (self.parts, self._shape.slots, self._config.vocab_size)
            where = self._partition.sharding(("batch", None, None))
            counts = zeros(shape, jnp.int32, where)
            self._state = dataclasses.replace(self._state, counts=counts, in_prompt=zeros(shape, jnp.bool_, where))
        for part, plan in enumerate(plans):
            for chunk in plan.chunks:
                sequence = chunk.sequence
                if sequence.params.penalised and chunk.finishing:
                    vocab = self._config.vocab_size
                    used = np.bincount(np.asarray(sequence.tokens, np.int64), minlength=vocab).astype(np.int32)
                    in_prompt = np.bincount(sequence.prompt, minlength=vocab) > 0
                    at = np.asarray([part, sequence.slot], np.int32)
                    self._state = self._set_counts(self._state, at, used, in_prompt)

    def _kind(self, plans: list[Plan], constraints: dict[Sequence, TokenConstraint]) -> StepShape:
        sequences = [s for plan in plans for s in plan.decodes]
        chunks = [c for plan in plans for c in plan.chunks]
        everyone = sequences + [c.sequence for c in chunks]
        choosing = sequences + [c.sequence for c in chunks if c.finishing]
        masked = any(s in constraints for s in choosing)
        chunk = self._limits.chunk_size(max((c.stop - c.start for c in chunks), default=0))
        decodes = max(len(plan.decodes) for plan in plans)
        prefills = max(len(plan.chunks) for plan in plans)
        prefills = _padded(prefills, self._limits.counts(chunk)) if prefills else 0
        return StepShape(
            decodes=0 if prefills == 1 and not decodes else _padded(decodes, self._limits.decodes(prefills > 0)),
            prefills=prefills,
            chunk=chunk if prefills else 1,
            pages=_padded(max(len(s.pages) for s in everyone), self._page_counts),
            drafts=self._drafts if any(s.drafts for s in sequences) else 0,
            logprobs=any(s.params.logprobs is not None for s in everyone),
            prompt_logprobs=any(c.sequence.params.prompt_logprobs is not None for c in chunks),
            adjusted=masked or any(needs_adjusting(s) for s in everyone),
            penalised=any(s.params.penalised for s in everyone),
            masked=masked,
            sampling=_sampling_mode([s.params for s in everyone]),
        )

    def _inputs(self, kind: StepShape, plans: list[Plan]) -> StepInputs:
        parts = self.parts
        decode_slots = np.zeros((parts, kind.decodes), np.int32)
        decode_positions = np.full((parts, kind.decodes), -1, np.int32)
        drafts = np.full((parts, kind.decodes, kind.drafts), -1, np.int32)
        prefill_slots = np.zeros((parts, kind.prefills), np.int32)
        chunk_shape = (parts, kind.prefills, kind.chunk)
        tokens, next_tokens = np.zeros(chunk_shape, np.int32), np.full(chunk_shape, -1, np.int32)
        positions = np.full(chunk_shape, -1, np.int32)
        finishing = np.zeros((parts, kind.prefills), bool)
        snapshots = np.full((parts, kind.prefills, SNAPSHOTS_A_CHUNK), self._shape.rings, np.int32)
        snapshot_positions = np.zeros_like(snapshots)
        for part, plan in enumerate(plans):
            for i, sequence in enumerate(plan.decodes):
                decode_slots[part, i] = sequence.slot
                decode_positions[part, i] = len(sequence.prompt) + sequence.generated - 1
                drafts[part, i, : len(sequence.drafts)] = sequence.drafts
            for i, chunk in enumerate(plan.chunks):
                known, count = chunk.sequence.known, chunk.stop - chunk.start
                prefill_slots[part, i] = chunk.sequence.slot
                tokens[part, i, :count] = known[chunk.start : chunk.stop]
                following = known[chunk.start + 1 : chunk.stop + 1]
                next_tokens[part, i, : len(following)] = following
                positions[part, i, :count] = np.arange(chunk.start, chunk.stop)
                finishing[part, i] = chunk.finishing
                for j, (row, position) in enumerate(chunk.snapshots):
                    snapshots[part, i, j], snapshot_positions[part, i, j] = row, position
        empty = np.zeros((parts, kind.decodes, 0), np.int32)
        slots = np.concatenate([decode_slots, prefill_slots], axis=1)
        return StepInputs(
            decode=_of_host(Segments, decode_slots, self._tables_of(decode_slots, kind), empty, empty),
            decode_positions=decode_positions,
            drafts=drafts,
            prefill=_of_host(
                Segments, prefill_slots, self._tables_of(prefill_slots, kind), snapshots, snapshot_positions
            ),
            prefill_tokens=tokens,
            prefill_positions=positions,
            next_tokens=next_tokens,
            finishing=finishing,
            sampling=self._settings.of(slots),
        )

    def _tables_of(self, slots: np.ndarray, kind: StepShape) -> np.ndarray:
        return np.take_along_axis(self._tables[..., : kind.pages], slots[..., None], axis=1)

    def _adjustments(self, kind: StepShape, plans: list[Plan]) -> Adjustments:
        """All but masks."""
        rows = kind.decodes + kind.prefills
        at = [
            (part, row, sequence)
            for part, plan in enumerate(plans)
            for row, sequence in itertools.chain(
                enumerate(plan.decodes), enumerate((c.sequence for c in plan.chunks), kind.decodes)
            )
        ]
        biases = [self._biases(sequence) for *_, sequence in at]
        width = _doubled(max(map(len, biases)), BIASES)
        shape = (self.parts, rows)
        penalties = np.zeros((3, *shape), np.float32)
        penalties[0] = 1
        ids = np.full((*shape, width), self._config.vocab_size, np.int32)
        bias = np.zeros((*shape, width), np.float32)
        for (part, row, sequence), own in zip(at, biases, strict=True):
            params = sequence.params
            penalties[:, part, row] = params.repetition_penalty, params.presence_penalty, params.frequency_penalty
            ids[part, row, : len(own)], bias[part, row, : len(own)] = list(own.keys()), list(own.values())
        return _of_host(Adjustments, ids, bias, _of_host(Penalties, *penalties) if kind.penalised else None)

    def _allowed(self, step: Launched, constraints: dict[Sequence, TokenConstraint]) -> np.ndarray:
        """The masks of a step; those of sequences that have left since it was started do not matter."""
        rows = step.kind.decodes + step.kind.prefills
        allowed = np.full((self.parts, rows, -(-self._config.vocab_size // 32)), 0xFFFFFFFF, np.uint32)
        for part, (decodes, chunks) in enumerate(zip(step.decodes, step.chunks, strict=True)):
            choosing = [(row, sequence) for row, (sequence, _) in enumerate(decodes)]
            choosing += [(row, s) for row, (s, *_, finishing) in enumerate(chunks, step.kind.decodes) if finishing]
            for row, sequence in choosing:
                if sequence in constraints:
                    constraints[sequence].fill(allowed[part, row])
        return allowed

    def _biases(self, sequence: Sequence) -> dict[int, float]:
        params = sequence.params
        biases = dict(params.logit_bias or {})
        if sequence.generated < params.min_tokens:
            ends = set(params.stop_token_ids) | (set() if params.ignore_eos else self._eos)
            biases |= dict.fromkeys(ends, -np.inf)
        return biases

    def _step(self, kind: StepShape) -> Callable[..., Any]:
        return self._program(run_step, self._structure, kind)

    def _pass(self, kind: StepShape) -> Callable[..., Any]:
        return self._program(run_pass, self._structure, kind.of_pass)

    def _choice(self, kind: StepShape) -> Callable[..., Any]:
        return self._program(run_choice, self._partition, kind.of_choice)

    def _program(self, run: Callable[..., Any], of: Structure | Partition, kind: StepShape) -> Callable[..., Any]:
        """What runs a kind of step or of its parts; it takes over the state, its second argument."""
        if (run, kind) not in self._programs:
            cuts = dataclasses.replace(kind, sampling="truncated")
            graphed = self._graphs_collectives(kind)
            # Nearly as fast: any choosing is, beside chunks or in a step that is rare.
            does = kind.sampling == "random" or kind.prefills or kind.rounds < self._rounds
            if does and not graphed and (run, cuts) in self._programs:
                return self._programs[run, cuts]
            options = compiler_options(self._partition.mesh, collectives=graphed)
            self._programs[run, kind] = _shared_program(run, of, kind, self._kernels, options)
        return self._programs[run, kind]

    def _graphs_collectives(self, kind: StepShape) -> bool:
        """Whether its collectives are in device graphs: where many steps are alike, and no loop ends by logits."""
        usual = not kind.prefills and kind.rounds == self._rounds and kind.sampling != "truncated"
        return usual and graphs_collectives(self._partition.mesh)

    def kinds(self) -> Iterator[StepShape]:
        """The kinds of step that requests with plain settings can need."""
        limits = self._limits
        beside = limits.decodes(beside_chunks=True)
        chunks = [(n, size) for size in limits.chunk_sizes for n in limits.counts(size)]
        # Few sequences that decode, or none, cost little beside several chunks.
        mixed = [(count, *own) for own in chunks for count in ([0, *beside] if own[0] == 1 else beside)]
        ways: set[tuple[int, SamplingMode]] = {
            (self._rounds, "greedy"),
            (self._rounds, "truncated"),
            (1, "truncated"),
        }
        if graphs_collectives(self._partition.mesh):
            ways.add((self._rounds, "random"))
        for pages, drafts in itertools.product(self._page_counts, sorted({0, self._drafts})):
            for count, (rounds, sampling) in itertools.product(limits.decodes(beside_chunks=False), sorted(ways)):
                yield StepShape(count, 0, 1, pages, drafts, rounds, sampling=sampling)
            for own in mixed:
                # Only sequences that decode have guesses.
                if own[0] or not drafts:
                    yield StepShape(*own, pages, drafts, sampling="truncated")

    def compile(self, kind: StepShape) -> None:
        """Compile a kind of step that is not adjusted, without running it."""
        plans = [Plan() for _ in range(self.parts)]
        step: Any = self._step(kind)
        if not hasattr(step, "lower"):
            # A compiled one of another kind does.
            return
        lowered = step.lower(self._weights, self._state, Packed.of(self._inputs(kind, plans)), None)
        self._programs[run_step, kind] = lowered.compile()

    @property
    def compiled(self) -> int:
        """How many programs there have been for steps of different kinds."""
        return len(self._programs)

    def replay(self, steps: int) -> float:
        """Seconds of a step of several launches of the last one; see Engine.replay."""
        assert self._last is not None
        step = dataclasses.replace(self._last)
        launches = max(1, steps // step.kind.rounds)
        ends: list[float] = []
        before = None
        for _ in range(launches + 2):
            self._start(step)
            if step.kind.masked:
                self._resume(step)
            if before is not None:
                jax.block_until_ready(before)
                ends.append(time.perf_counter())
            before = step.outputs
        jax.block_until_ready(self._state)
        return (ends[-1] - ends[0]) / launches / step.kind.rounds

    def program(self) -> tuple[str, int]:
        """The compiled text of the last launch, of a masked one those of both programs, and its steps in a row."""
        assert self._last is not None
        kind, adjustments = self._last.kind, self._last.adjustments
        arguments = (self._weights, self._state, self._last.inputs)
        if not kind.masked:
            return _text(self._step(kind), *arguments, _packed(adjustments)), kind.rounds
        rows, _ = jax.eval_shape(self._pass(kind), *arguments)
        choice = _text(self._choice(kind), rows, self._state, _packed(adjustments))
        return f"{_text(self._pass(kind), *arguments)}\n{choice}", 1


def _send(step: Launched, options: dict[str, str | bool] | None) -> None:
    """Start copying a step's outputs to the host as they become ready; `options` are XLA options."""
    step.outputs = replicate(step.outputs, options)
    for output in jax.tree.leaves(step.outputs):
        output.copy_to_host_async()


def _no_outputs(kind: StepShape, parts: int) -> StepOutputs:
    """What a step gives that was not started: tokens of 0, on the host, without log-probabilities."""

    def tokens(*shape: int) -> Any:
        return np.zeros((parts, *shape), np.int32)

    decoded, accepted = tokens(kind.decodes, kind.rounds + kind.drafts), tokens(kind.decodes) + kind.rounds - 1
    return StepOutputs(decoded, accepted, tokens(kind.prefills), None, None, None)


def _packed(adjustments: Adjustments | None) -> Packed[Adjustments] | None:
    return Packed.of(adjustments) if adjustments else None


def _text(program: Any, *arguments: Any) -> str:
    compiled = program.lower(*arguments).compile() if hasattr(program, "lower") else program
    return str(compiled.as_text())


def _doubled(count: int, least: int = 1) -> int:
    """The smallest of least, 2 * least, ... that is at least the count."""
    while least < count:
        least *= 2
    return least


def _padded(count: int, sizes: list[int]) -> int:
    return next(size for size in sizes if size >= count)


def needs_adjusting(sequence: Sequence) -> bool:
    """Whether a sequence's logits are changed before sampling."""
    params = sequence.params
    return params.penalised or bool(params.logit_bias) or sequence.generated < params.min_tokens


def _sampling_mode(batch: list[SamplingParams]) -> SamplingMode:
    """The cheapest sampling mode that covers these requests."""
    if any(p.temperature > 0 and (p.top_k > 0 or p.top_p < 1) for p in batch):
        return "truncated"
    return "random" if any(p.temperature > 0 for p in batch) else "greedy"


@dataclasses.dataclass
class _Settings:
    """The sampling settings of every slot, as arrays [B, slots]."""

    state: SamplingState
    owner: list[list[tuple[Sequence, int] | None]]

    @classmethod
    def empty(cls, parts: int, slots: int) -> _Settings:
        shape = (parts, slots)
        state = _of_host(
            SamplingState,
            np.zeros(shape, np.float32),
            np.ones(shape, np.float32),
            np.zeros(shape, np.int32),
            np.zeros(shape, np.float32),
            np.zeros((*shape, 2), np.uint32),
        )
        return cls(state, [[None] * slots for _ in range(parts)])

    def set(self, part: int, slot: int, sequence: Sequence) -> None:
        params, at, state = sequence.params, (part, slot), self.state
        values = (params.temperature, params.top_p, params.top_k, params.min_p, seed_key(sequence.seed))
        arrays: Any = (state.temperature, state.top_p, state.top_k, state.min_p, state.keys)
        for array, value in zip(arrays, values, strict=True):
            array[at] = value
        self.owner[part][slot] = (sequence, sequence.epoch)

    def of(self, slots: np.ndarray) -> SamplingState:
        """[B, R] of the given slots."""
        part = np.arange(len(slots))[:, None]
        return jax.tree.map(lambda x: x[part, slots], self.state)


def _shared_program(
    run: Callable[..., Any],
    of: Structure | Partition,
    kind: StepShape,
    kernels: str,
    options: dict[str, str | bool] | None,
) -> Callable[..., Any]:
    """A program that engines of the same model and mesh share, so that it is traced and compiled once for all."""
    key = (run, of, kind, kernels, dispatch_settings(), frozenset((options or {}).items()))
    program = _PROGRAMS.get(key)
    if program is None:
        traced = _computed_by(kernels, partial(run, of, kind))
        program = _PROGRAMS[key] = jax.jit(traced, donate_argnums=1, compiler_options=options)
    return program


def _computed_by[T](kernels: str, step: Callable[..., T]) -> Callable[..., T]:
    """The step for packed arguments, traced with these kernels. Raises UsageError where they do not cover it."""

    def traced(*args: Any) -> T:
        with use_backend(kernels):
            try:
                return step(*(arg.unpack() if isinstance(arg, Packed) else arg for arg in args))
            except NotImplementedError as reason:
                raise UsageError(f"{kernels}: {reason}", "kernels") from None

    return traced


def _of_host[T](make: Callable[..., T], *arrays: Any) -> T:
    """A pytree that a step takes, with the host's arrays in it."""
    return make(*arrays)


def _copy_rings(model: GptOss, state: DeviceState, sources: jax.Array, targets: jax.Array) -> DeviceState:
    with model.partition.active():
        return dataclasses.replace(state, cache=state.cache.copy_rings(model.config, sources, targets))


def _set_counts(state: DeviceState, at: jax.Array, counts_V: jax.Array, in_prompt_V: jax.Array) -> DeviceState:
    assert state.counts is not None
    assert state.in_prompt is not None
    return dataclasses.replace(
        state,
        counts=state.counts.at[at[0], at[1]].set(counts_V),
        in_prompt=state.in_prompt.at[at[0], at[1]].set(in_prompt_V),
    )
