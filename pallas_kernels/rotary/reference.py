"""What the rotary op computes, in plain JAX."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


def rotate_and_keep(
    q_BTHD: jax.Array,
    k_BTKD: jax.Array,
    v_BTKD: jax.Array,
    positions_BT: jax.Array,
    frequencies_F: jax.Array,
    kv_pages_PSKE: jax.Array,
    pages_BT: jax.Array,
    slots_BT: jax.Array,
    *,
    concentration: float,
    out_dtype: DTypeLike,
) -> tuple[jax.Array, jax.Array]:
    """See `pallas_kernels.rotary.rotate_and_keep`, whose meaning this is."""
    angle = positions_BT.astype(jnp.float32)[..., None, None] * frequencies_F
    cos, sin = jnp.cos(angle) * concentration, jnp.sin(angle) * concentration

    def rotate(x: jax.Array, dtype: DTypeLike) -> jax.Array:
        first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
        return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(dtype)

    dtype = kv_pages_PSKE.dtype
    kv_BTKE = jnp.concatenate([rotate(k_BTKD, dtype), v_BTKD.astype(dtype)], axis=-1)
    return rotate(q_BTHD, out_dtype), kv_pages_PSKE.at[pages_BT, slots_BT].set(kv_BTKE, mode="drop")
