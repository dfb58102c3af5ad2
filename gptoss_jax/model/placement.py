"""A model's partition over a mesh, and the layout of each weight on it."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptoss_jax.errors import expect
from gptoss_jax.model.config import ModelConfig
from gptoss_jax.model.mxfp4 import GROUP, MXFP4Tensor
from gptoss_jax.model.weights import Weight, WeightSpec
from gptoss_jax.runtime.xla_options import in_order
from pallas_kernels.mxfp4_matmul import Layout, PackedExperts, current_layout
from sharding import Partition, ShardingRules, make_mesh, on_shards, put

_logger = logging.getLogger(__name__)

GRANULARITY = (("experts", 1), ("expert_gate_up", 2 * GROUP), ("expert_intermediate", GROUP))
"""Axes that may be padded with zeros without changing results, and the smallest unit of each.

A padding expert is never chosen, and padding rows and columns only multiply zeros. The intermediate dimension is
packed in groups of 32, which are never split; the gate and up rows are interleaved in pairs.
"""


def partition_for(
    config: ModelConfig,
    mesh: str | jax.sharding.Mesh | None = None,
    rules: ShardingRules | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> Partition:
    """A model's partition over a mesh (see `sharding.make_mesh`), or on one device if `mesh` is None.

    Raises ShardingError, and UsageError for arguments of another type.
    """
    expect(isinstance(mesh, str | jax.sharding.Mesh | None), "mesh", "text or a jax.sharding.Mesh", mesh)
    expect(isinstance(rules, ShardingRules | None), "rules", "ShardingRules", rules)
    return Partition(
        None if mesh is None else make_mesh(mesh, devices),
        rules or ShardingRules(),
        config.num_attention_heads,
        config.num_key_value_heads,
        GRANULARITY,
    )


def place(spec: WeightSpec, partition: Partition) -> WeightSpec:
    """A weight's spec on the mesh: padded where needed to divide evenly, its heads in the mesh's order.

    Raises ShardingError for a weight that cannot be split by the rules.
    """
    partition.rules.spec(spec.axes, spec.name)
    heads = {"heads": partition.heads.q_sources, "kv_heads": partition.heads.kv_sources}
    counts = {"heads": partition.num_heads, "kv_heads": partition.num_kv_heads}
    shape: list[int] = []
    sources: list[tuple[int, ...] | None] = []
    for axis, size in zip(spec.axes, spec.shape, strict=True):
        if axis is not None and axis in heads:
            unit = size // counts[axis]
            shape.append(unit * len(heads[axis]))
            as_stored = heads[axis] == tuple(range(counts[axis]))
            sources.append(None if as_stored else heads[axis])
        else:
            shape.append(partition.padded_size(axis, size, spec.name))
            sources.append(None)
    return dataclasses.replace(spec, shape=tuple(shape), stored_shape=spec.shape, sources=tuple(sources))


def place_heads(weight: jax.Array, spec: WeightSpec, partition: Partition) -> jax.Array:
    """Shard a whole weight over the mesh, with its heads arranged by the `sources` of `spec` (see `place`).

    The host arranges the heads: on a device, the weight would be held twice and copied on to the others.
    """
    host = np.asarray(weight)
    for dim, sources in enumerate(spec.sources):
        if sources is not None:
            heads = np.split(host, host.shape[dim] // (spec.shape[dim] // len(sources)), axis=dim)
            zeros = np.zeros_like(heads[0])
            host = np.concatenate([zeros if i < 0 else heads[i] for i in sources], axis=dim)
    return put(host, partition.sharding(spec.axes, spec.name))


def preparer(partition: Partition) -> Callable[[Weight, WeightSpec], Weight]:
    """A function that converts packed experts to the layout of the devices' kernels, and returns other weights as is.

    The conversion is bit-exact. Each device converts its own shard, one expert at a time. Abstract weights give
    abstract weights. Drop the function after use: its compiled programs hold device memory while they live.
    """
    program = functools.cache(functools.partial(_preparation, partition))

    def prepare(weight: Weight, spec: WeightSpec) -> Weight:
        if not isinstance(weight, MXFP4Tensor):
            return weight
        with partition.on_its_devices():
            layout = current_layout()
            if layout is None:
                return weight
            run = program(layout, spec.parts, spec.axes)
            if isinstance(weight.scales, jax.ShapeDtypeStruct):
                return _placed(jax.eval_shape(run, weight)[0], spec, partition)
            prepared, largest_scale = run(weight)
        if int(largest_scale) > layout.largest_scale:
            _logger.warning(
                "%s: a scale of 2^%d is too large for the kernels", spec.name, int(largest_scale) - 127
            )
            return weight
        return prepared

    return prepare


def _preparation(
    partition: Partition, layout: Layout, parts: int, axes: tuple[str | None, ...]
) -> Callable[[MXFP4Tensor], tuple[PackedExperts, jax.Array]]:
    """A jitted function that converts a weight with these axes, and returns its largest scale byte."""

    def one(expert: MXFP4Tensor) -> PackedExperts:
        prepared = layout.prepare(jax.tree.map(lambda x: x[None], expert), parts)
        return jax.tree.map(lambda x: x[0], prepared)

    def shard(packed: MXFP4Tensor) -> PackedExperts:
        return jax.lax.map(one, packed)

    @functools.partial(jax.jit, compiler_options=in_order(partition.mesh))
    def run(packed: MXFP4Tensor) -> tuple[PackedExperts, jax.Array]:
        own = jax.tree.map(partition.shard_of, packed, packed.axes(axes))
        out_axes = jax.eval_shape(shard, own).axes(axes)
        with partition.active():
            prepared = on_shards(shard, {"packed": (packed, packed.axes(axes))}, out_axes, batch=1)
        return prepared, jnp.max(packed.scales)

    return run


def _placed(weight: Any, spec: WeightSpec, partition: Partition) -> Any:
    """Abstract arrays with the shardings of the spec's axes."""

    def place(x: jax.ShapeDtypeStruct, axes: tuple[str | None, ...]) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=partition.sharding(axes, spec.name))

    return jax.tree.map(place, weight, weight.axes(spec.axes))
