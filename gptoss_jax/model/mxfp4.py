"""Quantizes tensors to MXFP4; `pallas_kernels.mxfp4_matmul.format` describes the format."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp

from pallas_kernels.mxfp4_matmul.format import E2M1_VALUES, GROUP, MXFP4Tensor, dequantize, exp2

__all__ = ["E2M1_VALUES", "GROUP", "MXFP4Tensor", "dequantize", "quantize"]


def quantize(values: jax.Array) -> MXFP4Tensor:
    """Quantize a float tensor [..., K] to MXFP4, rounding to nearest, ties to even.

    A group's scale follows the OCP specification: the largest power of two not above the group's largest magnitude,
    divided by 4, the largest power of two in e2m1. Scaled values above 6 saturate. Raises ValueError if K is not a
    multiple of 32.
    """
    if values.shape[-1] % GROUP:
        raise ValueError(f"last dimension must be a multiple of {GROUP}, found shape {values.shape}")
    groups = values.astype(jnp.float32).reshape(*values.shape[:-1], -1, GROUP)
    largest = jnp.max(jnp.abs(groups), axis=-1)
    # frexp gives largest = f * 2^e with f in [0.5, 1), so floor(log2(largest)) is e - 1; minus 2 for the 4.
    exponent = jnp.where(largest > 0, jnp.frexp(largest)[1] - 3, -127)
    scales = jnp.clip(exponent + 127, 0, 254)
    shift = 127 - scales
    scaled = groups * exp2(shift >> 1)[..., None] * exp2(shift - (shift >> 1))[..., None]
    magnitude = _nearest_e2m1(jnp.abs(scaled))
    bits = (magnitude | ((scaled < 0) & (magnitude > 0)).astype(jnp.uint8) << 3).astype(jnp.uint8)
    blocks = bits[..., 0::2] | bits[..., 1::2] << 4
    return MXFP4Tensor(blocks, scales.astype(jnp.uint8))


def _nearest_e2m1(magnitude: jax.Array) -> jax.Array:
    """The index into E2M1_VALUES of the nearest value, ties to the even index."""
    index = jnp.zeros(magnitude.shape, jnp.uint8)
    for i, (low, high) in enumerate(itertools.pairwise(E2M1_VALUES)):
        middle = (low + high) / 2
        above = magnitude > middle if i % 2 == 0 else magnitude >= middle
        index = jnp.where(above, jnp.uint8(i + 1), index)
    return index
