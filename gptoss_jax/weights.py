"""One definition a weight: name, shape, logical axes and initialiser stand together, once.

The model asks a `Creator` for each of its weights. What the creator does with the definition makes the
difference between a random model, an abstract one for ahead-of-time compiles, and one read from a checkpoint.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from gptoss_jax.mxfp4 import GROUP, MXFP4Tensor

Weight = jax.Array | MXFP4Tensor


@dataclasses.dataclass(frozen=True)
class WeightSpec:
    """A weight as the model declares it.

    `name` is its Hugging Face name (of packed experts, without `_blocks` and `_scales`) and `shape` its unpacked
    shape, the contracting dimension last. `axes` names a logical axis for each dimension, which sharding rules
    map to a mesh. `packed` tells whether it is MXFP4 along the last dimension.

    A weight on a mesh may differ from what a checkpoint stores, whose shape `stored_shape` then is (None: the same).
    Where a dimension has `sources`, its i-th equal part is the stored part `sources[i]`, or zeros for -1; else what
    is beyond the stored size is zeros at the end.
    """

    name: str
    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: Literal["normal", "zeros", "ones"] = "normal"
    packed: bool = False
    stored_shape: tuple[int, ...] | None = None
    sources: tuple[tuple[int, ...] | None, ...] = ()

    def __post_init__(self) -> None:
        if len(self.shape) != len(self.axes):
            raise ValueError(f"{self.name}: {len(self.shape)} dimensions but {len(self.axes)} axes")

    @property
    def groups_shape(self) -> tuple[int, ...]:
        """Shape of the scales of a packed weight; its blocks have a further dimension of 16."""
        return (*self.shape[:-1], self.shape[-1] // GROUP)


Creator = Callable[[WeightSpec], Weight]


def abstract_creator(dtype: DTypeLike = jnp.bfloat16) -> Creator:
    """Weights that are only shapes and dtypes, for compiling without memory."""

    def create(spec: WeightSpec) -> Weight:
        if spec.packed:
            blocks = jax.ShapeDtypeStruct((*spec.groups_shape, GROUP // 2), jnp.uint8)
            return MXFP4Tensor(blocks, jax.ShapeDtypeStruct(spec.groups_shape, jnp.uint8))  # type: ignore[arg-type]
        return jax.ShapeDtypeStruct(spec.shape, dtype)  # type: ignore[return-value]

    return create


def random_creator(key: jax.Array, dtype: DTypeLike = jnp.bfloat16) -> Creator:
    """Random weights of sensible size, packed ones drawn packed, so that no float copy of them ever exists.

    A weight's numbers depend on `key` and its name alone, not on which others are made or in what order.
    """

    def create(spec: WeightSpec) -> Weight:
        own_key = jax.random.fold_in(key, _stable_hash(spec.name))
        if spec.packed:
            return _random_packed(own_key, spec)
        if spec.init == "normal":
            # Keeps the sum over the contracting dimension near the size of one term's partner.
            scale = 1 / math.sqrt(spec.shape[-1]) if len(spec.shape) > 1 else 0.1
            return (jax.random.normal(own_key, spec.shape, jnp.float32) * scale).astype(dtype)
        return jnp.full(spec.shape, 1.0 if spec.init == "ones" else 0.0, dtype)

    return create


def _random_packed(key: jax.Array, spec: WeightSpec) -> MXFP4Tensor:
    """Uniform nibbles (root mean square 2.92) under scales that bring a row's norm to 1 or 2."""
    blocks_key, scales_key = jax.random.split(key)
    centre = 127 - round(math.log2(2.92 * math.sqrt(spec.shape[-1])))
    blocks = jax.random.bits(blocks_key, (*spec.groups_shape, GROUP // 2), jnp.uint8)
    scales = jax.random.bits(scales_key, spec.groups_shape, jnp.uint8) & 1
    return MXFP4Tensor(blocks, (scales + jnp.uint8(centre)).astype(jnp.uint8))


def _stable_hash(name: str) -> int:
    """31 bits that do not change between processes, unlike hash()."""
    return zlib.crc32(name.encode()) & 0x7FFFFFFF
