"""The key/value cache: a pool of pages for full-attention layers, and another for sliding layers.

Every array has a leading dimension that is sharded over the mesh's batch axes. Each data-parallel rank has its own
pages and indices, so no step moves keys between ranks.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import NamedTuple, Protocol, Self

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from gptoss_jax.model.config import ModelConfig
from gptoss_jax.model.placement import partition_for
from pallas_kernels.attention import RaggedBatch, attention, ragged_paged_attention
from pallas_kernels.rotary import rotate, rotate_and_store
from sharding import Partition, on_shards, zeros

HEADS = ("heads", "kv_heads", "kv_heads")
QUERIES = ("batch", None, "heads", None)
KEYS = ("batch", None, "kv_heads", None)
ROWS = ("batch", None)
STORE = ("batch", None, "kv_heads", None)


class Rotation(NamedTuple):
    """The rotary embedding: frequencies float32 [D / 2] in radians per position, and the factor on cos and sin."""

    frequencies_F: jax.Array
    concentration: float


class KeyValues(Protocol):
    """The model's interface to a cache: stores a layer's keys and values and computes its attention."""

    def attend(
        self,
        layer: int,
        q_BTHD: jax.Array,
        k_BTKD: jax.Array,
        v_BTKD: jax.Array,
        sinks_H: jax.Array,
        positions_BT: jax.Array,
        rotation: Rotation,
        window: int | None,
        dtype: DTypeLike,
    ) -> tuple[jax.Array, Self]:
        """Attention [B, T, H, D] over the cached and the new keys, and the state with the new keys and values.

        The queries [B, T, H, D] and keys [B, T, K, D] are not rotated yet. Attention is computed and returned in
        `dtype`.
        """
        ...


class WholeSequence:
    """Attention without a cache: tokens see those before them in the same call, whose positions only rotate."""

    def attend(
        self,
        layer: int,
        q_BTHD: jax.Array,
        k_BTKD: jax.Array,
        v_BTKD: jax.Array,
        sinks_H: jax.Array,
        positions_BT: jax.Array,
        rotation: Rotation,
        window: int | None,
        dtype: DTypeLike,
    ) -> tuple[jax.Array, Self]:
        """See KeyValues."""
        out = on_shards(
            partial(_attend_whole, concentration=rotation.concentration, window=window, dtype=dtype),
            {
                "q_BTHD": (q_BTHD, QUERIES),
                "k_BTKD": (k_BTKD, KEYS),
                "v_BTKD": (v_BTKD, KEYS),
                "sinks_H": (sinks_H, ("heads",)),
                "positions_BT": (positions_BT, ROWS),
                "frequencies_F": (rotation.frequencies_F, (None,)),
            },
            QUERIES,
            batch=len(q_BTHD),
        )
        return out, self


def _attend_whole(
    q_BTHD: jax.Array,
    k_BTKD: jax.Array,
    v_BTKD: jax.Array,
    sinks_H: jax.Array,
    positions_BT: jax.Array,
    frequencies_F: jax.Array,
    *,
    concentration: float,
    window: int | None,
    dtype: DTypeLike,
) -> jax.Array:
    q, k = (rotate(x, positions_BT, frequencies_F, concentration) for x in (q_BTHD, k_BTKD))
    kv = jnp.concatenate([k.astype(dtype), v_BTKD.astype(dtype)], axis=-1)
    sm_scale = q.shape[-1] ** -0.5
    return attention(q.astype(dtype), kv, sinks_H, window=window, sm_scale=sm_scale)


@dataclasses.dataclass(frozen=True)
class CacheShape:
    """The capacity of a cache on each data-parallel rank.

    Args:
      slots: sequences that run at the same time.
      page_size: tokens per page.
      pages, sliding_pages: pages of the pools of the full-attention and of the sliding layers.
      table, sliding_table: entries of a sequence's page table for each pool; that of the sliding pool is cyclic.
    """

    slots: int
    page_size: int
    pages: int
    sliding_pages: int
    table: int
    sliding_table: int


def page_bytes(
    config: ModelConfig, layer_type: str, page_size: int, dtype: DTypeLike, kv_heads: int | None = None
) -> int:
    """Bytes of one page of the pool of a type of layers, summed over these layers."""
    row = (kv_heads or config.num_key_value_heads) * 2 * config.head_dim * jnp.dtype(dtype).itemsize
    return config.layer_types.count(layer_type) * page_size * row


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """One array [pages, page_size, K, 2 D] per layer, of the pages of its pool; a row holds a key beside its value."""

    stores: tuple[jax.Array, ...]

    @classmethod
    def empty(
        cls, config: ModelConfig, shape: CacheShape, dtype: DTypeLike, partition: Partition | None = None
    ) -> KVCache:
        """A cache of zeros, sharded over the partition's mesh."""
        partition = partition or partition_for(config)
        ranks, heads = partition.degree("batch"), len(partition.heads.kv_sources)

        def store(layer: int) -> jax.Array:
            pages = shape.pages if config.window(layer) is None else shape.sliding_pages
            rows = (ranks * pages, shape.page_size, heads, 2 * config.head_dim)
            return zeros(rows, dtype, partition.sharding(STORE))

        return cls(tuple(store(layer) for layer in range(config.num_hidden_layers)))


