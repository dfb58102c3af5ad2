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
    q_THD: jax.Array,
    k_TKD: jax.Array,
    v_TKD: jax.Array,
    positions_T: jax.Array,
    frequencies_F: jax.Array,
    kv_pages_PSKE: jax.Array,
    pages_T: jax.Array,
    slots_T: jax.Array,
    *,
    concentration: float,
    out_dtype: DTypeLike,
    backend: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Apply rotary embeddings (half-split) to queries and keys, and write each token's key and value to the cache.

    Args:
      q_THD: queries before rotation, of any float dtype, as are keys and values.
      k_TKD: keys before rotation.
      v_TKD: values, which are stored without rotation.
      positions_T: int32.
      frequencies_F: float32 [D / 2], radians per position.
      kv_pages_PSKE: the cache, P pages of S slots, each with a key and a value side by side (E = 2 D);
        updated in place when donated.
      pages_T: int32, the page of each token; a token with page P or more is not stored.
      slots_T: int32, the slot of each token in its page. No two tokens may share a slot.
      concentration: factor of cos and sin.
      out_dtype: dtype of the rotated queries.
      backend: name of a backend to force; see `pallas_kernels.use_backend`.

    Returns:
      Rotated queries [T, H, D], and the cache.
    """
    return dispatch(
        "rotate_and_store",
        _BACKENDS,
        reference.rotate_and_store,
        q_THD,
        k_TKD,
        v_TKD,
        positions_T,
        frequencies_F,
        kv_pages_PSKE,
        pages_T,
        slots_T,
        concentration=concentration,
        out_dtype=out_dtype,
        backend=backend,
        plain_on=_PLAIN_ON,
    )
