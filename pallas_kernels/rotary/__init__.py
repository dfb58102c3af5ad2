"""The rotary op: turn new queries and keys to their positions and put keys and values into the cache."""

from __future__ import annotations

import jax
from jax.typing import DTypeLike

from pallas_kernels.backend import Backend, dispatch
from pallas_kernels.rotary import reference, triton
from pallas_kernels.rotary.reference import as_kept, rotate

__all__ = ["as_kept", "rotate", "rotate_and_keep"]

_BACKENDS = (Backend("triton", frozenset({"cuda"}), triton.rotate_and_keep),)
_PLAIN_ON = frozenset({"rocm", "tpu"})


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
    backend: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Rotate by position, half-split, and write each token's key and value where the caller says.

    Args:
      q_BTHD: queries before rotation, any float dtype; so are keys and values.
      k_BTKD: keys before rotation.
      v_BTKD: values, which are only kept.
      positions_BT: int32.
      frequencies_F: float32 [D / 2], radians a position.
      kv_pages_PSKE: the cache, P pages (or rings) of S slots, each with a key and a value side by side (E = 2 D);
        updated in place when donated.
      pages_BT: int32, the page of each token; one of P or more keeps the token out of the cache.
      slots_BT: int32, its slot there. No two tokens may share one.
      concentration: multiplies cos and sin.
      out_dtype: of the rotated queries.
      backend: a name to force; see `pallas_kernels.use_backend`.

    Returns:
      Rotated queries [B, T, H, D], and the cache.
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
        kv_pages_PSKE,
        pages_BT,
        slots_BT,
        concentration=concentration,
        out_dtype=out_dtype,
        backend=backend,
        plain_on=_PLAIN_ON,
    )
