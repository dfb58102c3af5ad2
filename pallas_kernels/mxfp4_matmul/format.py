"""MXFP4, the format of the released experts: four-bit floats in groups of 32 that share a power-of-two scale.

The format is MXFP4 of the OCP Microscaling specification 1.0, in the layout of the released files: along the
last (contracting) dimension each group of 32 values is 16 bytes, the low nibble first, and one scale byte.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

GROUP = 32
"""Values that share a scale."""

E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Values of the three low bits of a nibble; the fourth bit is the sign."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MXFP4Tensor:
    """A tensor of shape [..., K], packed along K.

    `blocks` is uint8 [..., K/32, 16] (the low nibble of byte i is value 2i of its group) and `scales` is uint8
    [..., K/32], where a byte s means 2^(s-127). 255 means NaN, and is rejected when a checkpoint is read.
    """

    blocks: jax.Array
    scales: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the unpacked tensor."""
        return (*self.scales.shape[:-1], self.scales.shape[-1] * GROUP)

    def __getitem__(self, index: int | jax.Array) -> MXFP4Tensor:
        """The packed slice at `index` of the first dimension, for instance one expert."""
        return MXFP4Tensor(self.blocks[index], self.scales[index])

    def axes(self, logical: tuple[str | None, ...]) -> MXFP4Tensor:
        """The names of the blocks' and the scales' dimensions, from those of the unpacked tensor's."""
        return MXFP4Tensor((*logical, None), logical)  # type: ignore[arg-type]


def dequantize(packed: MXFP4Tensor, dtype: DTypeLike = jnp.float32) -> jax.Array:
    """Unpack to [..., K]; exact in float32, and in bfloat16 for values that are normal numbers there."""
    bits = jnp.stack([packed.blocks & 0xF, packed.blocks >> 4], axis=-1)
    # Integer arithmetic instead of a lookup table: a gather per nibble is slow on CPUs and TPUs.
    magnitude = (bits & 7).astype(jnp.int32)
    exponent, mantissa = magnitude >> 1, magnitude & 1
    # Doubled so that every e2m1 value is an integer: (2 + m) << (e - 1) for normals, m for subnormals.
    doubled = jnp.where(exponent == 0, mantissa, (2 + mantissa) << jnp.maximum(exponent - 1, 0))
    values = jnp.where(bits >= 8, -doubled, doubled).astype(jnp.float32)
    values = values.reshape(*packed.scales.shape, GROUP)
    # Two factors of 2^(s-127)/2, because 2^-128 is a subnormal that CPUs and GPUs may flush to zero.
    scale = packed.scales.astype(jnp.int32) - 128
    half = scale >> 1
    values = values * exp2(half)[..., None] * exp2(scale - half)[..., None]
    return values.reshape(packed.shape).astype(dtype)


def exp2(exponent: jax.Array) -> jax.Array:
    """2^exponent as float32 from its bits, for exponents of normal numbers."""
    return jax.lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)