class Addresses(NamedTuple):
    """The page tables int32 [B, slots, M] of a pool, and the page int32 [B, T] that each token is written to.

    A page past the pool's last drops the token.
    """

    tables_BRM: jax.Array
    pages_BT: jax.Array


class Sequences(NamedTuple):
    """The sequences of a step's tokens on each of B data-parallel ranks; all int32 [B, N], as in RaggedBatch."""

    slots_BN: jax.Array
    starts_BN: jax.Array
    counts_BN: jax.Array
    lengths_BN: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepCache:
    """The cache during a step over the flat tokens of sequences that each have any number of them.

    `full` and `sliding` are the addresses in the two pools; no sequence has more tokens than `max_queries`, if given.
    """

    cache: KVCache
    sequences: Sequences
    full: Addresses
    sliding: Addresses
    max_queries: int | None = dataclasses.field(metadata={"static": True})

    def attend(
        self,
        layer: int,
        q_BTHD: jax.Array,
        k_BTKD: jax.Array,
        v_BTKD: jax.Array,
        sinks_H: jax.Array,
        positions_BT: jax.Array,
        rotation: Rotation,
        window: int | None,
        dtype: DTypeLike,
    ) -> tuple[jax.Array, StepCache]:
        """See KeyValues; padding tokens have position -1 and are not stored."""
        addresses = self.full if window is None else self.sliding
        out, store = on_shards(
            partial(
                _attend_pages,
                concentration=rotation.concentration,
                window=window,
                dtype=dtype,
                max_queries=self.max_queries,
            ),
            {
                "store": (self.cache.stores[layer], STORE),
                "addresses": (addresses, Addresses(("batch", None, None), ROWS)),  # type: ignore[arg-type]
                "sequences": (self.sequences, Sequences(ROWS, ROWS, ROWS, ROWS)),  # type: ignore[arg-type]
                "q_BTHD": (q_BTHD, QUERIES),
                "k_BTKD": (k_BTKD, KEYS),
                "v_BTKD": (v_BTKD, KEYS),
                "sinks_H": (sinks_H, ("heads",)),
                "positions_BT": (positions_BT, ROWS),
                "frequencies_F": (rotation.frequencies_F, (None,)),
            },
            (QUERIES, STORE),
            batch=len(q_BTHD),
        )
        stores = (*self.cache.stores[:layer], store, *self.cache.stores[layer + 1 :])
        return out, dataclasses.replace(self, cache=KVCache(stores))


def _attend_pages(
    store: jax.Array,
    addresses: Addresses,
    sequences: Sequences,
    q_BTHD: jax.Array,
    k_BTKD: jax.Array,
    v_BTKD: jax.Array,
    sinks_H: jax.Array,
    positions_BT: jax.Array,
    frequencies_F: jax.Array,
    *,
    concentration: float,
    window: int | None,
    dtype: DTypeLike,
    max_queries: int | None,
) -> tuple[jax.Array, jax.Array]:
    """Attention of the tokens of one data-parallel rank (B is 1), whose keys are written to their pages first."""
    q_THD, store = rotate_and_store(
        q_BTHD[0],
        k_BTKD[0],
        v_BTKD[0],
        positions_BT[0],
        frequencies_F,
        store,
        addresses.pages_BT[0],
        positions_BT[0] % store.shape[1],
        concentration=concentration,
        out_dtype=dtype,
    )
    out_THD = ragged_paged_attention(
        q_THD,
        store,
        RaggedBatch(addresses.tables_BRM[0], *(x[0] for x in sequences)),
        sinks_H,
        window=window,
        sm_scale=q_THD.shape[-1] ** -0.5,
        max_queries=max_queries,
    )
    return out_THD[None], store


def page_of(tables_BRM: jax.Array, slots_BT: jax.Array, positions_BT: jax.Array, page_size: int) -> jax.Array:
    """The page int32 [B, T] of each token by its slot's cyclic table; a huge number at negative positions."""

    def pages(tables_BRM: jax.Array, slots_BT: jax.Array, positions_BT: jax.Array) -> jax.Array:
        entries = jnp.maximum(positions_BT[0], 0) // page_size % tables_BRM.shape[2]
        return jnp.where(positions_BT < 0, jnp.iinfo(jnp.int32).max, tables_BRM[0][slots_BT[0], entries])

    args = {
        "tables_BRM": (tables_BRM, ("batch", None, None)),
        "slots_BT": (slots_BT, ROWS),
        "positions_BT": (positions_BT, ROWS),
    }
    return on_shards(pages, args, ROWS, batch=len(slots_BT))
