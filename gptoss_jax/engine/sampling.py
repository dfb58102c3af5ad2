"""Sampling on the device, vectorised over requests, each with its own settings and its own randomness.

Nothing here sorts or gathers the vocabulary: what top-k and top-p keep is found with sums over the vocabulary, which
works on logits that are split over devices as it does on one.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

BITS_A_PASS = 2
"""Each pass over the logits tries 2^bits - 1 thresholds at once, so that it narrows one down by as many bits."""

Means = Literal["greedy", "draw", "cut"]
"""What a batch needs: the likeliest tokens alone, draws as well, or draws from what top-k or top-p keep as well."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingState:
    """The settings of each row as arrays [..., R]; `keys` uint32 [..., R, 2] come from the seeds."""

    temperature: jax.Array
    top_p: jax.Array
    top_k: jax.Array
    min_p: jax.Array
    keys: jax.Array


def sample(logits_RV: jax.Array, state: SamplingState, positions_R: jax.Array, means: Means = "cut") -> jax.Array:
    """Choose a token int32 [..., R] a row from logits float32 [..., R, V].

    The same seed, position and logits give the same token in any batch, and by any means that do for the row.
    """
    greedy_R = jnp.argmax(logits_RV, axis=-1).astype(jnp.int32)
    if means == "greedy":
        return greedy_R
    scaled_RV = logits_RV / jnp.maximum(state.temperature, 1e-6)[..., None]
    noisy_RV = scaled_RV + _gumbel(state.keys, positions_R, scaled_RV.shape[-1])
    least_R = jnp.max(scaled_RV, axis=-1) + jnp.log(state.min_p)
    noisy_RV = jnp.where(scaled_RV >= least_R[..., None], noisy_RV, -jnp.inf)
    if means == "draw":
        drawn_R = jnp.argmax(noisy_RV, axis=-1).astype(jnp.int32)
    else:
        drawn_R = _draw_within(noisy_RV, scaled_RV, state)
    return jnp.where(state.temperature > 0, drawn_R, greedy_R)


