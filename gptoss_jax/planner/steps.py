"""The engine's steps with abstract, sharded arguments, for compiling without running."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from gptoss_jax.engine.engine import EngineOptions
from gptoss_jax.engine.runner import SNAPSHOTS_A_CHUNK
from gptoss_jax.engine.sampling import SamplingState
from gptoss_jax.engine.step import DeviceState, StepInputs, StepShape, Structure, run_step
from gptoss_jax.model.config import ModelConfig
from gptoss_jax.model.gpt_oss import GptOss
from gptoss_jax.model.kv_cache import STORE, CacheShape, KVCache, Segments
from gptoss_jax.model.placement import place, preparer
from gptoss_jax.model.weights import Weight, WeightSpec, abstract_creator
from sharding import Partition


@dataclasses.dataclass(frozen=True)
class Step:
    """A step shape and abstract arguments for it.

    One call processes `tokens` tokens of each of `sequences` sequences, over all devices.
    """

    structure: Structure
    shape: StepShape
    weights: list[jax.Array]
    state: DeviceState
    inputs: StepInputs
    sequences: int
    tokens: int

    def lower(self) -> jax.stages.Lowered:
        """Lower the step as the engine does, with its state donated so that the KV cache is updated in place."""
        step: Any = jax.jit(partial(run_step, self.structure, self.shape), donate_argnums=1)
        return step.lower(self.weights, self.state, self.inputs)


def decode_step(
    config: ModelConfig, partition: Partition, batch: int, context: int, dtype: DTypeLike = jnp.bfloat16
) -> Step:
    """One decode step of `batch` sequences of up to `context` tokens, with sampling. Raises ShardingError."""
    cache = cache_shape(partition, batch, context)
    shape = StepShape(
        decodes=cache.slots, prefills=0, chunk=1, pages=cache.pages // cache.slots, sampling="random"
    )
    return _step(config, partition, cache, shape, dtype, batch, 1)


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
    cache = cache_shape(partition, batch, context)
    shape = StepShape(decodes=0, prefills=1, chunk=chunk, pages=cache.pages // cache.slots, sampling="random")
    return _step(config, partition, cache, shape, dtype, partition.degree("batch"), chunk)


def cache_shape(partition: Partition, batch: int, context: int) -> CacheShape:
    """Pages and ring buffers of a data-parallel rank for its share of `batch` sequences, none for cached prefixes."""
    page_size = EngineOptions.page_size
    slots = -(-batch // partition.degree("batch"))
    return CacheShape(slots * -(-context // page_size), page_size, slots)


def _step(
    config: ModelConfig,
    partition: Partition,
    cache: CacheShape,
    shape: StepShape,
    dtype: DTypeLike,
    sequences: int,
    tokens: int,
) -> Step:
    structure, weights = abstract_model(config, partition, dtype)
    state = abstract_state(config, partition, cache, dtype)
    inputs = _inputs(shape, partition.degree("batch"))
    return Step(structure, shape, weights, state, inputs, sequences, tokens)


def abstract_model(
    config: ModelConfig, partition: Partition, dtype: DTypeLike
) -> tuple[Structure, list[jax.Array]]:
    """The model's structure, and its abstract weights sharded over the partition's mesh. Raises ShardingError."""

    def where(spec: WeightSpec) -> jax.sharding.Sharding | None:
        return partition.sharding(spec.axes, spec.name)

    abstract, prepare = abstract_creator(dtype, where), preparer(partition)

    def create(spec: WeightSpec) -> Weight:
        placed = place(spec, partition)
        return prepare(abstract(placed), placed)

    return Structure.of(GptOss(config, create, partition))


def abstract_state(config: ModelConfig, partition: Partition, shape: CacheShape, dtype: DTypeLike) -> DeviceState:
    """The engine's abstract device state, sharded over the partition's mesh."""
    cache = jax.eval_shape(lambda: KVCache.empty(config, shape, dtype, partition))
    where = partition.sharding(STORE)
    cache = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), cache)
    rows = (partition.degree("batch"), shape.slots)
    last: Any = jax.ShapeDtypeStruct(rows, jnp.int32, sharding=partition.sharding(("batch", None)))
    return DeviceState(cache, last)


def _inputs(step: StepShape, ranks: int) -> StepInputs:
    """Abstract inputs from the host, without a sharding."""

    def array(*shape: int, dtype: DTypeLike = jnp.int32) -> Any:
        return jax.ShapeDtypeStruct((ranks, *shape), dtype)

    def segments(count: int, snapshots: int) -> Segments:
        return Segments(array(count), array(count, step.pages), array(count, snapshots), array(count, snapshots))

    rows = step.decodes + step.prefills
    return StepInputs(
        decode=segments(step.decodes, 0),
        decode_positions=array(step.decodes),
        drafts=array(step.decodes, step.drafts),
        prefill=segments(step.prefills, SNAPSHOTS_A_CHUNK),
        prefill_tokens=array(step.prefills, step.chunk),
        prefill_positions=array(step.prefills, step.chunk),
        next_tokens=array(step.prefills, step.chunk),
        finishing=array(step.prefills, dtype=jnp.bool_),
        sampling=SamplingState(
            temperature=array(rows, dtype=jnp.float32),
            top_p=array(rows, dtype=jnp.float32),
            top_k=array(rows),
            min_p=array(rows, dtype=jnp.float32),
            keys=array(rows, 2, dtype=jnp.uint32),
        ),
    )
