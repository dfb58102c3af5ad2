"""Sampling on the device, vectorised over requests, each with its own settings and its own randomness."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from gptoss_jax.engine.params import SamplingParams


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingState:
    """The settings of B requests as arrays [B]; `keys` uint32 [B, 2] come from the seeds."""

    temperature: jax.Array
    top_p: jax.Array
    top_k: jax.Array
    min_p: jax.Array
    keys: jax.Array

    @classmethod
    def of(cls, params: Sequence[SamplingParams]) -> SamplingState:
        """Lay out the settings of some requests; a request without a seed gets one from the system."""
        seeds = [secrets.randbits(64) if p.seed is None else p.seed for p in params]
        keys = [[(seed >> 32) & 0xFFFFFFFF, seed & 0xFFFFFFFF] for seed in seeds]
        return cls(
            temperature=jnp.asarray([p.temperature for p in params], jnp.float32),
            top_p=jnp.asarray([p.top_p for p in params], jnp.float32),
            top_k=jnp.asarray([p.top_k for p in params], jnp.int32),
            min_p=jnp.asarray([p.min_p for p in params], jnp.float32),
            keys=jnp.asarray(np.asarray(keys, np.uint32)),
        )


def sample(logits_BV: jax.Array, state: SamplingState, positions_B: jax.Array) -> jax.Array:
    """Choose a token int32 [B] a row. The same seed, position and logits give the same token in any batch."""
    greedy_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)

    def draw() -> jax.Array:
        kept_BV = _keep(logits_BV / jnp.maximum(state.temperature, 1e-6)[:, None], state)

        def gumbel(key: jax.Array, position: jax.Array) -> jax.Array:
            key = jax.random.fold_in(jax.random.wrap_key_data(key, impl="threefry2x32"), position)
            return jax.random.gumbel(key, kept_BV.shape[1:], jnp.float32)

        noisy_BV = kept_BV + jax.vmap(gumbel)(state.keys, positions_B)
        drawn_B = jnp.argmax(noisy_BV, axis=-1).astype(jnp.int32)
        return jnp.where(state.temperature > 0, drawn_B, greedy_B)

    return jax.lax.cond(jnp.any(state.temperature > 0), draw, lambda: greedy_B)


def _keep(logits_BV: jax.Array, state: SamplingState) -> jax.Array:
    """-inf for what top-k, then top-p, then min-p leave out; the likeliest token always stays."""
    vocab = logits_BV.shape[-1]

    def cut() -> jax.Array:
        sorted_BV = -jnp.sort(-logits_BV, axis=-1)
        k_B = jnp.where(state.top_k > 0, jnp.minimum(state.top_k, vocab), vocab)
        within_k_BV = jnp.arange(vocab) < k_B[:, None]
        probs_BV = jax.nn.softmax(jnp.where(within_k_BV, sorted_BV, -jnp.inf), axis=-1)
        before_BV = jnp.cumsum(probs_BV, axis=-1) - probs_BV
        kept_BV = within_k_BV & ((before_BV < state.top_p[:, None]) | (state.top_p[:, None] >= 1))
        last_B = jnp.maximum(jnp.sum(kept_BV, axis=-1), 1) - 1
        threshold_B = jnp.take_along_axis(sorted_BV, last_B[:, None], axis=-1)
        return jnp.where(logits_BV >= threshold_B, logits_BV, -jnp.inf)

    any_cut = jnp.any((state.top_k > 0) | (state.top_p < 1))
    kept_BV = jax.lax.cond(any_cut, cut, lambda: logits_BV)
    largest_B1 = jnp.max(kept_BV, axis=-1, keepdims=True)
    return jnp.where(kept_BV >= largest_B1 + jnp.log(state.min_p)[:, None], kept_BV, -jnp.inf)


def logprobs_of(logits_BV: jax.Array, tokens_B: jax.Array, top: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Log-probability [B] of the chosen tokens, and those [B, top] and ids [B, top] of the likeliest."""
    logprobs_BV = jax.nn.log_softmax(logits_BV, axis=-1)
    chosen_B = jnp.take_along_axis(logprobs_BV, tokens_B[:, None], axis=-1)[:, 0]
    top_logprobs, top_ids = jax.lax.top_k(logprobs_BV, top)
    return chosen_B, top_logprobs, top_ids
