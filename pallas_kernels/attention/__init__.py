"""The attention op: grouped queries, one sink per head, a sliding window, and keys in any order."""

from __future__ import annotations

import jax

from pallas_kernels.attention import mosaic_tpu, reference, triton
from pallas_kernels.backend import Backend, dispatch

__all__ = ["attention", "paged_attention"]

_BACKENDS = (
    Backend("triton", frozenset({"cuda"}), triton.attention),
    Backend("mosaic_tpu", frozenset({"tpu"}), mosaic_tpu.attention),
)
_PAGED_BACKENDS = (
    Backend("triton", frozenset({"cuda"}), triton.paged_attention),
    Backend("mosaic_tpu", frozenset({"tpu"}), mosaic_tpu.paged_attention),
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


def paged_attention(
    q_BTHD: jax.Array,
    kv_pages_PSKE: jax.Array,
    page_table_BM: jax.Array,
    sinks_H: jax.Array,
    q_positions_BT: jax.Array,
    *,
    sm_scale: float,
    backend: str | None = None,
) -> jax.Array:
    """Causal attention, without a window, over keys and values in pages.

    Args:
      q_BTHD: queries, at consecutive positions along T, as in `attention`.
      kv_pages_PSKE: P pages of S slots, each with a key and a value side by side as in `attention`.
      page_table_BM: int32; position p of sequence b is in page `page_table[b, p // S]`, slot p % S. Entries past
        the end of a sequence may be any page: no query attends to them.
      sinks_H: as in `attention`.
      q_positions_BT: int32, below M S; -1 for padding. A query at p attends to positions 0 ... p.
      sm_scale: factor of the scores.
      backend: as in `attention`.

    Returns:
      [B, T, H, D] of q's dtype.
    """
    return dispatch(
        "paged_attention",
        _PAGED_BACKENDS,
        reference.paged_attention,
        q_BTHD,
        kv_pages_PSKE,
        page_table_BM,
        sinks_H,
        q_positions_BT,
        sm_scale=sm_scale,
        backend=backend,
    )
