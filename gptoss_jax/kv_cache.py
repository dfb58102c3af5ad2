"""Keys and values between steps: full layers grow, sliding layers keep a bounded ring of the window."""

from __future__ import annotations

import dataclasses
from typing import Protocol, Self

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from gptoss_jax.config import ModelConfig
from pallas_kernels.attention import attention


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
        out = attention(
            q_BTHD,
            k_BTKD,
            v_BTKD,
            sinks_H,
            positions_BT,
            positions_BT,
            window=window,
            sm_scale=q_BTHD.shape[-1] ** -0.5,
        )
        return out, self


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCache:
    """Keys and values [B, S, K, D] of a layer, and the position int32 [B, S] in each slot, -1 where empty."""

    k: jax.Array
    v: jax.Array
    positions: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """A cache of B sequences: a full layer has a slot for each position, a sliding one a ring of its window."""

    layers: tuple[LayerCache, ...]

    @classmethod
    def empty(cls, config: ModelConfig, batch: int, capacity: int, dtype: DTypeLike = jnp.bfloat16) -> KVCache:
        """Room for `batch` sequences of `capacity` tokens."""

        def layer(index: int) -> LayerCache:
            slots = min(config.window(index) or capacity, capacity)
            shape = (batch, slots, config.num_key_value_heads, config.head_dim)
            positions = jnp.full((batch, slots), -1, jnp.int32)
            return LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), positions)

        return cls(tuple(layer(i) for i in range(config.num_hidden_layers)))

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
        held = self.layers[layer]
        written = _write(held, k_BTKD, v_BTKD, positions_BT)
        if window is None:
            k, v, kv_positions = written.k, written.v, written.positions
        else:
            # The ring loses keys that the first queries of a long chunk still see, so they read the old ring.
            k = jnp.concatenate([held.k, k_BTKD.astype(held.k.dtype)], axis=1)
            v = jnp.concatenate([held.v, v_BTKD.astype(held.v.dtype)], axis=1)
            kv_positions = jnp.concatenate([held.positions, positions_BT], axis=1)
        out = attention(
            q_BTHD,
            k,
            v,
            sinks_H,
            positions_BT,
            kv_positions,
            window=window,
            sm_scale=q_BTHD.shape[-1] ** -0.5,
        )
        return out, KVCache((*self.layers[:layer], written, *self.layers[layer + 1 :]))


def _write(held: LayerCache, k_BTKD: jax.Array, v_BTKD: jax.Array, positions_BT: jax.Array) -> LayerCache:
    """Put each token into slot position % slots; of tokens that share a slot the last one stays."""
    batch, slots = held.positions.shape
    last_B1 = jnp.max(positions_BT, axis=1, keepdims=True)
    stays_BT = (positions_BT >= 0) & (positions_BT > last_B1 - slots)
    slot_BT = jnp.where(stays_BT, positions_BT % slots, slots)
    row_B1 = jnp.arange(batch)[:, None]
    return LayerCache(
        held.k.at[row_B1, slot_BT].set(k_BTKD.astype(held.k.dtype), mode="drop"),
        held.v.at[row_B1, slot_BT].set(v_BTKD.astype(held.v.dtype), mode="drop"),
        held.positions.at[row_B1, slot_BT].set(positions_BT, mode="drop"),
    )
