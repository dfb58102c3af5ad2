"""The steps that serve a model, as functions of abstract arrays that lie on a mesh: compiled, never run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from gptoss_jax.config import ModelConfig
from gptoss_jax.engine.sampling import SamplingState, logprobs_of, sample
from gptoss_jax.kv_cache import LAYER_AXES, KVCache, LayerCache
from gptoss_jax.model import GptOss
from gptoss_jax.placement import place
from gptoss_jax.weights import WeightSpec, abstract_creator
from sharding import Partition, on_shards

TOP_LOGPROBS = 20
"""How many of the likeliest tokens a step reports."""


@dataclasses.dataclass(frozen=True)
class Step:
    """A step's function and its abstract arguments.

    `sequences` and `tokens` are what all devices together advance in one call: sequences, and tokens of each.
    """

    function: Callable[..., Any]
    weights: Any
    cache: KVCache
    inputs: tuple[Any, ...]
    sequences: int
    tokens: int

    def lower(self) -> jax.stages.Lowered:
        """Trace the step; the cache is donated, so that it is updated in place."""
        places = jax.tree.map(lambda x: x.sharding, self.cache)
        jitted = jax.jit(self.function, donate_argnames="cache", out_shardings=(None, places))
        return jitted.lower(self.weights, self.cache, *self.inputs)


def abstract_model(
    config: ModelConfig, partition: Partition, dtype: DTypeLike
) -> tuple[nnx.GraphDef[GptOss], nnx.State]:
    """The model's structure, and its weights as shapes laid out on the partition's mesh. Raises ShardingError."""

    def where(spec: WeightSpec) -> jax.sharding.Sharding | None:
        return partition.sharding(spec.axes, spec.name)

    create = abstract_creator(dtype, where)
    return nnx.split(GptOss(config, lambda spec: create(place(spec, partition)), partition))


def abstract_cache(
    config: ModelConfig, partition: Partition, batch: int, context: int, dtype: DTypeLike
) -> KVCache:
    """A cache of `batch` sequences of `context` tokens; where they do not divide, each device has all of them."""
    shapes = jax.eval_shape(lambda: KVCache.empty(config, batch, context, dtype, partition))

    def placed(x: Any, axes: Any) -> Any:
        return _array(partition, x.shape, x.dtype, axes)

    return KVCache(
        tuple(
            LayerCache(placed(layer.kv, LAYER_AXES.kv), placed(layer.positions, LAYER_AXES.positions))
            for layer in shapes.layers
        )
    )


def decode_step(
    config: ModelConfig, partition: Partition, batch: int, context: int, dtype: DTypeLike = jnp.bfloat16
) -> Step:
    """One token of each of `batch` sequences of up to `context` tokens, sampling included."""
    graph, weights = abstract_model(config, partition, dtype)
    cache = abstract_cache(config, partition, batch, context, dtype)
    tokens = _array(partition, (batch,), jnp.int32)
    inputs = (tokens, tokens, _sampling(partition, batch))
    return Step(partial(_decode, graph), weights, cache, inputs, batch, 1)


def prefill_step(
    config: ModelConfig,
    partition: Partition,
    batch: int,
    context: int,
    chunk: int,
    dtype: DTypeLike = jnp.bfloat16,
) -> Step:
    """A chunk of prompt into the cache of `batch` sequences: of one sequence, or of one on each part of the batch."""
    graph, weights = abstract_model(config, partition, dtype)
    cache = abstract_cache(config, partition, batch, context, dtype)
    parts = partition.degree("batch")
    rows = parts if batch % parts == 0 else 1
    tokens = _array(partition, (rows, chunk), jnp.int32)
    slots = _array(partition, (rows,), jnp.int32)
    inputs = (tokens, tokens, slots, _sampling(partition, rows))
    return Step(partial(_prefill, graph), weights, cache, inputs, rows, chunk)


def _array(
    partition: Partition, shape: tuple[int, ...], dtype: DTypeLike, axes: Any = None
) -> jax.ShapeDtypeStruct:
    spec = PartitionSpec() if axes is None else partition.spec(axes, shape)
    sharding = None if partition.mesh is None else NamedSharding(partition.mesh, spec)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def _sampling(partition: Partition, batch: int) -> SamplingState:
    def array(dtype: DTypeLike, *shape: int) -> Any:
        return _array(partition, (batch, *shape), dtype)

    return SamplingState(
        temperature=array(jnp.float32),
        top_p=array(jnp.float32),
        top_k=array(jnp.int32),
        min_p=array(jnp.float32),
        keys=array(jnp.uint32, 2),
    )


def _sampled(logits_BV: jax.Array, sampling: SamplingState, positions_B: jax.Array) -> tuple[Any, ...]:
    tokens_B = sample(logits_BV, sampling, positions_B)
    return tokens_B, *logprobs_of(logits_BV, tokens_B, min(TOP_LOGPROBS, logits_BV.shape[-1]))


def _decode(
    graph: nnx.GraphDef[GptOss],
    weights: nnx.State,
    cache: KVCache,
    tokens_B: jax.Array,
    positions_B: jax.Array,
    sampling: SamplingState,
) -> tuple[tuple[Any, ...], KVCache]:
    model = nnx.merge(graph, weights)
    x_B1D, cache = model.hidden(tokens_B[:, None], positions_B[:, None], cache)
    return _sampled(model.unembed(x_B1D[:, 0]), sampling, positions_B), cache


def _prefill(
    graph: nnx.GraphDef[GptOss],
    weights: nnx.State,
    cache: KVCache,
    tokens_RT: jax.Array,
    positions_RT: jax.Array,
    slots_R: jax.Array,
    sampling: SamplingState,
) -> tuple[tuple[Any, ...], KVCache]:
    """`slots_R` counts sequences within their part of the batch, so that no device needs another's cache."""
    model = nnx.merge(graph, weights)
    layers = KVCache((LAYER_AXES,) * len(cache.layers))
    batch = len(cache.layers[0].positions)
    with model.partition.active():
        own = on_shards(
            lambda cache, slots: cache.slot(slots[0], keep=jnp.asarray(True)),
            {"cache": (cache, layers), "slots": (slots_R, ("batch",))},
            layers,
            batch=batch,
        )
    x_RTD, own = model.hidden(tokens_RT, positions_RT, own)
    last_R = jnp.sum(positions_RT >= 0, axis=1) - 1
    x_RD = jnp.take_along_axis(x_RTD, last_R[:, None, None], axis=1)[:, 0]
    with model.partition.active():
        cache = on_shards(
            lambda cache, slots, own: cache.with_slot(slots[0], own),
            {"cache": (cache, layers), "slots": (slots_R, ("batch",)), "own": (own, layers)},
            layers,
            batch=batch,
        )
    positions_R = jnp.take_along_axis(positions_RT, last_R[:, None], axis=1)[:, 0]
    return _sampled(model.unembed(x_RD), sampling, positions_R), cache
