"""Runs the scheduler's plans on the device: compiles the programs, sends their inputs, and keeps the device's state."""

from __future__ import annotations

import contextlib
import dataclasses
import time
import weakref
from collections.abc import Callable, Iterator, MutableMapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from gptoss_jax.engine.adjusting import AdjustedRows
from gptoss_jax.engine.compiling import compiler_options, graphs_collectives
from gptoss_jax.engine.inputs import (
    RowAdjustment,
    SampledRow,
    Settings,
    adjust_rows,
    admitted_updates,
    forward_inputs,
    idle_inputs,
    needed_shape,
    no_adjustments,
    row_inputs,
    sampled_rows,
)
from gptoss_jax.engine.interrupts import uninterrupted
from gptoss_jax.engine.pace import Pace, padded
from gptoss_jax.engine.packing import Packed
from gptoss_jax.engine.scheduler import Plan
from gptoss_jax.engine.sequence import Sequence
from gptoss_jax.engine.step import (
    DeviceState,
    Features,
    Generated,
    HeadStructure,
    Logprobs,
    StepOutputs,
    StepShape,
    Structure,
    run_decode,
    run_forward,
    run_sampling,
    run_updates,
)
from gptoss_jax.errors import UsageError
from gptoss_jax.model.gpt_oss import GptOss
from gptoss_jax.model.kv_cache import CacheShape, KVCache
from gptoss_jax.runtime.xla_options import in_order
from gptoss_jax.types import TokenConstraint
from pallas_kernels import dispatch_settings, use_backend
from sharding import replicate, zeros

GRAPHED_TOKENS = 256
"""Most tokens of a forward pass whose collectives are put into CUDA graphs: such steps are launched repeatedly."""

UPDATES = 1024
"""Page-table entries of a pool that the program for cached prefixes changes at once."""


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """A compiled program."""

    compiled: jax.stages.Compiled


_PROGRAMS: MutableMapping[tuple[Any, ...], Program] = weakref.WeakValueDictionary()
"""The programs of the engines that there are, which engines of the same model and mesh share; they hold no weights."""


@dataclasses.dataclass
class Launched:
    """A launch in flight.

    Args:
      plan: the plan that it carries out; `sampled` says which rows are whose.
      shapes: the programs that it runs, of which the last samples.
      hidden: the rows that a forward pass leaves, until they are sampled.
      outputs: of the sampling; None if nothing is sampled, or not yet.
      inputs: what the host sent, for benchmarks that repeat the launch.
    """

    plan: Plan
    sampled: list[SampledRow]
    shapes: list[StepShape]
    inputs: list[Any]
    masked: bool
    hidden: jax.Array | None = None
    prompt_logprobs: Logprobs | None = None
    outputs: StepOutputs | None = None

    @property
    def awaits_constraints(self) -> bool:
        """Whether its sampling has not been started, since it needs masks."""
        return self.masked and self.outputs is None

    @property
    def done(self) -> bool:
        """Whether the device has finished all of it, as far as the host can tell without waiting."""
        arrays = jax.tree.leaves(self.outputs if self.sampled else self.hidden)
        return bool(arrays) and all(array.is_ready() for array in arrays)


