"""The reference of the attention ops, in plain JAX."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

MAX_SCORES = 1 << 26
"""Limit of the float32 scores in memory at a time, for long prompts."""


def attention(
    q_BTHD: jax.Array,
    kv_BSKE: jax.Array,
    sinks_H: jax.Array,
    q_positions_BT: jax.Array,
    kv_positions_BS: jax.Array,
    *,
    window: int | None,
    sm_scale: float,
) -> jax.Array:
    """Defines `pallas_kernels.attention.attention`; see there. Computed in blocks of queries."""
    batch, length, heads, head_dim = q_BTHD.shape
    block = max(1, min(length, MAX_SCORES // (batch * heads * kv_BSKE.shape[1])))

    def some_queries(q_and_positions: tuple[jax.Array, jax.Array]) -> jax.Array:
        q, positions = q_and_positions
        return _attend(q, kv_BSKE, sinks_H, positions, kv_positions_BS, window=window, sm_scale=sm_scale)

    if block == length:
        return some_queries((q_BTHD, q_positions_BT))
    padding = -length % block
    q = jnp.pad(q_BTHD, ((0, 0), (0, padding), (0, 0), (0, 0)))
    positions = jnp.pad(q_positions_BT, ((0, 0), (0, padding)), constant_values=-1)
    q = q.reshape(batch, -1, block, heads, head_dim).swapaxes(0, 1)
    positions = positions.reshape(batch, -1, block).swapaxes(0, 1)
    out = lax.map(some_queries, (q, positions)).swapaxes(0, 1)
    return out.reshape(batch, length + padding, heads, head_dim)[:, :length]


def paged_attention(
    q_BTHD: jax.Array,
    kv_pages_PSKE: jax.Array,
    page_table_BM: jax.Array,
    sinks_H: jax.Array,
    q_positions_BT: jax.Array,
    *,
    sm_scale: float,
) -> jax.Array:
    """Defines `pallas_kernels.attention.paged_attention`; see there. Gathers the pages first."""
    _, page_size, kv_heads, width = kv_pages_PSKE.shape
    batch, pages = page_table_BM.shape
    kv_BSKE = kv_pages_PSKE[page_table_BM].reshape(batch, pages * page_size, kv_heads, width)
    kv_positions_BS = jnp.broadcast_to(jnp.arange(pages * page_size, dtype=jnp.int32), kv_BSKE.shape[:2])
    return attention(q_BTHD, kv_BSKE, sinks_H, q_positions_BT, kv_positions_BS, window=None, sm_scale=sm_scale)


def _attend(
    q_BTHD: jax.Array,
    kv_BSKE: jax.Array,
    sinks_H: jax.Array,
    q_positions_BT: jax.Array,
    kv_positions_BS: jax.Array,
    *,
    window: int | None,
    sm_scale: float,
) -> jax.Array:
    batch, length, heads, head_dim = q_BTHD.shape
    kv_heads = kv_BSKE.shape[2]
    precision = lax.Precision.HIGHEST if q_BTHD.dtype == jnp.float32 else None
    k_BSKD, v_BSKD = jnp.split(kv_BSKE.astype(q_BTHD.dtype), 2, axis=-1)
    q_BTKGD = q_BTHD.reshape(batch, length, kv_heads, heads // kv_heads, head_dim)
    scores_BKGTS = sm_scale * jnp.einsum(
        "btkgd,bskd->bkgts",
        q_BTKGD,
        k_BSKD,
        precision=precision,
        preferred_element_type=jnp.float32,
    )
    q_positions, kv_positions = q_positions_BT[:, :, None], kv_positions_BS[:, None, :]
    seen_BTS = (kv_positions >= 0) & (kv_positions <= q_positions)
    if window is not None:
        seen_BTS &= kv_positions > q_positions - window
    scores_BKGTS = jnp.where(seen_BTS[:, None, None], scores_BKGTS, -jnp.inf)
    sinks_KG11 = sinks_H.astype(jnp.float32).reshape(kv_heads, -1, 1, 1)
    largest = jnp.maximum(jnp.max(scores_BKGTS, axis=-1, keepdims=True), sinks_KG11)
    weights_BKGTS = jnp.exp(scores_BKGTS - largest)
    denominator = jnp.sum(weights_BKGTS, axis=-1, keepdims=True) + jnp.exp(sinks_KG11 - largest)
    out_BTKGD = jnp.einsum(
        "bkgts,bskd->btkgd",
        (weights_BKGTS / denominator).astype(q_BTHD.dtype),
        v_BSKD,
        precision=precision,
        preferred_element_type=jnp.float32,
    )
    return out_BTKGD.reshape(q_BTHD.shape).astype(q_BTHD.dtype)
