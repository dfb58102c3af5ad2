"""The attention op: grouped queries, one sink per head, a sliding window, and keys in any order."""

from __future__ import annotations

import jax

from pallas_kernels.attention import mosaic_tpu, reference, triton
from pallas_kernels.attention.ragged import RaggedBatch
from pallas_kernels.backend import Backend, dispatch

__all__ = ["RaggedBatch", "attention", "ragged_paged_attention"]

_BACKENDS = (Backend("triton", frozenset({"cuda"}), triton.attention),)
_RAGGED_BACKENDS = (
    Backend("triton", frozenset({"cuda"}), triton.ragged_paged_attention),
    Backend("mosaic_tpu", frozenset({"tpu"}), mosaic_tpu.ragged_paged_attention),
)


def attention(
    q_BTHD: jax.Array,
    kv_BSKE: jax.Array,
    sinks_H: jax.Array,
    q_positions_BT: jax.Array,
    kv_positions_BS: jax.Array,
    *,
    window: int | None,
    sm_scale: float,
    backend: str | None = None,
) -> jax.Array:
    """Causal attention by position, with a learned sink in each head's softmax.

    Args:
      q_BTHD: queries; query head h uses key/value head h // (H / K).
      kv_BSKE: the key and value of each slot side by side (E = 2 D, key first), of any float dtype, in any order
        along S. Together they fill the 128 lanes of a TPU row, and are contiguous for a GPU's loads.
      sinks_H: one unscaled logit per query head, which is only added to the softmax's denominator.
      q_positions_BT: int32; -1 marks a padding query, whose result is 0.
      kv_positions_BS: int32; -1 marks an empty slot. A query at p attends to keys at p - window + 1 ... p.
      window: number of keys that a query attends to, including its own; None for all.
      sm_scale: factor of the scores.
      backend: name of a backend to force; see `pallas_kernels.use_backend`.

    Returns:
      [B, T, H, D] of q's dtype; scores, softmax and sums are float32.
    """
    return dispatch(
        "attention",
        _BACKENDS,
        reference.attention,
        q_BTHD,
        kv_BSKE,
        sinks_H,
        q_positions_BT,
        kv_positions_BS,
        window=window,
        sm_scale=sm_scale,
        backend=backend,
    )


def ragged_paged_attention(
    q_THD: jax.Array,
    kv_pages_PSKE: jax.Array,
    batch: RaggedBatch,
    sinks_H: jax.Array,
    *,
    window: int | None,
    sm_scale: float,
    max_queries: int | None = None,
    backend: str | None = None,
) -> jax.Array:
    """Causal attention of sequences with any number of queries each, over keys and values in pages.

    Args:
      q_THD: the queries of all sequences; query head h uses key/value head h // (H / K).
      kv_pages_PSKE: P pages of S slots, each with a key and a value side by side (E = 2 D, key first), of any float
        dtype. The keys of the queries' own positions are among them.
      batch: where the queries and keys of each sequence are.
      sinks_H: one unscaled logit per query head, which is only added to the softmax's denominator.
      window: number of keys that a query attends to, including its own; None for all. Keys before it are not read.
      sm_scale: factor of the scores.
      max_queries: the most queries of a sequence, if known when traced; a batch that only decodes has 1.
      backend: name of a backend to force; see `pallas_kernels.use_backend`.

    Returns:
      [T, H, D] of q's dtype, 0 for queries of no sequence; scores, softmax and sums are float32.
    """
    return dispatch(
        "ragged_paged_attention",
        _RAGGED_BACKENDS,
        reference.ragged_paged_attention,
        q_THD,
        kv_pages_PSKE,
        batch,
        sinks_H,
        window=window,
        sm_scale=sm_scale,
        max_queries=max_queries,
        backend=backend,
    )