class Runner:
    """The model, the cache and what else stays on the device."""

    def __init__(
        self,
        model: GptOss,
        cache: CacheShape,
        pace: Pace,
        dtype: DTypeLike,
        eos: frozenset[int],
        kernels: str = "auto",
    ) -> None:
        self._config, self._partition = model.config, model.partition
        self._structure, self._weights = Structure.of(model)
        self._head = HeadStructure(model.partition, model.config.rms_norm_eps)
        self._head_weights = (model.norm[...], model.lm_head[...])
        self._cache, self._pace, self._dtype, self._eos, self._kernels = cache, pace, dtype, eos, kernels
        self.ranks = model.partition.degree("batch")
        self._in_order = in_order(self._partition.mesh)
        self._programs: dict[StepShape, Program] = {}
        weights = tuple((x.shape, x.dtype, x.sharding) for x in self._weights)
        self._signature = (cache, pace.row_sizes, jnp.dtype(dtype), weights)
        self._set_counts = jax.jit(_set_counts, donate_argnums=0, compiler_options=self._in_order)
        self._last: Launched | None = None
        self.reset()

    def reset(self) -> None:
        """Make the cache and all other state on the device anew."""
        ranks, slots = self.ranks, self._cache.slots
        self._settings = Settings(ranks, slots)
        self._counted: dict[tuple[int, int], tuple[Sequence, int]] = {}

        def tables(entries: int) -> jax.Array:
            where = self._partition.sharding(("batch", None, None))
            return zeros((ranks, slots, entries), jnp.int32, where)

        cache = KVCache.empty(self._config, self._cache, self._dtype, self._partition)
        self._state = DeviceState(cache, tables(self._cache.table), tables(self._cache.sliding_table))
        self._generated = Generated(zeros((ranks, slots), jnp.int32, self._partition.sharding(("batch", None))))

    def prepare(self, plan: Plan, constrained: Callable[[Sequence], bool]) -> Launched:
        """Compile what a plan needs and fill in its inputs; the device's state stays as it is.

        A plan with a sampled sequence that is `constrained` is sampled by `sample`, when constraints are known.
        """
        sampled = sampled_rows(plan)
        launched = Launched(plan, sampled, [], [], any(constrained(at.work.sequence) for at in sampled))
        for at in sampled:
            self._settings.update(at.rank, at.work)
        if any(at.work.sequence.params.penalised for at in sampled):
            self._allocate_counts()
        if plan.decodes:
            self._prepare_decode(launched)
        else:
            self._prepare_forward(launched)
            if sampled and not launched.masked:
                self._prepare_sampling(launched, {})
        for shape in launched.shapes:
            self._program(shape)
        return launched

    def start(self, launched: Launched) -> None:
        """Start a prepared launch; returns at once. A masked one is sampled by `sample`."""
        plan = launched.plan
        self._count_tokens(launched.sampled)
        if any(own.admitted for own in plan.ranks):
            for own in admitted_updates(plan, self._cache, UPDATES):
                self._state = self._program(StepShape(0, 0))(self._state, *own)
        self._last = launched
        self._run(launched)

    def sample(self, launched: Launched, constraints: dict[Sequence, TokenConstraint]) -> None:
        """Start the sampling of a masked launch, with what the constraints allow now."""
        if launched.awaits_constraints:
            self._prepare_sampling(launched, constraints)
            self._program(launched.shapes[1])
            with uninterrupted():
                self._run_sampling(launched)

    def _run(self, launched: Launched) -> None:
        program, inputs = self._program(launched.shapes[0]), launched.inputs
        if launched.plan.decodes:
            arguments = (self._weights, self._state, self._counted_for(launched.shapes[0]), *inputs)
            launched.outputs, (self._state, generated) = program(*arguments)
            self._keep(launched, generated)
            return
        arguments = (self._weights, self._state, self._generated.last, inputs[0])
        (launched.hidden, launched.prompt_logprobs), self._state = program(*arguments)
        launched.prompt_logprobs = self._sent(launched.prompt_logprobs)
        if len(launched.shapes) > 1:
            self._run_sampling(launched)

    def _run_sampling(self, launched: Launched) -> None:
        generated = self._counted_for(launched.shapes[1])
        arguments = (self._head_weights, generated, launched.hidden, *launched.inputs[1:])
        launched.outputs, generated = self._program(launched.shapes[1])(*arguments)
        self._keep(launched, generated)

    def _counted_for(self, shape: StepShape) -> Generated:
        """What was generated, with token counts if the program takes them."""
        return self._generated if shape.features == "penalties" else Generated(self._generated.last)

    def _prepare_decode(self, launched: Launched) -> None:
        plan = launched.plan
        adjusted = self._adjusted(launched.sampled, {})
        sizes = tuple(size for size in self._pace.decode_sizes if self._pace.steps(size) == plan.steps)
        sequences = padded(max(len(own.work) for own in plan.ranks), sizes)
        shape = self._sampling_shape(launched, sequences, adjusted)
        launched.shapes = [dataclasses.replace(shape, tokens=sequences, steps=plan.steps)]
        inputs = forward_inputs(plan.by_rank, plan.steps, sequences, sequences, self._cache)
        rows = row_inputs(launched.sampled, sequences, self._cache, self._settings)
        launched.inputs = [Packed.of(inputs), Packed.of(rows), self._adjustments(launched.shapes[0], adjusted)]

    def _prepare_forward(self, launched: Launched) -> None:
        plan = launched.plan
        tokens = padded(max(own.tokens for own in plan.ranks), self._pace.token_sizes)
        asked = any(
            work.sequence.params.prompt_logprobs is not None and not work.sequence.tokens for work in plan.work
        )
        launched.shapes = [StepShape(tokens, 0, prompt_logprobs=asked)]
        inputs = forward_inputs(plan.by_rank, 1, tokens, self._pace.row_sizes[-1], self._cache, asked)
        launched.inputs = [Packed.of(inputs)]

    def _prepare_sampling(self, launched: Launched, constraints: dict[Sequence, TokenConstraint]) -> None:
        adjusted = self._adjusted(launched.sampled, constraints)
        most = max(at.row + 1 + len(at.work.drafts) for at in launched.sampled)
        count = padded(most, self._pace.row_sizes)
        rows = row_inputs(launched.sampled, count, self._cache, self._settings)
        shape = self._sampling_shape(launched, count, adjusted)
        # In place of what an interrupted call has prepared.
        launched.shapes[1:] = [shape]
        launched.inputs[1:] = [Packed.of(rows), self._adjustments(shape, adjusted)]

    def _keep(self, launched: Launched, generated: Generated) -> None:
        """Keep what a program returned, and start copying its outputs to the host."""
        if generated.counts is None:
            generated = dataclasses.replace(self._generated, last=generated.last)
        self._generated = generated
        launched.outputs = self._sent(launched.outputs)

    def _sent[Tree](self, tree: Tree) -> Tree:
        tree = replicate(tree, self._in_order)
        for array in jax.tree.leaves(tree):
            array.copy_to_host_async()
        return tree

    def _sampling_shape(self, launched: Launched, rows: int, adjusted: list[RowAdjustment]) -> StepShape:
        sequences = [at.work.sequence for at in launched.sampled]
        plain = self._pace.plain and not any(s.cuts for s in sequences)
        features: Features = "plain" if plain else "cuts"
        if adjusted or any(s.params.logprobs is not None for s in sequences):
            features = "penalties" if any(s.params.penalised for s in sequences) else "all"
        return needed_shape(adjusted, StepShape(0, rows, features=features))

    def _adjustments(self, shape: StepShape, adjusted: list[RowAdjustment]) -> Packed[AdjustedRows] | None:
        """What changes the rows' logits, if the program takes it."""
        if shape.features in ("plain", "cuts"):
            return None
        made = no_adjustments(self.ranks, shape.rows, shape, self._config.vocab_size)
        adjust_rows(made, adjusted)
        return Packed.of(made)

    def _adjusted(
        self, sampled: list[SampledRow], constraints: dict[Sequence, TokenConstraint]
    ) -> list[RowAdjustment]:
        """The rows whose logits are changed; a constraint that allows everything changes nothing."""
        found = []
        for at in sampled:
            if not (constraints or at.work.sequence.may_be_adjusted):
                continue
            mask = None
            if at.work.sequence in constraints and at.work.sequence.epoch == at.work.epoch:
                mask = np.full(-(-self._config.vocab_size // 32), 0xFFFFFFFF, np.uint32)
                constraints[at.work.sequence].fill(mask)
                mask = None if (mask == 0xFFFFFFFF).all() else mask
            if one := RowAdjustment.of(at, mask, self._eos):
                found.append(one)
        return found

    def _allocate_counts(self) -> None:
        """Make room for token counts, once a sequence has penalties."""
        if self._generated.counts is None:
            shape = (self.ranks, self._cache.slots, self._config.vocab_size)
            where = self._partition.sharding(("batch", None, None))
            counts, in_prompt = (zeros(shape, dtype, where) for dtype in (jnp.int32, jnp.bool_))
            self._generated = dataclasses.replace(self._generated, counts=counts, in_prompt=in_prompt)

    def _count_tokens(self, sampled: list[SampledRow]) -> None:
        """Count the tokens of penalised sequences that are sampled from for the first time in their slots."""
        for at in sampled:
            sequence, place = at.work.sequence, (at.rank, at.work.slot)
            if not sequence.params.penalised or self._counted.get(place) == (sequence, at.work.epoch):
                continue
            vocab = self._config.vocab_size
            used = np.bincount(np.asarray(sequence.tokens, np.int64), minlength=vocab).astype(np.int32)
            in_prompt_V = np.bincount(sequence.prompt, minlength=vocab) > 0
            self._generated = self._set_counts(self._generated, np.asarray(place, np.int32), used, in_prompt_V)
            self._counted[place] = sequence, at.work.epoch

    def _program(self, shape: StepShape) -> Callable[..., Any]:
        """The compiled program of a shape; it takes over the state that it returns."""
        if shape not in self._programs:
            options = program_options(self._partition.mesh, shape)
            run, donated = self._function(shape)
            own = (run.func, run.args, self._signature, self._kernels, dispatch_settings())
            key = (*own, frozenset((options or {}).items()))
            program = _PROGRAMS.get(key)
            if program is None:
                traced = _computed_by(self._kernels, run)
                jitted = jax.jit(traced, donate_argnums=donated, compiler_options=options)
                program = Program(jitted.lower(*self._abstract(shape)).compile())
                program = _PROGRAMS.setdefault(key, program)
            self._programs[shape] = program
        return self._programs[shape].compiled

    def _function(self, shape: StepShape) -> tuple[partial[Any], tuple[int, ...]]:
        """The function of a shape's program, and the arguments that it takes over."""
        if shape.tokens and shape.rows:
            return partial(run_decode, self._structure, shape), (1, 2)
        if shape.tokens:
            return partial(run_forward, self._structure, shape), (1,)
        if shape.rows:
            return partial(run_sampling, self._head, shape), (1,)
        return partial(run_updates, self._partition), (0,)

    def shapes(self, every_feature: bool = False) -> Iterator[StepShape]:
        """All programs of requests with plain parameters, or of all but those for prompt log-probabilities."""
        yield StepShape(0, 0)
        for tokens in self._pace.token_sizes:
            yield StepShape(tokens, 0)
        kinds: tuple[Features, ...] = ("plain", "cuts", "all", "penalties")
        for features in kinds[not self._pace.plain : None if every_feature else 2]:
            for rows in self._pace.row_sizes:
                yield needed_shape([], StepShape(0, rows, features=features))
            for sequences in self._pace.decode_sizes:
                steps = self._pace.steps(sequences)
                yield needed_shape([], StepShape(sequences, sequences, steps, features))

    def compile(self, shape: StepShape) -> None:
        """Compile a program of `shapes`, without running it."""
        self._program(shape)

    def _abstract(self, shape: StepShape) -> tuple[Any, ...]:
        """Arguments of a shape's program, with nothing to do."""
        if not (shape.tokens or shape.rows):
            updates = np.full((self.ranks, UPDATES, 3), self._cache.slots, np.int32)
            return self._state, updates, updates
        own = idle_inputs(shape, self.ranks, self._cache, self._pace.row_sizes[-1])
        inputs, rows = (part and Packed.of(part) for part in own)
        unchanged = self._adjustments(shape, []) if shape.rows else None
        if shape.features == "penalties":
            self._allocate_counts()
        generated = self._counted_for(shape)
        if shape.tokens and shape.rows:
            return self._weights, self._state, generated, inputs, rows, unchanged
        if shape.tokens:
            return self._weights, self._state, self._generated.last, inputs
        size = (self.ranks, self._pace.row_sizes[-1], self._config.hidden_size)
        where = self._partition.sharding(("batch", None, None))
        hidden = jax.ShapeDtypeStruct(size, self._head_weights[1].dtype, sharding=where)
        return self._head_weights, generated, hidden, rows, unchanged

    @property
    def intact(self) -> bool:
        """Whether the device's state is there, so that no program has taken it over without returning the next one."""
        return not any(array.is_deleted() for array in jax.tree.leaves((self._state, self._generated)))

    def wait(self) -> None:
        """Wait for all that has been started, whether it succeeds or fails.

        A process that exits while a launch is in flight may abort.
        """
        last = self._last and (self._last.hidden, self._last.outputs)
        for array in jax.tree.leaves((self._state, self._generated, last)):
            with contextlib.suppress(Exception):
                array.block_until_ready()

    @property
    def programs(self) -> int:
        """How many programs there are."""
        return len(self._programs)

    def replay(self, steps: int) -> float:
        """Seconds of a step when the last launch is repeated for about so many steps; see Engine.replay."""
        assert self._last is not None
        launched = dataclasses.replace(self._last)
        launches = max(1, steps // launched.plan.steps)
        ends: list[float] = []
        before = None
        for _ in range(launches + 2):
            self._run(launched)
            if before is not None:
                jax.block_until_ready(before)
                ends.append(time.perf_counter())
            before = launched.outputs if launched.sampled else launched.hidden
        jax.block_until_ready((self._state, self._generated))
        return (ends[-1] - ends[0]) / launches / launched.plan.steps

    def program(self) -> tuple[str, int]:
        """The compiled text of the last launch's programs, and its steps."""
        assert self._last is not None
        launched = self._last
        texts = [str(self._programs[shape].compiled.as_text()) for shape in launched.shapes]
        return "\n".join(texts), launched.plan.steps


def program_options(mesh: Mesh | None, shape: StepShape) -> dict[str, str | bool] | None:
    """The XLA options of a shape's program; collectives are in CUDA graphs if it has no loops and repeats itself."""
    repeats = shape.features == "plain" and (shape.rows > 0 or 0 < shape.tokens <= GRAPHED_TOKENS)
    return compiler_options(mesh, collectives=repeats and graphs_collectives(mesh))


def _computed_by[T](kernels: str, run: Callable[..., T]) -> Callable[..., T]:
    """The function for packed arguments, traced with these kernels. Raises UsageError where they do not cover it."""

    def traced(*args: Any) -> T:
        with use_backend(kernels):
            try:
                return run(*(arg.unpack() if isinstance(arg, Packed) else arg for arg in args))
            except NotImplementedError as reason:
                raise UsageError(f"{kernels}: {reason}", "kernels") from None

    return traced


def _set_counts(generated: Generated, at: jax.Array, counts_V: jax.Array, in_prompt_V: jax.Array) -> Generated:
    assert generated.counts is not None
    assert generated.in_prompt is not None
    return dataclasses.replace(
        generated,
        counts=generated.counts.at[at[0], at[1]].set(counts_V),
        in_prompt=generated.in_prompt.at[at[0], at[1]].set(in_prompt_V),
    )
