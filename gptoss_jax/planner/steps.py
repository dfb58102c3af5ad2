"""The engine's steps for abstract arrays that lie on a mesh: compiled, never run."""

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
    """A step and its abstract arguments.

    `sequences` and `tokens` are what all devices together advance in one call: sequences, and tokens of each.
    """

    structure: Structure
    kind: StepShape
    weights: list[jax.Array]
    state: DeviceState
    inputs: StepInputs
    sequences: int
    tokens: int

    def lower(self) -> jax.stages.Lowered:
        """Trace the step as the engine does: its state is donated, so that the cache is updated in place."""
        step: Any = jax.jit(partial(run_step, self.structure, self.kind), donate_argnums=1)
        return step.lower(self.weights, self.state, self.inputs)


def decode_step(
    config: ModelConfig, partition: Partition, batch: int, context: int, dtype: DTypeLike = jnp.bfloat16
) -> Step:
    """One token of each of `batch` sequences of up to `context` tokens, sampling included. Raises ShardingError."""
    shape = cache_shape(partition, batch, context)
    kind = StepShape(decodes=shape.slots, prefills=0, chunk=1, pages=shape.pages // shape.slots, sampling="random")
    return _step(config, partition, shape, kind, dtype, batch, 1)


def prefill_step(
    config: ModelConfig,
    partition: Partition,
    batch: int,
    context: int,
    chunk: int,
    dtype: DTypeLike = jnp.bfloat16,
) -> Step:
    """A chunk of one prompt in each part of the batch, into the cache of `batch` sequences. Raises ShardingError."""
    shape = cache_shape(partition, batch, context)
    kind = StepShape(decodes=0, prefills=1, chunk=chunk, pages=shape.pages // shape.slots, sampling="random")
    return _step(config, partition, shape, kind, dtype, partition.degree("batch"), chunk)


def cache_shape(partition: Partition, batch: int, context: int) -> CacheShape:
    """Pages and rings in each part of the batch for its share of `batch` sequences, and none for cached prefixes."""
    page_size = EngineOptions.page_size
    slots = -(-batch // partition.degree("batch"))
    return CacheShape(slots * -(-context // page_size), page_size, slots)


def _step(
    config: ModelConfig,
    partition: Partition,
    shape: CacheShape,
    kind: StepShape,
    dtype: DTypeLike,
    sequences: int,
    tokens: int,
) -> Step:
    structure, weights = abstract_model(config, partition, dtype)
    state = abstract_state(config, partition, shape, dtype)
    inputs = _inputs(kind, partition.degree("batch"))
    return Step(structure, kind, weights, state, inputs, sequences, tokens)


def abstract_model(
    config: ModelConfig, partition: Partition, dtype: DTypeLike
) -> tuple[Structure, list[jax.Array]]:
    """The model's structure, and its weights as shapes laid out on the partition's mesh. Raises ShardingError."""

    def where(spec: WeightSpec) -> jax.sharding.Sharding | None:
        return partition.sharding(spec.axes, spec.name)

    abstract, prepare = abstract_creator(dtype, where), preparer(partition)

    def create(spec: WeightSpec) -> Weight:
        placed = place(spec, partition)
        return prepare(abstract(placed), placed)

    return Structure.of(GptOss(config, create, partition))


def abstract_state(config: ModelConfig, partition: Partition, shape: CacheShape, dtype: DTypeLike) -> DeviceState:
    """What the engine keeps on the devices, as shapes laid out on the partition's mesh."""
    cache = jax.eval_shape(lambda: KVCache.empty(config, shape, dtype, partition))
    where = partition.sharding(STORE)
    cache = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), cache)
    rows = (partition.degree("batch"), shape.slots)
    last: Any = jax.ShapeDtypeStruct(rows, jnp.int32, sharding=partition.sharding(("batch", None)))
    return DeviceState(cache, last)


def _inputs(kind: StepShape, parts: int) -> StepInputs:
    """What the host hands over, which has no place yet."""

    def array(*shape: int, dtype: DTypeLike = jnp.int32) -> Any:
        return jax.ShapeDtypeStruct((parts, *shape), dtype)

    def segments(count: int, snapshots: int) -> Segments:
        return Segments(array(count), array(count, kind.pages), array(count, snapshots), array(count, snapshots))

    rows = kind.decodes + kind.prefills
    return StepInputs(
        decode=segments(kind.decodes, 0),
        decode_positions=array(kind.decodes),
        drafts=array(kind.decodes, kind.drafts),
        prefill=segments(kind.prefills, SNAPSHOTS_A_CHUNK),
        prefill_tokens=array(kind.prefills, kind.chunk),
        prefill_positions=array(kind.prefills, kind.chunk),
        next_tokens=array(kind.prefills, kind.chunk),
        finishing=array(kind.prefills, dtype=jnp.bool_),
        sampling=SamplingState(
            temperature=array(rows, dtype=jnp.float32),
            top_p=array(rows, dtype=jnp.float32),
            top_k=array(rows),
            min_p=array(rows, dtype=jnp.float32),
            keys=array(rows, 2, dtype=jnp.uint32),
        ),
    )
