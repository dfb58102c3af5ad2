"""Keys and values between steps: full layers grow, sliding layers keep a bounded ring of the window."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Protocol, Self

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from gptoss_jax.config import ModelConfig
from gptoss_jax.placement import partition_for
from pallas_kernels.attention import attention
from sharding import Partition, on_shards

QUERIES = ("batch", None, "heads", None)
KEYS = ("batch", None, "kv_heads", None)
POSITIONS = ("batch", None)


class KeyValues(Protocol):
    """Where a layer's keys and values go and what its queries see: all that the model knows of a cache."""

    def attend(
        self,
        layer: int,
        q_BTHD: jax.Array,
        k_BTKD: jax.Array,
        v_BTKD: jax.Array,
        sinks_H: jax.Array,
        positions_BT: jax.Array,
        window: int | None,
    ) -> tuple[jax.Array, Self]:
        """Attention [B, T, H, D] over what is held and the new keys, and the state that holds them too."""
        ...


class WholeSequence:
    """Nothing is kept: each query sees the keys of its own call."""

    def attend(
        self,
        layer: int,
        q_BTHD: jax.Array,
        k_BTKD: jax.Array,
        v_BTKD: jax.Array,
        sinks_H: jax.Array,
        positions_BT: jax.Array,
        window: int | None,
    ) -> tuple[jax.Array, Self]:
        """See KeyValues."""
        out = on_shards(
            partial(attention, window=window, sm_scale=q_BTHD.shape[-1] ** -0.5),
            {
                "q_BTHD": (q_BTHD, QUERIES),
                "kv_BSKE": (jnp.concatenate([k_BTKD, v_BTKD], axis=-1), KEYS),
                "sinks_H": (sinks_H, ("heads",)),
                "q_positions_BT": (positions_BT, POSITIONS),
                "kv_positions_BS": (positions_BT, POSITIONS),
            },
            QUERIES,
            batch=len(q_BTHD),
        )
        return out, self


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCache:
    """Keys and values [B, S, K, 2 D] of a layer, and the position int32 [B, S] in each slot, -1 where empty."""

    kv: jax.Array
    positions: jax.Array


LAYER_AXES = LayerCache(KEYS, POSITIONS)  # type: ignore[arg-type]
"""How a layer's cache is split."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """A cache of B sequences: a full layer has a slot for each position, a sliding one a ring of its window."""

    layers: tuple[LayerCache, ...]

    @classmethod
    def empty(
        cls,
        config: ModelConfig,
        batch: int,
        capacity: int,
        dtype: DTypeLike = jnp.bfloat16,
        partition: Partition | None = None,
    ) -> KVCache:
        """Room for `batch` sequences of `capacity` tokens, with the heads that `partition` has."""
        kv_heads = len((partition or partition_for(config)).heads.kv_sources)

        def layer(index: int) -> LayerCache:
            slots = min(config.window(index) or capacity, capacity)
            shape = (batch, slots, kv_heads, 2 * config.head_dim)
            positions = jnp.full((batch, slots), -1, jnp.int32)
            return LayerCache(jnp.zeros(shape, dtype), positions)

        return cls(tuple(layer(i) for i in range(config.num_hidden_layers)))

    def grown(self, config: ModelConfig, capacity: int, partition: Partition) -> KVCache:
        """A copy whose sequences may have `capacity` tokens; slots keep their place because none has wrapped."""

        def pad(layer: LayerCache, empty: LayerCache) -> LayerCache:
            more = empty.positions.shape[1] - layer.positions.shape[1]
            rows = ((0, 0), (0, more))
            return LayerCache(
                jnp.pad(layer.kv, (*rows, (0, 0), (0, 0))),
                jnp.pad(layer.positions, rows, constant_values=-1),
            )

        batch, dtype = self.layers[0].positions.shape[0], self.layers[0].kv.dtype
        goal = jax.eval_shape(lambda: KVCache.empty(config, batch, capacity, dtype, partition))
        return KVCache(tuple(pad(old, new) for old, new in zip(self.layers, goal.layers, strict=True)))

    def slot(self, index: jax.Array, keep: jax.Array) -> KVCache:
        """The cache of one sequence, emptied unless `keep`."""
        one = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, index, 1), self)
        return KVCache(tuple(LayerCache(l.kv, jnp.where(keep, l.positions, -1)) for l in one.layers))

    def with_slot(self, index: jax.Array, one: KVCache) -> KVCache:
        """This cache with one sequence replaced."""
        return jax.tree.map(lambda x, y: jax.lax.dynamic_update_slice_in_dim(x, y, index, 0), self, one)

    def attend(
        self,
        layer: int,
        q_BTHD: jax.Array,
        k_BTKD: jax.Array,
        v_BTKD: jax.Array,
        sinks_H: jax.Array,
        positions_BT: jax.Array,
        window: int | None,
    ) -> tuple[jax.Array, KVCache]:
        """See KeyValues; tokens of padding have position -1 and are not kept."""
        out, written = on_shards(
            partial(_write_and_attend, window=window),
            {
                "held": (self.layers[layer], LAYER_AXES),
                "q_BTHD": (q_BTHD, QUERIES),
                "kv_BTKE": (jnp.concatenate([k_BTKD, v_BTKD], axis=-1), KEYS),
                "sinks_H": (sinks_H, ("heads",)),
                "positions_BT": (positions_BT, POSITIONS),
            },
            (QUERIES, LAYER_AXES),
            batch=len(q_BTHD),
        )
        return out, KVCache((*self.layers[:layer], written, *self.layers[layer + 1 :]))


def _write_and_attend(
    held: LayerCache,
    q_BTHD: jax.Array,
    kv_BTKE: jax.Array,
    sinks_H: jax.Array,
    positions_BT: jax.Array,
    *,
    window: int | None,
) -> tuple[jax.Array, LayerCache]:
    written = seen = _write(held, kv_BTKE, positions_BT)
    if window is not None and positions_BT.shape[1] > 1:
        # The ring loses keys that the first queries of a chunk still see, so they read it as it was.
        seen = LayerCache(
            jnp.concatenate([held.kv, kv_BTKE.astype(held.kv.dtype)], axis=1),
            jnp.concatenate([held.positions, positions_BT], axis=1),
        )
    out = attention(
        q_BTHD,
        seen.kv,
        sinks_H,
        positions_BT,
        seen.positions,
        window=window,
        sm_scale=q_BTHD.shape[-1] ** -0.5,
    )
    return out, written


def _write(held: LayerCache, kv_BTKE: jax.Array, positions_BT: jax.Array) -> LayerCache:
    """Put each token into slot position % slots; of tokens that share a slot the last one stays."""
    batch, slots = held.positions.shape
    last_B1 = jnp.max(positions_BT, axis=1, keepdims=True)
    stays_BT = (positions_BT >= 0) & (positions_BT > last_B1 - slots)
    slot_BT = jnp.where(stays_BT, positions_BT % slots, slots)
    row_B1 = jnp.arange(batch)[:, None]
    return LayerCache(
        held.kv.at[row_B1, slot_BT].set(kv_BTKE.astype(held.kv.dtype), mode="drop"),
        held.positions.at[row_B1, slot_BT].set(positions_BT, mode="drop"),
    )
