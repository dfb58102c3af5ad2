"""The reference of the attention ops, in plain JAX."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.attention.ragged import QueryBlocks, RaggedBatch

MAX_SCORES = 1 << 26
"""Limit of the float32 scores in memory at a time, for long prompts."""

QUERIES, KEYS = 16, 128
"""Most queries and keys of a block of ragged attention."""

Softmax = tuple[jax.Array, jax.Array, jax.Array]
"""Of each row the largest score so far, and the denominator and the weighted sum of values relative to it."""


def attention(
    q_BTHD: jax.Array, kv_BTKE: jax.Array, sinks_H: jax.Array, *, window: int | None, sm_scale: float
) -> jax.Array:
    """Defines `pallas_kernels.attention.attention`; see there. Computed in blocks of queries; differentiable."""
    batch, length, heads, head_dim = q_BTHD.shape
    block = max(1, min(length, MAX_SCORES // (batch * heads * length)))
    attend = functools.partial(_attend, kv_BSKE=kv_BTKE, sinks_H=sinks_H, window=window, sm_scale=sm_scale)
    if block == length:
        return attend((q_BTHD, jnp.int32(0)))
    padding = -length % block
    q_BTHD = jnp.pad(q_BTHD, ((0, 0), (0, padding), (0, 0), (0, 0)))
    q_XBTHD = q_BTHD.reshape(batch, -1, block, heads, head_dim).swapaxes(0, 1)
    out_XBTHD = lax.map(attend, (q_XBTHD, block * jnp.arange(len(q_XBTHD), dtype=jnp.int32)))
    return out_XBTHD.swapaxes(0, 1).reshape(batch, length + padding, heads, head_dim)[:, :length]


def ragged_paged_attention(
    q_THD: jax.Array,
    kv_pages_PSKE: jax.Array,
    batch: RaggedBatch,
    sinks_H: jax.Array,
    *,
    window: int | None,
    sm_scale: float,
    max_queries: int | None = None,
) -> jax.Array:
    """Defines `pallas_kernels.attention.ragged_paged_attention`; see there.

    Blocks of queries loop over the blocks of keys that any of them sees, with an online softmax that starts at the
    sink, so that neither time nor memory depends on the size of the page tables.
    """
    tokens, heads, head_dim = q_THD.shape
    page_size, kv_heads = kv_pages_PSKE.shape[1:3]
    size = min(QUERIES, max_queries or QUERIES)
    blocks = QueryBlocks.of(batch.counts_N, tokens, size)
    inner_Q = jnp.arange(size, dtype=jnp.int32)
    here_IQ = inner_Q < blocks.queries_I[:, None]
    starts_I, counts_I, lengths_I, rows_I = (
        x[blocks.sequence_I] for x in (batch.starts_N, batch.counts_N, batch.lengths_N, batch.rows_N)
    )
    token_IQ = jnp.where(here_IQ, (starts_I + blocks.first_I)[:, None] + inner_Q, tokens)
    position_IQ = jnp.where(here_IQ, (lengths_I - counts_I + blocks.first_I)[:, None] + inner_Q, -1)
    q_IQKGD = q_THD.at[token_IQ].get(mode="fill", fill_value=0)
    q_IQKGD = q_IQKGD.reshape(*token_IQ.shape, kv_heads, heads // kv_heads, head_dim)
    first_I = position_IQ[:, 0] * 0 if window is None else jnp.maximum(position_IQ[:, 0] - window + 1, 0)
    last_I = jnp.max(position_IQ, axis=1)
    tables_IM = functools.partial(jnp.take_along_axis, batch.page_tables_RM[rows_I], axis=1)

    def step(block: jax.Array, state: Softmax) -> Softmax:
        key_IS = first_I[:, None] + block * KEYS + jnp.arange(KEYS, dtype=jnp.int32)
        page_IS = tables_IM(key_IS // page_size % batch.page_tables_RM.shape[1])
        seen_IQS = (key_IS[:, None] <= position_IQ[..., None]) & here_IQ[..., None]
        if window is not None:
            seen_IQS &= key_IS[:, None] > position_IQ[..., None] - window
        # Entries of tables without a visible key may be anything; so may keys that nothing was written to.
        in_any_IS = jnp.any(seen_IQS, axis=1)
        kv_ISKE = kv_pages_PSKE[jnp.where(in_any_IS, page_IS, 0), key_IS % page_size]
        kv_ISKE = jnp.where(in_any_IS[..., None, None], kv_ISKE.astype(q_THD.dtype), 0)
        return _accumulate(state, q_IQKGD, kv_ISKE, seen_IQS, sm_scale)

    sinks_KG1 = sinks_H.astype(jnp.float32).reshape(kv_heads, -1, 1)
    shape = (len(token_IQ), kv_heads, heads // kv_heads, size)
    initial = (jnp.broadcast_to(sinks_KG1, shape), jnp.ones(shape), jnp.zeros((*shape, head_dim)))
    count = jnp.max((last_I - first_I) // KEYS + 1, initial=0, where=last_I >= 0)
    _, denominator_IKGQ, sum_IKGQD = lax.fori_loop(0, count, step, initial)
    out_IQKGD = jnp.moveaxis(sum_IKGQD / denominator_IKGQ[..., None], 3, 1).astype(q_THD.dtype)
    out_XHD = out_IQKGD.reshape(-1, heads, head_dim)
    return jnp.zeros_like(q_THD).at[token_IQ.reshape(-1)].set(out_XHD, mode="drop")


def _accumulate(
    state: Softmax, q_IQKGD: jax.Array, kv_ISKE: jax.Array, seen_IQS: jax.Array, sm_scale: float
) -> Softmax:
    """One step of the online softmax of each row, over S more keys."""
    largest_IKGQ, denominator_IKGQ, sum_IKGQD = state
    precision = lax.Precision.HIGHEST if q_IQKGD.dtype == jnp.float32 else None
    dot = functools.partial(jnp.einsum, precision=precision, preferred_element_type=jnp.float32)
    k_ISKD, v_ISKD = jnp.split(kv_ISKE, 2, axis=-1)
    scores_IKGQS = sm_scale * dot("iqkgd,iskd->ikgqs", q_IQKGD, k_ISKD)
    scores_IKGQS = jnp.where(seen_IQS[:, None, None], scores_IKGQS, -jnp.inf)
    new_IKGQ = jnp.maximum(largest_IKGQ, jnp.max(scores_IKGQS, axis=-1))
    weights_IKGQS = jnp.exp(scores_IKGQS - new_IKGQ[..., None])
    shrink_IKGQ = jnp.exp(largest_IKGQ - new_IKGQ)
    added_IKGQD = dot("ikgqs,iskd->ikgqd", weights_IKGQS.astype(q_IQKGD.dtype), v_ISKD)
    return (
        new_IKGQ,
        denominator_IKGQ * shrink_IKGQ + jnp.sum(weights_IKGQS, axis=-1),
        sum_IKGQD * shrink_IKGQ[..., None] + added_IKGQD,
    )


def _attend(
    q_and_first: tuple[jax.Array, jax.Array],
    kv_BSKE: jax.Array,
    sinks_H: jax.Array,
    window: int | None,
    sm_scale: float,
) -> jax.Array:
    """Attention of queries [B, T, H, D] at consecutive positions from `first` on."""
    q_BTHD, first = q_and_first
    batch, length, heads, head_dim = q_BTHD.shape
    keys, kv_heads = kv_BSKE.shape[1:3]
    precision = lax.Precision.HIGHEST if q_BTHD.dtype == jnp.float32 else None
    dot = functools.partial(jnp.einsum, precision=precision, preferred_element_type=jnp.float32)
    k_BSKD, v_BSKD = jnp.split(kv_BSKE.astype(q_BTHD.dtype), 2, axis=-1)
    q_BTKGD = q_BTHD.reshape(batch, length, kv_heads, heads // kv_heads, head_dim)
    scores_BKGTS = sm_scale * dot("btkgd,bskd->bkgts", q_BTKGD, k_BSKD)
    q_positions_T1, kv_positions_S = first + jnp.arange(length)[:, None], jnp.arange(keys)
    seen_TS = kv_positions_S <= q_positions_T1
    if window is not None:
        seen_TS &= kv_positions_S > q_positions_T1 - window
    scores_BKGTS = jnp.where(seen_TS, scores_BKGTS, -jnp.inf)
    sinks_KG11 = sinks_H.astype(jnp.float32).reshape(kv_heads, -1, 1, 1)
    largest_BKGT1 = jnp.maximum(jnp.max(scores_BKGTS, axis=-1, keepdims=True), sinks_KG11)
    weights_BKGTS = jnp.exp(scores_BKGTS - largest_BKGT1)
    denominator_BKGT1 = jnp.sum(weights_BKGTS, axis=-1, keepdims=True) + jnp.exp(sinks_KG11 - largest_BKGT1)
    weights_BKGTS = (weights_BKGTS / denominator_BKGT1).astype(q_BTHD.dtype)
    return dot("bkgts,bskd->btkgd", weights_BKGTS, v_BSKD).reshape(q_BTHD.shape).astype(q_BTHD.dtype)
