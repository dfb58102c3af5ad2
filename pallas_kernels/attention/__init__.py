"""The attention ops: grouped queries, one sink per head, a sliding window, and keys in pages."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.attention import mosaic_tpu, reference, triton
from pallas_kernels.attention.ragged import RaggedBatch
from pallas_kernels.backend import Backend, dispatch

__all__ = ["RaggedBatch", "attention", "ragged_paged_attention"]

PAGE = 128
"""Most tokens of the pages that whole sequences are viewed as."""

TILE = 16
"""Pages hold a multiple of this many tokens, the rows of a TPU's tile."""


def _of_pages(paged: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """A backend of `attention` from one of `ragged_paged_attention`."""

    def whole(
        q_BTHD: jax.Array,
        kv_BTKE: jax.Array,
        sinks_H: jax.Array,
        *,
        window: int | None,
        sm_scale: float,
        interpret: bool,
    ) -> jax.Array:
        batch, length, heads, head_dim = q_BTHD.shape
        page = min(PAGE, -(-length // TILE) * TILE)
        pages = -(-length // page)
        kv_BTKE = jnp.pad(kv_BTKE, ((0, 0), (0, pages * page - length), (0, 0), (0, 0)))
        index_B = jnp.arange(batch, dtype=jnp.int32)
        length_B = jnp.full(batch, length, jnp.int32)
        tables_BM = jnp.arange(batch * pages, dtype=jnp.int32).reshape(batch, pages)
        out_THD = paged(
            q_BTHD.reshape(batch * length, heads, head_dim),
            kv_BTKE.reshape(batch * pages, page, *kv_BTKE.shape[2:]),
            RaggedBatch(tables_BM, index_B, index_B * length, length_B, length_B),
            sinks_H,
            window=window,
            sm_scale=sm_scale,
            max_queries=length,
            interpret=interpret,
        )
        return out_THD.reshape(q_BTHD.shape)

    return whole


_RAGGED_BACKENDS = (
    Backend("triton", frozenset({"cuda"}), triton.ragged_paged_attention),
    Backend("mosaic_tpu", frozenset({"tpu"}), mosaic_tpu.ragged_paged_attention),
)
_BACKENDS = tuple(Backend(x.name, x.platforms, _of_pages(x.function)) for x in _RAGGED_BACKENDS)


def attention(
    q_BTHD: jax.Array,
    kv_BTKE: jax.Array,
    sinks_H: jax.Array,
    *,
    window: int | None,
    sm_scale: float,
    backend: str | None = None,
) -> jax.Array:
    """Causal attention of whole sequences, whose tokens are at positions 0 to T - 1.

    Args:
      q_BTHD: queries; query head h uses key/value head h // (H / K).
      kv_BTKE: the key and value of each token side by side (E = 2 D, key first), of any float dtype.
      sinks_H: one unscaled logit per query head, which is only added to the softmax's denominator.
      window: number of keys that a query attends to, including its own; None for all.
      sm_scale: positive factor of the scores.
      backend: name of a backend to force; see `pallas_kernels.use_backend`. The reference can be differentiated.

    Returns:
      [B, T, H, D] of q's dtype; scores, softmax and sums are float32.
    """
    return dispatch(
        "attention",
        _BACKENDS,
        reference.attention,
        q_BTHD,
        kv_BTKE,
        sinks_H,
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
      sm_scale: positive factor of the scores.
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
