"""The packed tensor of the released experts: four-bit floats in groups of 32 that share a power-of-two scale.

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
"""What the three low bits of a nibble mean; the fourth is the sign."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MXFP4Tensor:
    """A tensor of shape [..., K], packed along K.

    `blocks` is uint8 [..., K/32, 16] (the low nibble of byte i is value 2i of its group) and `scales` is uint8
    [..., K/32], where a byte s means 2^(s-127). 255 is NaN in the format and is refused when a file is read.
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


def dequantize(packed: MXFP4Tensor, dtype: DTypeLike = jnp.float32) -> jax.Array:
    """Unpack to [..., K]; exact in float32, and in bfloat16 wherever the value is a normal number there."""
    bits = jnp.stack([packed.blocks & 0xF, packed.blocks >> 4], axis=-1)
    # Integer arithmetic instead of a table: a gather per nibble is what makes CPUs and TPUs slow here.
    magnitude = (bits & 7).astype(jnp.int32)
    exponent, mantissa = magnitude >> 1, magnitude & 1
    # Doubled so that every e2m1 value is an integer: (2 + m) << (e - 1) for normals, m for subnormals.
    doubled = jnp.where(exponent == 0, mantissa, (2 + mantissa) << jnp.maximum(exponent - 1, 0))
    values = jnp.where(bits >= 8, -doubled, doubled).astype(jnp.float32)
    values = values.reshape(*packed.scales.shape, GROUP)
    # Two factors of 2^(s-127)/2, because 2^-128 is a subnormal that CPUs and GPUs may flush to zero.
    scale = packed.scales.astype(jnp.int32) - 128
    half = scale >> 1
    values = values * _exp2(half)[..., None] * _exp2(scale - half)[..., None]
    return values.reshape(packed.shape).astype(dtype)


def _exp2(exponent: jax.Array) -> jax.Array:
    """2^exponent as float32 from its bits, for exponents of normal numbers."""
    return jax.lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)


def quantize(values: jax.Array) -> MXFP4Tensor:
    """Pack a float tensor [..., K] (K a multiple of 32), rounding to the nearest value, ties to even.

    The scale of a group is the OCP specification's: the largest power of two not above its largest magnitude,
    divided by that of the largest e2m1 value (4); what then lies above 6 saturates.
    """
    if values.shape[-1] % GROUP:
        raise ValueError(f"last dimension must be a multiple of {GROUP}, found shape {values.shape}")
    groups = values.astype(jnp.float32).reshape(*values.shape[:-1], -1, GROUP)
    largest = jnp.max(jnp.abs(groups), axis=-1)
    # frexp gives largest = f * 2^e with f in [0.5, 1), so floor(log2(largest)) is e - 1; minus 2 for the 4.
    exponent = jnp.where(largest > 0, jnp.frexp(largest)[1] - 3, -127)
    scales = jnp.clip(exponent + 127, 0, 254)
    shift = 127 - scales
    scaled = groups * _exp2(shift >> 1)[..., None] * _exp2(shift - (shift >> 1))[..., None]
    magnitude = _nearest_e2m1(jnp.abs(scaled))
    bits = (magnitude | ((scaled < 0) & (magnitude > 0)).astype(jnp.uint8) << 3).astype(jnp.uint8)
    blocks = bits[..., 0::2] | bits[..., 1::2] << 4
    return MXFP4Tensor(blocks, scales.astype(jnp.uint8))


def _nearest_e2m1(magnitude: jax.Array) -> jax.Array:
    """The index into E2M1_VALUES of the nearest value, ties to the even index."""
    index = jnp.zeros(magnitude.shape, jnp.uint8)
    for i, (low, high) in enumerate(zip(E2M1_VALUES, E2M1_VALUES[1:], strict=False)):
        middle = (low + high) / 2
        above = magnitude > middle if i % 2 == 0 else magnitude >= middle
        index = jnp.where(above, jnp.uint8(i + 1), index)
    return index
