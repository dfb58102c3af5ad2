"""One definition a weight: name, shape, logical axes and initialiser stand together, once.

The model asks a `Creator` for each of its weights. What the creator does with the definition makes the
difference between a random model, an abstract one for ahead-of-time compiles, and one read from a checkpoint.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import zlib
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from gptoss_jax.model.mxfp4 import GROUP, MXFP4Tensor
from gptoss_jax.runtime.xla_options import in_order
from pallas_kernels.mxfp4_matmul import PackedExperts
from sharding import put

Weight = jax.Array | PackedExperts

LARGE = 1 << 24
"""Elements from which a random weight is always drawn in one program, which holds no copies in between."""

Sharding = Callable[["WeightSpec"], jax.sharding.Sharding | None]
"""Tells where a weight goes: of packed ones, blocks and scales alike; None is the default device."""


@dataclasses.dataclass(frozen=True)
class WeightSpec:
    """A weight as the model declares it.

    `name` is its Hugging Face name (of packed experts, without `_blocks` and `_scales`) and `shape` its unpacked
    shape, the contracting dimension last. `axes` names a logical axis for each dimension, which sharding rules
    map to a mesh. `packed` tells whether it is MXFP4 along the last dimension, and `parts` of how many matrices the
    rows alternate (gate and up).

    A weight on a mesh may differ from what a checkpoint stores, whose shape `stored_shape` then is (None: the same).
    Where a dimension has `sources`, its i-th equal part is the stored part `sources[i]`, or zeros for -1; else what
    is beyond the stored size is zeros at the end.
    """

    name: str
    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: Literal["normal", "zeros", "ones"] = "normal"
    packed: bool = False
    parts: int = 1
    stored_shape: tuple[int, ...] | None = None
    sources: tuple[tuple[int, ...] | None, ...] = ()

    def __post_init__(self) -> None:
        if len(self.shape) != len(self.axes):
            raise ValueError(f"{self.name}: {len(self.shape)} dimensions but {len(self.axes)} axes")
        stored = self.stored_shape
        if stored and (
            len(stored) != len(self.shape) or any(a > b for a, b in zip(stored, self.shape, strict=True))
        ):
            raise ValueError(f"{self.name}: stored shape {stored} does not fit into {self.shape}")

    @property
    def groups_shape(self) -> tuple[int, ...]:
        """Shape of the scales of a packed weight; its blocks have a further dimension of 16."""
        return (*self.shape[:-1], self.shape[-1] // GROUP)

    @property
    def stored(self) -> WeightSpec:
        """The weight as a checkpoint holds it, without padding."""
        if self.stored_shape is None:
            return self
        return dataclasses.replace(self, shape=self.stored_shape, stored_shape=None, sources=())


Creator = Callable[[WeightSpec], Weight]


def abstract_creator(dtype: DTypeLike = jnp.bfloat16, sharding: Sharding | None = None) -> Creator:
    """Weights that are only shapes, dtypes and shardings, for compiling without memory."""

    def create(spec: WeightSpec) -> Weight:
        place = sharding(spec) if sharding else None
        if spec.packed:
            blocks = jax.ShapeDtypeStruct((*spec.groups_shape, GROUP // 2), jnp.uint8, sharding=place)
            scales = jax.ShapeDtypeStruct(spec.groups_shape, jnp.uint8, sharding=place)
            return MXFP4Tensor(blocks, scales)  # type: ignore[arg-type]
        return jax.ShapeDtypeStruct(spec.shape, dtype, sharding=place)  # type: ignore[return-value]

    return create


def random_creator(key: jax.Array, dtype: DTypeLike = jnp.bfloat16, sharding: Sharding | None = None) -> Creator:
    """Random weights of sensible size, packed ones drawn packed, so that no float copy of them ever exists.

    A weight's numbers depend on `key` and its name alone: not on which others are made or in what order, not on
    `sharding`, and not on padding, which is zero. With `sharding`, threefry keys draw each shard where it lives;
    other generators' numbers would depend on the sharding, so every device draws the whole weight and keeps its
    shard.
    """
    # One program for all layers: their weights differ in the name only.
    programs: dict[tuple[WeightSpec, jax.sharding.Sharding | None], Callable[[jax.Array, np.uint32], Weight]] = {}
    anywhere = not _is_hardware(key)

    @functools.cache
    def everywhere(place: jax.sharding.Sharding | None) -> jax.Array:
        """The key on every device of a mesh, put there by the host, so that drawing copies nothing between devices."""
        if place is None:
            return key
        data = put(np.asarray(jax.random.key_data(key)), place)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(key))

    def create(spec: WeightSpec) -> Weight:
        place, name_hash = sharding(spec) if sharding else None, np.uint32(_stable_hash(spec.name))
        options = in_order(place.mesh if isinstance(place, jax.sharding.NamedSharding) else None)
        # Without a program of its own, if that needs no options.
        if place is None and options is None and math.prod(spec.shape) < LARGE:
            return _padded(_random(jax.random.fold_in(key, name_hash), spec.stored, dtype), spec)
        kind, whole = (dataclasses.replace(spec, name=""), place), _replicated(place)
        if kind not in programs:
            programs[kind] = jax.jit(
                functools.partial(_draw, spec=spec, dtype=dtype, whole=None if anywhere else whole),
                out_shardings=place,
                compiler_options=options,
            )
        return programs[kind](everywhere(whole), name_hash)

    return create


def _draw(
    key: jax.Array, name_hash: jax.Array, spec: WeightSpec, dtype: DTypeLike, whole: jax.sharding.Sharding | None
) -> Weight:
    weight = _random(jax.random.fold_in(key, name_hash), spec.stored, dtype)
    if whole is not None:
        weight = jax.lax.with_sharding_constraint(weight, whole)
    return _padded(weight, spec)


def _replicated(place: jax.sharding.Sharding | None) -> jax.sharding.Sharding | None:
    """On all devices of the place, whole."""
    if isinstance(place, jax.sharding.NamedSharding):
        return jax.sharding.NamedSharding(place.mesh, jax.sharding.PartitionSpec())
    return place


def _random(key: jax.Array, spec: WeightSpec, dtype: DTypeLike) -> Weight:
    if spec.packed:
        return _random_packed(key, spec)
    if spec.init == "normal":
        # Keeps the sum over the contracting dimension near the size of one term's partner.
        scale = 1 / math.sqrt(spec.shape[-1]) if len(spec.shape) > 1 else 0.1

        def some(key: jax.Array, rows: int) -> jax.Array:
            return (jax.random.normal(key, (rows, *spec.shape[1:]), jnp.float32) * scale).astype(dtype)

        # Piece by piece: float32 and bits of a released model's vocabulary would be four times its size.
        pieces = math.gcd(spec.shape[0], 64) if math.prod(spec.shape) > LARGE and _is_hardware(key) else 1
        if pieces == 1:
            return some(key, spec.shape[0])
        drawn = jax.lax.map(lambda own: some(own, spec.shape[0] // pieces), jax.random.split(key, pieces))
        return drawn.reshape(spec.shape)
    return jnp.full(spec.shape, 1.0 if spec.init == "ones" else 0.0, dtype)


def _is_hardware(key: jax.Array) -> bool:
    """Whether a key's generator draws an array as a whole, so that its numbers depend on the array's sharding."""
    return "threefry" not in str(jax.random.key_impl(key))


def _padded(weight: Weight, spec: WeightSpec) -> Weight:
    """Zero blocks under zero scales are zero as plain values are."""
    if spec.stored_shape is None:
        return weight
    shape = spec.groups_shape if spec.packed else spec.shape

    def pad(array: jax.Array) -> jax.Array:
        full = (*shape, *array.shape[len(shape) :])
        return jnp.pad(array, [(0, size - stored) for size, stored in zip(full, array.shape, strict=True)])

    return jax.tree.map(pad, weight)


def _random_packed(key: jax.Array, spec: WeightSpec) -> MXFP4Tensor:
    """Uniform nibbles (root mean square 2.92) under scales that bring a row's norm to 1 or 2."""
    blocks_key, scales_key = jax.random.split(key)
    centre = 127 - round(math.log2(2.92 * math.sqrt(spec.shape[-1])))
    # Bytes drawn one by one would take four times their size while they are made.
    words = jax.random.bits(blocks_key, (*spec.groups_shape, GROUP // 8), jnp.uint32)
    blocks = jax.lax.bitcast_convert_type(words, jnp.uint8).reshape(*spec.groups_shape, GROUP // 2)
    scales = jax.random.bits(scales_key, spec.groups_shape, jnp.uint8) & 1
    return MXFP4Tensor(blocks, (scales + jnp.uint8(centre)).astype(jnp.uint8))


def _stable_hash(name: str) -> int:
    """31 bits that do not change between processes, unlike hash()."""
    return zlib.crc32(name.encode()) & 0x7FFFFFFF
