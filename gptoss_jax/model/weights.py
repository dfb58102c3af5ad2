"""Weight definitions: each weight's name, shape, logical axes and initialiser in one `WeightSpec`.

The model asks a `Creator` for each of its weights. Different creators give a random model, an abstract one for
ahead-of-time compilation, or one read from a checkpoint.
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
"""The number of elements from which a random weight is always drawn by a jitted program, without temporary copies."""

Sharding = Callable[["WeightSpec"], jax.sharding.Sharding | None]
"""Maps a weight to its sharding, which a packed weight's blocks and scales share; None is the default device."""


@dataclasses.dataclass(frozen=True)
class WeightSpec:
    """The definition of a weight.

    Args:
      name: its Hugging Face name; packed experts omit `_blocks` and `_scales`.
      shape: its unpacked shape, the contracting dimension last.
      axes: a logical axis for each dimension, which sharding rules map to mesh axes.
      init: the initialiser of a random weight.
      packed: whether it is MXFP4 along the last dimension.
      parts: the number of matrices whose rows are interleaved (2 for gate and up).
      stored_shape: the shape in a checkpoint, where it differs on a mesh; None if it is the same.
      sources: for each dimension, the stored block that each of its equal blocks is copied from, or -1 for zeros.
        None copies the dimension in order and pads it with zeros at the end.
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
        """The shape of a packed weight's scales; its blocks have a further dimension of 16 bytes."""
        return (*self.shape[:-1], self.shape[-1] // GROUP)

    @property
    def stored(self) -> WeightSpec:
        """The weight's spec in a checkpoint, without padding."""
        if self.stored_shape is None:
            return self
        return dataclasses.replace(self, shape=self.stored_shape, stored_shape=None, sources=())


Creator = Callable[[WeightSpec], Weight]


def abstract_creator(dtype: DTypeLike = jnp.bfloat16, sharding: Sharding | None = None) -> Creator:
    """A creator of abstract weights (shape, dtype and sharding), for compiling without allocating memory."""

    def create(spec: WeightSpec) -> Weight:
        place = sharding(spec) if sharding else None
        if spec.packed:
            blocks = jax.ShapeDtypeStruct((*spec.groups_shape, GROUP // 2), jnp.uint8, sharding=place)
            scales = jax.ShapeDtypeStruct(spec.groups_shape, jnp.uint8, sharding=place)
            return MXFP4Tensor(blocks, scales)  # type: ignore[arg-type]
        return jax.ShapeDtypeStruct(spec.shape, dtype, sharding=place)  # type: ignore[return-value]

    return create


def random_creator(key: jax.Array, dtype: DTypeLike = jnp.bfloat16, sharding: Sharding | None = None) -> Creator:
    """A creator of random weights of realistic magnitude; packed weights are drawn packed, without a float copy.

    A weight's values depend only on `key` and its name, not on other weights, `sharding` or padding, which is zero.
    With `sharding` and a threefry key, each device draws its own shard. Other generators' values depend on the
    sharding, so every device draws the whole weight and keeps its shard.
    """
    # All layers share a program: their weights differ only in the name.
    programs: dict[tuple[WeightSpec, jax.sharding.Sharding | None], Callable[[jax.Array, np.uint32], Weight]] = {}
    anywhere = not _is_hardware(key)

    @functools.cache
    def replicated_key(place: jax.sharding.Sharding | None) -> jax.Array:
        """The key, copied from the host to every device of the mesh, so that drawing needs no device-to-device copy."""
        if place is None:
            return key
        data = put(np.asarray(jax.random.key_data(key)), place)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(key))

    def create(spec: WeightSpec) -> Weight:
        place, name_hash = sharding(spec) if sharding else None, np.uint32(_stable_hash(spec.name))
        options = in_order(place.mesh if isinstance(place, jax.sharding.NamedSharding) else None)
        # Small weights on the default device need no jitted program, unless it takes compiler options.
        if place is None and options is None and math.prod(spec.shape) < LARGE:
            return _padded(_random(jax.random.fold_in(key, name_hash), spec.stored, dtype), spec)
        program_key, whole = (dataclasses.replace(spec, name=""), place), _replicated(place)
        if program_key not in programs:
            programs[program_key] = jax.jit(
                functools.partial(_draw, spec=spec, dtype=dtype, whole=None if anywhere else whole),
                out_shardings=place,
                compiler_options=options,
            )
        return programs[program_key](replicated_key(whole), name_hash)

    return create


def _draw(
    key: jax.Array, name_hash: jax.Array, spec: WeightSpec, dtype: DTypeLike, whole: jax.sharding.Sharding | None
) -> Weight:
    weight = _random(jax.random.fold_in(key, name_hash), spec.stored, dtype)
    if whole is not None:
        weight = jax.lax.with_sharding_constraint(weight, whole)
    return _padded(weight, spec)


def _replicated(place: jax.sharding.Sharding | None) -> jax.sharding.Sharding | None:
    """The replicated sharding over the same devices."""
    if isinstance(place, jax.sharding.NamedSharding):
        return jax.sharding.NamedSharding(place.mesh, jax.sharding.PartitionSpec())
    return place


def _random(key: jax.Array, spec: WeightSpec, dtype: DTypeLike) -> Weight:
    if spec.packed:
        return _random_packed(key, spec)
    if spec.init == "normal":
        # Keeps a product's outputs at the magnitude of its inputs.
        scale = 1 / math.sqrt(spec.shape[-1]) if len(spec.shape) > 1 else 0.1

        def some(key: jax.Array, rows: int) -> jax.Array:
            return (jax.random.normal(key, (rows, *spec.shape[1:]), jnp.float32) * scale).astype(dtype)

        # Piece by piece: the random bits and float32 values of a whole embedding table would take four times its size.
        pieces = math.gcd(spec.shape[0], 64) if math.prod(spec.shape) > LARGE and _is_hardware(key) else 1
        if pieces == 1:
            return some(key, spec.shape[0])
        drawn = jax.lax.map(lambda own: some(own, spec.shape[0] // pieces), jax.random.split(key, pieces))
        return drawn.reshape(spec.shape)
    return jnp.full(spec.shape, 1.0 if spec.init == "ones" else 0.0, dtype)


def _is_hardware(key: jax.Array) -> bool:
    """Whether the key's generator is the hardware's, whose values depend on the sharding of the array drawn."""
    return "threefry" not in str(jax.random.key_impl(key))


def _padded(weight: Weight, spec: WeightSpec) -> Weight:
    """The weight padded with zeros to its shape on the mesh; MXFP4 blocks and scales of zero bytes decode to zero."""
    if spec.stored_shape is None:
        return weight
    shape = spec.groups_shape if spec.packed else spec.shape

    def pad(array: jax.Array) -> jax.Array:
        full = (*shape, *array.shape[len(shape) :])
        return jnp.pad(array, [(0, size - stored) for size, stored in zip(full, array.shape, strict=True)])

    return jax.tree.map(pad, weight)


def _random_packed(key: jax.Array, spec: WeightSpec) -> MXFP4Tensor:
    """Uniform nibbles (root mean square 2.92) with scales that give rows a norm of about 1 or 2."""
    blocks_key, scales_key = jax.random.split(key)
    centre = 127 - round(math.log2(2.92 * math.sqrt(spec.shape[-1])))
    # Drawing single bytes would need four times their size in temporaries.
    words = jax.random.bits(blocks_key, (*spec.groups_shape, GROUP // 8), jnp.uint32)
    blocks = jax.lax.bitcast_convert_type(words, jnp.uint8).reshape(*spec.groups_shape, GROUP // 2)
    scales = jax.random.bits(scales_key, spec.groups_shape, jnp.uint8) & 1
    return MXFP4Tensor(blocks, (scales + jnp.uint8(centre)).astype(jnp.uint8))


def _stable_hash(name: str) -> int:
    """A 31-bit hash that, unlike hash(), is the same in every process."""
    return zlib.crc32(name.encode()) & 0x7FFFFFFF
