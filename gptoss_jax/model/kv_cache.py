"""The key/value cache: pages for full-attention layers, ring buffers of the window for sliding layers.

Every array has a leading dimension that is sharded over the mesh's batch axes. Each data-parallel rank has its own
pages, rings and indices, so no step moves keys between ranks.
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
from pallas_kernels.attention import attention, paged_attention
from pallas_kernels.rotary import rotate, rotate_and_store, to_cache_dtype
from sharding import Partition, on_shards

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
    """Attention without a cache: queries see only the keys of the same call."""

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
    return attention(q.astype(dtype), kv, sinks_H, positions_BT, positions_BT, window=window, sm_scale=sm_scale)


@dataclasses.dataclass(frozen=True)
class CacheShape:
    """The capacity of a cache on each data-parallel rank.

    Args:
      pages: pages of the full-attention layers.
      page_size: tokens per page.
      slots: running sequences, each with one ring of the sliding layers.
      snapshots: further rings, which hold the sliding layers' keys of cached prefixes.
      ring_slack: rows of a ring beyond the window, so that this many rejected drafts can be written and undone.
    """

    pages: int
    page_size: int
    slots: int
    snapshots: int = 0
    ring_slack: int = 0

    @property
    def rings(self) -> int:
        """Rings of each sliding layer: one per slot, then one per snapshot."""
        return self.slots + self.snapshots


def page_bytes(config: ModelConfig, page_size: int, dtype: DTypeLike, kv_heads: int | None = None) -> int:
    """Bytes of one page, summed over all full-attention layers."""
    return config.layer_types.count("full_attention") * page_size * _row_bytes(config, dtype, kv_heads)


def ring_bytes(config: ModelConfig, rows: int, dtype: DTypeLike, kv_heads: int | None = None) -> int:
    """Bytes of one ring of `rows` keys, summed over all sliding layers."""
    return config.layer_types.count("sliding_attention") * rows * _row_bytes(config, dtype, kv_heads)


def _row_bytes(config: ModelConfig, dtype: DTypeLike, kv_heads: int | None) -> int:
    return (kv_heads or config.num_key_value_heads) * 2 * config.head_dim * jnp.dtype(dtype).itemsize


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """One array per layer: [pages, page_size, K, 2 D] for full attention, [rings, rows, K, 2 D] for sliding.

    Each row holds a key beside its value. A ring holds position p in row p % rows.
    """

    stores: tuple[jax.Array, ...]

    @classmethod
    def empty(
        cls, config: ModelConfig, shape: CacheShape, dtype: DTypeLike, partition: Partition | None = None
    ) -> KVCache:
        """A cache of zeros, sharded over the partition's mesh."""
        partition = partition or partition_for(config)
        parts, heads = partition.degree("batch"), len(partition.heads.kv_sources)

        def store(layer: int) -> jax.Array:
            full = config.window(layer) is None
            rows = (
                (shape.pages, shape.page_size) if full else (shape.rings, config.sliding_window + shape.ring_slack)
            )
            return jnp.zeros((parts * rows[0], rows[1], heads, 2 * config.head_dim), dtype)

        def make() -> KVCache:
            return cls(tuple(store(layer) for layer in range(config.num_hidden_layers)))

        return jax.jit(make, out_shardings=partition.sharding(STORE))()

    def copy_rings(self, config: ModelConfig, sources: jax.Array, targets: jax.Array) -> KVCache:
        """Copy rings within each rank: `sources` and `targets` are int32 [B, N]; targets past the last are dropped."""

        def copy(store: jax.Array, sources: jax.Array, targets: jax.Array) -> jax.Array:
            return store.at[targets[0]].set(store[sources[0]], mode="drop")

        def layer(index: int) -> jax.Array:
            if config.window(index) is None:
                return self.stores[index]
            args = {"store": (self.stores[index], STORE), "sources": (sources, ROWS), "targets": (targets, ROWS)}
            return on_shards(copy, args, STORE, batch=len(sources))

        return KVCache(tuple(layer(index) for index in range(len(self.stores))))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Segments:
    """The sequences of a step's tokens: for each of B data-parallel ranks, N sequences of T tokens each.

    Args:
      slots: int32 [B, N], each sequence's ring.
      tables: int32 [B, N, M], each sequence's page table: position p is in page `tables[..., p // page_size]`.
      snapshots: int32 [B, N, C], rings that receive a copy of the sequence's ring as it is before a position; an index
        past the last ring copies nothing.
      snapshot_positions: int32 [B, N, C], the positions of these copies, within this step's tokens or right after them.
    """

    slots: jax.Array
    tables: jax.Array
    snapshots: jax.Array
    snapshot_positions: jax.Array


