"""The attention op: grouped queries, a sink a head, a sliding window, any order of keys."""

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
      q_BTHD: queries; query head h reads kv head h // (H / K).
      kv_BSKE: each slot's key and value side by side (E = 2 D, keys first), of any float dtype, in any order
        along S. Together they fill the 128 lanes of a TPU row, and a GPU reads them in one piece.
      sinks_H: a logit a query head, unscaled, that joins the softmax's denominator and nothing else.
      q_positions_BT: int32; a query of padding has position -1 and gives 0.
      kv_positions_BS: int32; -1 marks an empty slot. A query at p sees keys at positions p - window + 1 ... p.
      window: how many keys a query sees, itself included; None for all.
      sm_scale: multiplies the scores.
      backend: a name to force; see `pallas_kernels.use_backend`.

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
    """Causal attention, without a window, over keys and values that lie in pages.

    Args:
      q_BTHD: queries, at consecutive positions along T, as in `attention`.
      kv_pages_PSKE: P pages of S slots, each with a key and a value side by side as in `attention`.
      page_table_BM: int32; position p of sequence b lies in page `page_table[b, p // S]`, slot p % S. Entries
        past a sequence's end are any page: no query sees them.
      sinks_H: as in `attention`.
      q_positions_BT: int32, below M S; -1 for padding. A query at p sees positions 0 ... p.
      sm_scale: multiplies the scores.
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
