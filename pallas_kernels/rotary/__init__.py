"""The rotary op: apply rotary embeddings to new queries and keys, and write keys and values to the KV cache."""

from __future__ import annotations

import jax
from jax.typing import DTypeLike

from pallas_kernels.backend import Backend, dispatch
from pallas_kernels.rotary import reference, triton
from pallas_kernels.rotary.reference import rotate, to_cache_dtype

__all__ = ["rotate", "rotate_and_store", "to_cache_dtype"]

_BACKENDS = (Backend("triton", frozenset({"cuda"}), triton.rotate_and_store),)
_PLAIN_ON = frozenset({"rocm", "tpu"})


def rotate_and_store(
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
    """Apply rotary embeddings (half-split) to queries and keys, and write each token's key and value to the cache.

    Args:
      q_BTHD: queries before rotation, of any float dtype, as are keys and values.
      k_BTKD: keys before rotation.
      v_BTKD: values, which are stored without rotation.
      positions_BT: int32.
      frequencies_F: float32 [D / 2], radians per position.
      kv_pages_PSKE: the cache, P pages (or rings) of S slots, each with a key and a value side by side (E = 2 D);
        updated in place when donated.
      pages_BT: int32, the page of each token; a token with page P or more is not stored.
      slots_BT: int32, the slot of each token in its page. No two tokens may share a slot.
      concentration: factor of cos and sin.
      out_dtype: dtype of the rotated queries.
      backend: name of a backend to force; see `pallas_kernels.use_backend`.

    Returns:
      Rotated queries [B, T, H, D], and the cache.
    """
    return dispatch(
        "rotate_and_store",
        _BACKENDS,
        reference.rotate_and_store,
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
