"""The programs of the engine's steps with abstract, sharded arguments, for compiling without running."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from gptoss_jax.engine import memory
from gptoss_jax.engine.inputs import idle_inputs, needed_shape
from gptoss_jax.engine.options import EngineOptions
from gptoss_jax.engine.pace import Pace, padded
from gptoss_jax.engine.step import (
    DeviceState,
    Generated,
    HeadStructure,
    StepShape,
    Structure,
    run_decode,
    run_forward,
    run_sampling,
)
from gptoss_jax.model.config import ModelConfig
from gptoss_jax.model.gpt_oss import GptOss
from gptoss_jax.model.kv_cache import STORE, CacheShape, KVCache
from gptoss_jax.model.placement import place, preparer
from gptoss_jax.model.weights import Weight, WeightSpec, abstract_creator
from sharding import Partition

UNLIMITED = 1 << 62
"""Bytes that hold any cache."""


@dataclasses.dataclass(frozen=True)
class Program:
    """One of the engine's programs, and its arguments: what the device holds, and what the host sends.

    `donated` are the indices of the arguments that it takes over, so that the KV cache is updated in place.
    """

    shape: StepShape
    run: partial[Any]
    donated: tuple[int, ...]
    held: tuple[Any, ...]
    inputs: tuple[Any, ...]

    def lower(self) -> jax.stages.Lowered:
        """Lower the program as the engine does."""
        step: Any = jax.jit(self.run, donate_argnums=self.donated)
        return step.lower(*self.held, *self.inputs)


@dataclasses.dataclass(frozen=True)
class Step:
    """The programs that the engine runs for a step: one, or a forward pass and its sampling.

    A step processes `tokens` tokens of each of `sequences` sequences, over all devices.
    """

    programs: tuple[Program, ...]
    cache: CacheShape
    weights: list[jax.Array]
    state: tuple[DeviceState, Generated]
    sequences: int
    tokens: int


def decode_step(
    config: ModelConfig,
    partition: Partition,
    batch: int,
    context: int,
    chunk: int,
    dtype: DTypeLike = jnp.bfloat16,
) -> Step:
    """One decode step of `batch` sequences of up to `context` tokens, with sampling, in an engine as of `sizes`.

    A launch of several decode steps is planned with a single one. Raises ShardingError.
    """
    pace, cache = sizes(config, partition, batch, context, chunk, dtype)
    shapes = _forward_and_sampling(pace, cache.slots, cache.slots)
    if cache.slots <= max(pace.decode_sizes, default=0):
        sequences = padded(cache.slots, pace.decode_sizes)
        shapes = [StepShape(sequences, sequences)]
    return _step(config, partition, pace, cache, shapes, dtype, batch, 1)


def prefill_step(
    config: ModelConfig,
    partition: Partition,
    batch: int,
    context: int,
    chunk: int,
    dtype: DTypeLike = jnp.bfloat16,
) -> Step:
    """One prefill step: a chunk of one prompt per data-parallel rank, with a KV cache for `batch` sequences.

    Raises ShardingError.
    """
    pace, cache = sizes(config, partition, batch, context, chunk, dtype)
    shapes = _forward_and_sampling(pace, chunk, 1)
    return _step(config, partition, pace, cache, shapes, dtype, partition.degree("batch"), chunk)


def sizes(
    config: ModelConfig, partition: Partition, batch: int, context: int, chunk: int | None, dtype: DTypeLike
) -> tuple[Pace, CacheShape]:
    """The sizes of an engine's programs, and of each data-parallel rank's cache.

    A step takes a chunk on each rank, by default as many tokens as the engine's default. The cache holds the rank's
    share of `batch` sequences of `context` tokens, and no cached prefixes beside them.
    """
    ranks = partition.degree("batch")
    slots = -(-batch // ranks)
    device = jax.devices()[0] if partition.mesh is None else partition.mesh.devices.flat[0]
    pace = Pace.of(device.platform, None, chunk and chunk * ranks, None, slots, ranks=ranks)
    cache = memory.cache_shape(
        config,
        partition,
        UNLIMITED,
        slots=slots,
        max_model_len=context,
        page_size=EngineOptions.page_size,
        dtype=dtype,
        step_tokens=pace.token_sizes[-1],
        ahead=pace.num_decode_steps,
        enable_prefix_caching=False,
    )
    return pace, dataclasses.replace(cache, pages=slots * cache.table)


def _forward_and_sampling(pace: Pace, tokens: int, rows: int) -> list[StepShape]:
    return [StepShape(padded(tokens, pace.token_sizes), 0), StepShape(0, padded(rows, pace.row_sizes))]


def _step(
    config: ModelConfig,
    partition: Partition,
    pace: Pace,
    cache: CacheShape,
    shapes: list[StepShape],
    dtype: DTypeLike,
    sequences: int,
    tokens: int,
) -> Step:
    model = abstract_model(config, partition, dtype)
    structure, weights = Structure.of(model)
    state, generated = abstract_state(config, partition, cache, dtype)
    ranks, gathered = partition.degree("batch"), pace.row_sizes[-1]

    def program(shape: StepShape) -> Program:
        if shape.rows:
            shape = needed_shape([], dataclasses.replace(shape, features="plain" if pace.plain else "cuts"))
        forward, rows = idle_inputs(shape, ranks, cache, gathered)
        forward, rows = jax.eval_shape(lambda: (forward, rows))
        if shape.tokens and shape.rows:
            decode, held = partial(run_decode, structure, shape), (weights, state, generated)
            return Program(shape, decode, (1, 2), held, (forward, rows, None))
        if shape.tokens:
            run = partial(run_forward, structure, shape)
            return Program(shape, run, (1,), (weights, state, generated.last), (forward,))
        head = model.norm.get_value(), model.lm_head.get_value()
        hidden = _abstract((ranks, gathered, config.hidden_size), dtype, partition)
        sampling = partial(run_sampling, HeadStructure(partition, config.rms_norm_eps), shape)
        return Program(shape, sampling, (1,), (head, generated, hidden), (rows, None))

    return Step(tuple(map(program, shapes)), cache, weights, (state, generated), sequences, tokens)


def abstract_model(config: ModelConfig, partition: Partition, dtype: DTypeLike) -> GptOss:
    """The model with abstract weights sharded over the partition's mesh. Raises ShardingError."""

    def where(spec: WeightSpec) -> jax.sharding.Sharding | None:
        return partition.sharding(spec.axes, spec.name)

    abstract, prepare = abstract_creator(dtype, where), preparer(partition)

    def create(spec: WeightSpec) -> Weight:
        placed = place(spec, partition)
        return prepare(abstract(placed), placed)

    return GptOss(config, create, partition)


def abstract_state(
    config: ModelConfig, partition: Partition, shape: CacheShape, dtype: DTypeLike
) -> tuple[DeviceState, Generated]:
    """The engine's abstract state on the device, sharded over the partition's mesh."""
    cache = jax.eval_shape(lambda: KVCache.empty(config, shape, dtype, partition))
    where = partition.sharding(STORE)
    cache = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), cache)
    slots = partition.degree("batch"), shape.slots
    full, sliding = (
        _abstract((*slots, entries), jnp.int32, partition) for entries in (shape.table, shape.sliding_table)
    )
    return DeviceState(cache, full, sliding), Generated(_abstract(slots, jnp.int32, partition))


def _abstract(shape: tuple[int, ...], dtype: DTypeLike, partition: Partition) -> Any:
    """An abstract array whose first dimension is sharded over the data-parallel ranks."""
    where = partition.sharding(("batch", *(None,) * (len(shape) - 1)))
    return jax.ShapeDtypeStruct(shape, dtype, sharding=where)
