"""The rotary op: turn new queries and keys to their positions and put keys and values into the cache."""

from __future__ import annotations

import jax
from jax.typing import DTypeLike

from pallas_kernels.backend import Backend, dispatch
from pallas_kernels.rotary import reference, triton

__all__ = ["rotate_and_keep"]

_BACKENDS = (Backend("triton", frozenset({"cuda"}), triton.rotate_and_keep),)


def rotate_and_keep(
    q_BTHD: jax.Array,
    k_BTKD: jax.Array,
    v_BTKD: jax.Array,
    positions_BT: jax.Array,
    frequencies_F: jax.Array,
    kv_BSKE: jax.Array,
    kv_positions_BS: jax.Array,
    *,
    concentration: float,
    out_dtype: DTypeLike,
    backend: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Rotate by position, half-split, and write each token into slot position % S of its sequence.

    Args:
      q_BTHD: queries before rotation, any float dtype; so are keys and values.
      k_BTKD: keys before rotation.
      v_BTKD: values, which are only kept.
      positions_BT: int32; tokens of padding have -1 and are not kept. Of tokens that share a slot the last stays.
      frequencies_F: float32 [D / 2], radians a position.
      kv_BSKE: the cache, a key and a value side by side in each slot (E = 2 D); updated in place when donated.
      kv_positions_BS: int32, the position in each slot.
      concentration: multiplies cos and sin.
      out_dtype: of the rotated queries.
      backend: a name to force; see `pallas_kernels.use_backend`.

    Returns:
      Rotated queries [B, T, H, D], the cache and its positions.
    """
    return dispatch(
        "rotate_and_keep",
        _BACKENDS,
        reference.rotate_and_keep,
        q_BTHD,
        k_BTKD,
        v_BTKD,
        positions_BT,
        frequencies_F,
        kv_BSKE,
        kv_positions_BS,
        concentration=concentration,
        out_dtype=out_dtype,
        backend=backend,
    )
