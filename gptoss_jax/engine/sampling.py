"""Sampling on the device, vectorised over requests, each with its own settings and its own randomness.

Nothing here sorts or gathers the vocabulary: what top-k and top-p keep is found by narrowing down a threshold with
sums over the vocabulary, which works on logits that are split over devices as it does on one.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

BITS_A_PASS = 4
"""Each pass over the logits tries 2^bits - 1 thresholds at once, so that it narrows one down by as many bits."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingState:
    """The settings of each row as arrays [..., R]; `keys` uint32 [..., R, 2] come from the seeds."""

    temperature: jax.Array
    top_p: jax.Array
    top_k: jax.Array
    min_p: jax.Array
    keys: jax.Array


def sample(
    logits_RV: jax.Array, state: SamplingState, positions_R: jax.Array, *, draws: bool = True, cuts: bool = True
) -> jax.Array:
    """Choose a token int32 [..., R] a row from logits float32 [..., R, V].

    The same seed, position and logits give the same token in any batch. Without `draws` no row has a temperature, and
    without `cuts` none has a top-k or top-p: what that saves is decided when the program is made, because a condition
    on the device would make the host wait for it.
    """
    greedy_R = jnp.argmax(logits_RV, axis=-1).astype(jnp.int32)
    if not draws:
        return greedy_R
    scaled_RV = logits_RV / jnp.maximum(state.temperature, 1e-6)[..., None]
    kept_RV = _top_k_top_p(scaled_RV, state) if cuts else scaled_RV
    largest_R1 = jnp.max(kept_RV, axis=-1, keepdims=True)
    kept_RV = jnp.where(kept_RV >= largest_R1 + jnp.log(state.min_p)[..., None], kept_RV, -jnp.inf)
    drawn_R = jnp.argmax(kept_RV + _gumbel(state.keys, positions_R, kept_RV.shape[-1]), axis=-1)
    return jnp.where(state.temperature > 0, drawn_R.astype(jnp.int32), greedy_R)


def _gumbel(keys_R2: jax.Array, positions_R: jax.Array, vocab: int) -> jax.Array:
    """Noise [..., R, V] that depends on a row's key and position alone."""

    def row(key: jax.Array, position: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.wrap_key_data(key, impl="threefry2x32"), position)
        return jax.random.gumbel(key, (vocab,), jnp.float32)

    for _ in positions_R.shape:
        row = jax.vmap(row)
    return row(keys_R2, positions_R)


def _top_k_top_p(logits_RV: jax.Array, state: SamplingState) -> jax.Array:
    """-inf for what top-k leaves out, then for what top-p leaves out of the rest; ties with the last stay."""
    vocab = logits_RV.shape[-1]
    wanted_R = jnp.where(state.top_k > 0, jnp.minimum(state.top_k, vocab), vocab).astype(jnp.float32)
    logits_RV = _keep_until(logits_RV, jnp.ones_like(logits_RV), wanted_R)
    probs_RV = jax.nn.softmax(logits_RV, axis=-1)
    # At 1 everything stays, whatever rounding makes of the sum.
    return _keep_until(logits_RV, probs_RV, jnp.where(state.top_p < 1, state.top_p, jnp.inf))


def _keep_until(logits_RV: jax.Array, mass_RV: jax.Array, wanted_R: jax.Array) -> jax.Array:
    """Keep the largest logits until their mass reaches what is wanted; the others become -inf.

    The threshold is the largest float whose logits at or above it have the mass, found bit by bit.
    """
    order_RV = _ordered_bits(logits_RV)
    steps = jnp.arange(1, 1 << BITS_A_PASS, dtype=jnp.uint32)

    def narrow(index: jax.Array, threshold_R: jax.Array) -> jax.Array:
        shift = (32 - BITS_A_PASS * (index + 1)).astype(jnp.uint32)
        tried_SR = threshold_R + (steps << shift).reshape(-1, *(1,) * threshold_R.ndim)
        # One fused pass: a compare and a sum for each step.
        mass_SR = jnp.sum(jnp.where(order_RV >= tried_SR[..., None], mass_RV, 0), axis=-1)
        return threshold_R + (jnp.sum(mass_SR >= wanted_R, axis=0, dtype=jnp.uint32) << shift)

    threshold_R = lax.fori_loop(0, 32 // BITS_A_PASS, narrow, jnp.zeros(logits_RV.shape[:-1], jnp.uint32))
    return jnp.where(order_RV >= threshold_R[..., None], logits_RV, -jnp.inf)


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
