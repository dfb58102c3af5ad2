"""The attention op: grouped queries, a sink a head, a sliding window, any order of keys."""

from __future__ import annotations

import jax

from pallas_kernels.attention import reference

__all__ = ["attention"]


def attention(
    q_BTHD: jax.Array,
    k_BSKD: jax.Array,
    v_BSKD: jax.Array,
    sinks_H: jax.Array,
    q_positions_BT: jax.Array,
    kv_positions_BS: jax.Array,
    *,
    window: int | None,
    sm_scale: float,
) -> jax.Array:
    """Causal attention by position, with a learned sink in each head's softmax.

    Args:
      q_BTHD: queries; query head h reads kv head h // (H / K).
      k_BSKD, v_BSKD: keys and values of any float dtype, in any order along S.
      sinks_H: a logit a query head, unscaled, that joins the softmax's denominator and nothing else.
      q_positions_BT: int32; a query of padding has position -1 and gives 0.
      kv_positions_BS: int32; -1 marks an empty slot. A query at p sees keys at positions p - window + 1 ... p.
      window: how many keys a query sees, itself included; None for all.
      sm_scale: multiplies the scores.

    Returns:
      [B, T, H, D] of q's dtype; scores, softmax and sums are float32.
    """
    return reference.attention(
        q_BTHD,
        k_BSKD,
        v_BSKD,
        sinks_H,
        q_positions_BT,
        kv_positions_BS,
        window=window,
        sm_scale=sm_scale,
    )