def _draw_within(noisy_RV: jax.Array, logits_RV: jax.Array, state: SamplingState) -> jax.Array:
    """The largest of `noisy` among the tokens that top-k and top-p keep.

    These are the tokens of at least some logit, which need not be known: where the largest of more of them is kept, it
    is the largest of those that are kept. Where it is not, nothing of its logit or less is, and the largest of the
    rest is tried: as the largest has mostly much of the mass, few tries do.
    """
    mass_RV = jnp.exp(logits_RV - jnp.max(logits_RV, axis=-1, keepdims=True))
    top_k_R = jnp.where(state.top_k > 0, state.top_k, logits_RV.shape[-1]).astype(jnp.float32)
    # Of the mass that top-k leaves; at 1 everything stays, whatever rounding makes of the sum.
    both = jnp.any((state.top_k > 0) & (state.top_p < 1))
    whole_R = lax.cond(both, lambda: _largest_mass(logits_RV, mass_RV, top_k_R), lambda: jnp.sum(mass_RV, axis=-1))
    top_p_R = jnp.where(state.top_p < 1, state.top_p * whole_R, jnp.inf)

    def tries_left(carry: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        return ~jnp.all(carry[2])

    def attempt(carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        tried_RV = jnp.where(logits_RV > carry[0][..., None], noisy_RV, -jnp.inf)
        drawn_R = jnp.argmax(tried_RV, axis=-1).astype(jnp.int32)
        chosen_RV = jnp.arange(logits_RV.shape[-1]) == drawn_R[..., None]
        logit_R = jnp.max(jnp.where(chosen_RV, logits_RV, -jnp.inf), axis=-1)
        above_RV = logits_RV > logit_R[..., None]
        count_R = jnp.sum(above_RV, axis=-1, dtype=jnp.float32)
        kept_R = (count_R < top_k_R) & (jnp.sum(jnp.where(above_RV, mass_RV, 0), axis=-1) < top_p_R)
        # Logits that are no numbers must not make it try for ever.
        return logit_R, drawn_R, kept_R | ~(logit_R > carry[0])

    def step(carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        below, drawn, kept = (
            jnp.where(carry[2], old, new) for old, new in zip(carry, attempt(carry), strict=True)
        )
        return below, drawn, kept

    # What a row draws that takes the likeliest does not matter.
    none_R = jnp.full(whole_R.shape, -jnp.inf)
    start = (none_R, jnp.zeros(none_R.shape, jnp.int32), state.temperature <= 0)
    return lax.while_loop(tries_left, step, start)[1]


def _gumbel(keys_R2: jax.Array, positions_R: jax.Array, vocab: int) -> jax.Array:
    """Noise [..., R, V] that depends on a row's key and position alone."""

    def row(key: jax.Array, position: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.wrap_key_data(key, impl="threefry2x32"), position)
        return jax.random.gumbel(key, (vocab,), jnp.float32)

    for _ in positions_R.shape:
        row = jax.vmap(row)
    return row(keys_R2, positions_R)


def _largest_mass(logits_RV: jax.Array, mass_RV: jax.Array, count_R: jax.Array) -> jax.Array:
    """The mass of the `count` largest logits, and of those that tie with the last of them.

    The least of them is the largest float that so many logits reach, found bit by bit.
    """
    order_RV = _ordered_bits(logits_RV)
    steps = jnp.arange(1, 1 << BITS_A_PASS, dtype=jnp.uint32)

    def narrow(index: jax.Array, least_R: jax.Array) -> jax.Array:
        shift = (32 - BITS_A_PASS * (index + 1)).astype(jnp.uint32)
        tried_SR = least_R + (steps << shift).reshape(-1, *(1,) * least_R.ndim)
        count_SR = jnp.sum(order_RV >= tried_SR[..., None], axis=-1, dtype=jnp.float32)
        return least_R + (jnp.sum(count_SR >= count_R, axis=0, dtype=jnp.uint32) << shift)

    least_R = lax.fori_loop(0, 32 // BITS_A_PASS, narrow, jnp.zeros(logits_RV.shape[:-1], jnp.uint32))
    return jnp.sum(jnp.where(order_RV >= least_R[..., None], mass_RV, 0), axis=-1)


def _ordered_bits(x: jax.Array) -> jax.Array:
    """uint32 that compare as the floats do."""
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def logprobs_of(logits_RV: jax.Array, tokens_R: jax.Array, top: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Log-probability [..., R] of the chosen tokens, and those [..., R, top] and ids of the likeliest."""
    logprobs_RV = jax.nn.log_softmax(logits_RV, axis=-1)
    here_RV = jnp.arange(logits_RV.shape[-1]) == tokens_R[..., None]
    chosen_R = jnp.sum(jnp.where(here_RV, logprobs_RV, 0), axis=-1)
    return (chosen_R, *_top(logprobs_RV, top))


def _top(x_RV: jax.Array, k: int, parts: int = 16) -> tuple[jax.Array, jax.Array]:
    """lax.top_k, first within parts of the vocabulary, which stay on the devices that hold them."""
    vocab = x_RV.shape[-1]
    if vocab % parts or vocab // parts < k:
        return lax.top_k(x_RV, k)
    values_RPk, ids_RPk = lax.top_k(x_RV.reshape(*x_RV.shape[:-1], parts, vocab // parts), k)
    ids_RPk += (jnp.arange(parts) * (vocab // parts))[:, None]
    values_Rk, best_Rk = lax.top_k(values_RPk.reshape(*x_RV.shape[:-1], parts * k), k)
    return values_Rk, jnp.take_along_axis(ids_RPk.reshape(*x_RV.shape[:-1], parts * k), best_Rk, axis=-1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adjustments:
    """What changes the logits of each row before sampling.

    Args:
      counts: int32 [..., R, V], how often each token has been generated.
      in_prompt: bool [..., R, V], which tokens the prompt has.
      repetition, presence, frequency: float32 [..., R], the penalties.
      bias_ids, bias: int32 and float32 [..., R, N], added to single tokens; ids past the vocabulary are ignored.
      allowed: uint32 [..., R, V / 32 rounded up], a bit a token that may be chosen.
    """

    counts: jax.Array
    in_prompt: jax.Array
    repetition: jax.Array
    presence: jax.Array
    frequency: jax.Array
    bias_ids: jax.Array
    bias: jax.Array
    allowed: jax.Array


def adjust(logits_RV: jax.Array, by: Adjustments) -> jax.Array:
    """Penalties (as vLLM and the OpenAI API define them), then biases, then what is not allowed.

    The repetition penalty divides positive logits and multiplies negative ones of tokens seen in prompt or output;
    frequency and presence penalties are subtracted for tokens in the output.
    """
    seen_RV = by.in_prompt | (by.counts > 0)
    factor_R1 = by.repetition[..., None]
    penalised_RV = jnp.where(logits_RV > 0, logits_RV / factor_R1, logits_RV * factor_R1)
    logits_RV = jnp.where(seen_RV, penalised_RV, logits_RV)
    logits_RV -= by.frequency[..., None] * by.counts + by.presence[..., None] * (by.counts > 0)
    rows = jnp.indices(by.bias_ids.shape, sparse=True)[:-1]
    logits_RV = logits_RV.at[(*rows, by.bias_ids)].add(by.bias, mode="drop")
    tokens = jnp.arange(logits_RV.shape[-1])
    words_RV = jnp.take(by.allowed, tokens // 32, axis=-1)
    return jnp.where((words_RV >> (tokens % 32).astype(jnp.uint32)) & 1 == 1, logits_RV, -jnp.inf)