SEGMENT_AXES = Segments(ROWS, ("batch", None, None), ("batch", None, None), ("batch", None, None))  # type: ignore[arg-type]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepCache:
    """The cache during a step whose tokens [B, T] are the concatenation of several groups of segments.

    `lengths` gives the tokens per segment of each group: T is the sum of N * length over the groups.
    """

    cache: KVCache
    groups: tuple[Segments, ...]
    lengths: tuple[int, ...] = dataclasses.field(metadata={"static": True})

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
        out, store = on_shards(
            partial(
                _attend_groups,
                lengths=self.lengths,
                concentration=rotation.concentration,
                window=window,
                dtype=dtype,
            ),
            {
                "store": (self.cache.stores[layer], STORE),
                "groups": (self.groups, (SEGMENT_AXES,) * len(self.groups)),
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


@dataclasses.dataclass(frozen=True)
class _NewTokens:
    """A group's unrotated queries, keys and values [N, T, heads, D], and their positions int32 [N, T]."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    positions: jax.Array
    rotation: Rotation
    dtype: DTypeLike

    def rotated(self) -> tuple[jax.Array, jax.Array]:
        """Rotated queries in `dtype`, and rotated keys concatenated with values in float32."""
        q, k = (rotate(x, self.positions, *self.rotation) for x in (self.q, self.k))
        return q.astype(self.dtype), jnp.concatenate([k, self.v.astype(jnp.float32)], axis=-1)

    def rotate_and_store(
        self, store: jax.Array, pages: jax.Array, slots: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Rotated queries, and the store with the rotated keys and the values written at `pages` and `slots`."""
        frequencies_F, concentration = self.rotation
        return rotate_and_store(
            self.q,
            self.k,
            self.v,
            self.positions,
            frequencies_F,
            store,
            pages,
            slots,
            concentration=concentration,
            out_dtype=self.dtype,
        )


def _attend_groups(
    store: jax.Array,
    groups: tuple[Segments, ...],
    q_BTHD: jax.Array,
    k_BTKD: jax.Array,
    v_BTKD: jax.Array,
    sinks_H: jax.Array,
    positions_BT: jax.Array,
    frequencies_F: jax.Array,
    *,
    lengths: tuple[int, ...],
    concentration: float,
    window: int | None,
    dtype: DTypeLike,
) -> tuple[jax.Array, jax.Array]:
    """Attention on one data-parallel rank (B is 1), group by group as [N, length], on pages or on rings."""
    start, outs = 0, []
    rotation = Rotation(frequencies_F, concentration)
    for group, length in zip(groups, lengths, strict=True):
        segments = group.slots.shape[1]
        if segments == 0:
            continue
        part = slice(start, start + segments * length)
        start += segments * length
        q, k, v, positions = (
            x[0, part].reshape(segments, length, *x.shape[2:]) for x in (q_BTHD, k_BTKD, v_BTKD, positions_BT)
        )
        new = _NewTokens(q, k, v, positions, rotation, dtype)
        args = (store, jax.tree.map(lambda x: x[0], group), new, sinks_H)
        out, store = _on_pages(*args) if window is None else _on_rings(*args, window=window)
        outs.append(out.reshape(1, segments * length, *out.shape[2:]))
    return jnp.concatenate(outs, axis=1), store


def _on_pages(
    store: jax.Array, group: Segments, new: _NewTokens, sinks_H: jax.Array
) -> tuple[jax.Array, jax.Array]:
    pages, page_size = store.shape[:2]
    positions = new.positions
    page = jnp.take_along_axis(group.tables, jnp.maximum(positions, 0) // page_size, axis=1)
    q, store = new.rotate_and_store(store, jnp.where(positions < 0, pages, page), positions % page_size)
    out = paged_attention(q, store, group.tables, sinks_H, positions, sm_scale=q.shape[-1] ** -0.5)
    return out, store


def _on_rings(
    store: jax.Array, group: Segments, new: _NewTokens, sinks_H: jax.Array, *, window: int
) -> tuple[jax.Array, jax.Array]:
    rings, rows = store.shape[:2]
    positions, sm_scale = new.positions, new.q.shape[-1] ** -0.5
    stays = (positions >= 0) & (positions > jnp.max(positions, axis=1, keepdims=True) - rows)
    ring = jnp.where(stays, group.slots[:, None], rings)
    if positions.shape[1] == 1 and rows == window:
        # With the new key written, the ring holds exactly the query's window. Attention ignores the order of keys,
        # so the ring serves as a page.
        q, written = new.rotate_and_store(store, ring, positions % rows)
        filled = jnp.minimum(positions, window - 1)
        return paged_attention(q, written, group.slots[:, None], sinks_H, filled, sm_scale=sm_scale), written
    # A chunk overwrites keys that its first queries still see, so attention reads the ring as it was before.
    q, kv = new.rotated()
    kv = to_cache_dtype(kv, store.dtype)
    written = store.at[ring, positions % rows].set(kv, mode="drop")
    first = jnp.min(jnp.where(positions < 0, jnp.iinfo(jnp.int32).max, positions), axis=1, keepdims=True)
    held = jnp.concatenate([store[group.slots], kv], axis=1)
    held_positions = jnp.concatenate([_ring_positions(first, rows), positions], axis=1)
    out = attention(q, held, sinks_H, positions, held_positions, window=window, sm_scale=sm_scale)
    for index in range(group.snapshots.shape[1]):
        wanted = _ring_positions(group.snapshot_positions[:, index, None], rows)
        match = jnp.argmax(held_positions[:, None] == wanted[..., None], axis=-1)
        copied = jnp.take_along_axis(held, match[..., None, None], axis=1)
        written = written.at[group.snapshots[:, index]].set(copied, mode="drop")
    return out, written


def _ring_positions(end: jax.Array, rows: int) -> jax.Array:
    """The position int32 [N, rows] held by each row of a ring after all positions before `end` [N, 1]; -1 for none."""
    return jnp.maximum(end - 1 - (end - 1 - jnp.arange(rows)) % rows, -1)
