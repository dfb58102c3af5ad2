"""The reference of the rotary op, in plain JAX."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


def rotate(x_THD: jax.Array, positions_T: jax.Array, frequencies_F: jax.Array, concentration: float) -> jax.Array:
    """Rotary embedding on the two halves of D, in float32, for positions [..., T] of x [..., T, H, D].

    Angles are computed, so positions have no limit.
    """
    angle = positions_T.astype(jnp.float32)[..., None, None] * frequencies_F
    cos, sin = jnp.cos(angle) * concentration, jnp.sin(angle) * concentration
    first, second = jnp.split(x_THD.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def to_cache_dtype(x: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Cast keys or values to the cache's dtype; float8 saturates at its largest value instead of becoming NaN."""
    if jnp.dtype(dtype).itemsize > 1:
        return x.astype(dtype)
    largest = float(jnp.finfo(dtype).max)
    return jnp.clip(x, -largest, largest).astype(dtype)


def rotate_and_store(
    q_THD: jax.Array,
    k_TKD: jax.Array,
    v_TKD: jax.Array,
    positions_T: jax.Array,
    frequencies_F: jax.Array,
    kv_pages_PSKE: jax.Array,
    pages_T: jax.Array,
    slots_T: jax.Array,
    *,
    concentration: float,
    out_dtype: DTypeLike,
) -> tuple[jax.Array, jax.Array]:
    """Defines `pallas_kernels.rotary.rotate_and_store`; see there."""
    dtype = kv_pages_PSKE.dtype
    q_THD, k_TKD = (rotate(x, positions_T, frequencies_F, concentration) for x in (q_THD, k_TKD))
    kv_TKE = jnp.concatenate([to_cache_dtype(k_TKD, dtype), to_cache_dtype(v_TKD, dtype)], axis=-1)
    return q_THD.astype(out_dtype), kv_pages_PSKE.at[pages_T, slots_T].set(kv_TKE, mode="drop")
