"""Sampling on the device, vectorised over requests, each with its own settings and its own randomness.

Logits are looked at in parts of the vocabulary, [..., R, P, C]: a device of a mesh has whole parts, and what is drawn
is first a part by its share and then a token of it, so that little noise is needed. Only the largest few are sorted.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

MOST_PARTS = 128
LISTED = 256
"""The k-th largest logit is looked up among so many of the largest; for a larger k it takes passes over all logits."""
TRIES = 4
"""Tokens that are drawn at once, to have one that top-p keeps."""
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
    logits_RPC = _in_parts(logits_RV)
    if means == "cut":
        return _cut(logits_RPC, state, positions_R)
    # Apart from what is made of it, which the compiler would else find in passes over all logits of its own.
    largest_RP = lax.optimization_barrier(jnp.max(logits_RPC, axis=-1))
    part_R1 = jnp.argmax(largest_RP, axis=-1, keepdims=True)
    greedy_R = _token(part_R1, jnp.argmax(_take_parts(logits_RPC, part_R1), axis=-1), logits_RPC)[..., 0]
    if means == "greedy":
        return greedy_R
    drawn_R = _Drawing(logits_RPC, jnp.max(largest_RP, axis=-1), state, positions_R).plainly()
    return jnp.where(state.temperature > 0, drawn_R, greedy_R)


def _cut(logits_RPC: jax.Array, state: SamplingState, positions_R: jax.Array) -> jax.Array:
    """Tokens [..., R] of rows that may have top-k and top-p, in few passes over the logits."""
    # As above.
    columns_RC = lax.optimization_barrier(jnp.max(logits_RPC, axis=-2))
    floor_R = jnp.where(state.top_k > 0, _kth_of_few(logits_RPC, columns_RC, state.top_k), -jnp.inf)
    drawing = _Drawing(logits_RPC, jnp.max(columns_RC, axis=-1), state, positions_R)
    return jnp.where(state.temperature > 0, drawing.within_cuts(floor_R), drawing.likeliest())


def _in_parts(x_RV: jax.Array) -> jax.Array:
    """[..., R, V] -> [..., R, P, C], whose parts are the same on any mesh."""
    parts = MOST_PARTS
    while x_RV.shape[-1] % parts:
        parts //= 2
    return x_RV.reshape(*x_RV.shape[:-1], parts, -1)


def _take_parts(x_RPC: jax.Array, parts_RA: jax.Array) -> jax.Array:
    """[..., R, A, C] of the given parts."""
    return jnp.take_along_axis(x_RPC, parts_RA[..., None], axis=-2)


def _token(parts_RA: jax.Array, inner_RA: jax.Array, x_RPC: jax.Array) -> jax.Array:
    """Where in the vocabulary the places in some parts are."""
    return (parts_RA * x_RPC.shape[-1] + inner_RA).astype(jnp.int32)


@dataclasses.dataclass(frozen=True)
class _Tries:
    """Tokens drawn for each row, their logits, and which of them are kept; all [..., R, A]."""

    tokens: jax.Array
    logits: jax.Array
    kept: jax.Array


@dataclasses.dataclass(frozen=True)
class _Drawing:
    """Draws from logits float32 [..., R, P, C], of which `largest` [..., R] is the largest."""

    logits: jax.Array
    largest: jax.Array
    state: SamplingState
    positions: jax.Array

    def plainly(self) -> jax.Array:
        """Tokens [..., R] of rows that have neither top-k nor top-p."""
        nothing_R = jnp.full(self.largest.shape, -jnp.inf)
        return self._draw(self._mass(), nothing_R, nothing_R, 0, 1)[0][..., 0]

    def likeliest(self) -> jax.Array:
        """Tokens [..., R] of the largest logit: the first, where several have it."""
        parts, inner = self.logits.shape[-2:]
        token_PC = jnp.arange(parts * inner, dtype=jnp.int32).reshape(parts, inner)
        is_largest_RPC = self.logits == self.largest[..., None, None]
        first_RP = jnp.min(jnp.where(is_largest_RPC, token_PC, parts * inner - 1), axis=-1)
        return jnp.min(lax.optimization_barrier(first_RP), axis=-1)

    def within_cuts(self, floor_R: jax.Array) -> jax.Array:
        """Tokens [..., R] among those that top-k and then top-p keep.

        These are the tokens of at least some logit. Top-k's is `floor_R`, if k is not too large. Top-p's need not be
        known: a token drawn from more than it keeps is, if it keeps it, drawn from what it keeps. If it does not,
        nothing of that logit or less is kept, and the next ones are drawn from the rest.
        """
        top_k_R = self.state.top_k
        below_R = jnp.full(self.largest.shape, -jnp.inf)
        # What a row draws that takes the likeliest does not matter.
        greedy_R = self.state.temperature <= 0
        first = self._try(floor_R, below_R, jnp.int32(0))
        done_R = greedy_R | (jnp.any(first.kept, axis=-1) & (top_k_R <= LISTED))
        drawn_R = _first(first.tokens, first.kept)
        return lax.cond(jnp.all(done_R), lambda: drawn_R, lambda: self._go_on(floor_R, first, done_R))

    def _go_on(self, floor_R: jax.Array, first: _Tries, done_R: jax.Array) -> jax.Array:
        """For what the first tries did not settle."""
        many_R = self.state.top_k > LISTED
        floor_R = lax.cond(
            jnp.any(many_R & ~done_R),
            lambda: jnp.where(many_R, _kth_largest(self.logits, self.state.top_k), floor_R),
            lambda: floor_R,
        )
        below_R = jnp.where(many_R, -jnp.inf, jnp.max(first.logits, axis=-1))
        start = (jnp.int32(1), below_R, _first(first.tokens, first.kept), done_R)
        type Carry = tuple[jax.Array, jax.Array, jax.Array, jax.Array]

        def unsettled(carry: Carry) -> jax.Array:
            return ~jnp.all(carry[3])

        def again(carry: Carry) -> Carry:
            number, below_R, drawn_R, done_R = carry
            tries = self._try(floor_R, below_R, number)
            highest_R = jnp.max(tries.logits, axis=-1)
            drawn_R = jnp.where(done_R, drawn_R, _first(tries.tokens, tries.kept))
            # Logits that are no numbers must not make it try for ever.
            done_R |= jnp.any(tries.kept, axis=-1) | ~(highest_R > below_R)
            return number + 1, highest_R, drawn_R, done_R

        return lax.while_loop(unsettled, again, start)[2]

    def _try(self, floor_R: jax.Array, below_R: jax.Array, number: jax.Array) -> _Tries:
        """Draw a few tokens of at least some logit and above another, and see which of them top-p keeps."""
        mass_RPC = self._mass()
        tokens_RA, logits_RA = self._draw(mass_RPC, floor_R, below_R, number * TRIES, TRIES)
        top_p_R = self.state.top_p
        kept_RPC = self.logits >= floor_R[..., None, None]
        whole_R = jnp.sum(_part_sums(mass_RPC, kept_RPC), axis=-1)
        higher = [self.logits > logits_RA[..., i, None, None] for i in range(TRIES)]
        above_RA = jnp.sum(jnp.stack([_part_sums(mass_RPC, those) for those in higher], axis=-2), axis=-1)
        # At 1 everything stays, whatever rounding makes of the sum.
        kept_RA = (above_RA < (top_p_R * whole_R)[..., None]) | (top_p_R >= 1)[..., None]
        return _Tries(tokens_RA, logits_RA, kept_RA)

    def _draw(
        self, mass_RPC: jax.Array, floor_R: jax.Array, below_R: jax.Array, number: jax.Array | int, count: int
    ) -> tuple[jax.Array, jax.Array]:
        """Tokens and their logits [..., R, count], the draws of given numbers, of what min-p and the bounds leave."""
        temperature_R = self.state.temperature
        floor_R = jnp.maximum(floor_R, self.largest + temperature_R * jnp.log(self.state.min_p))

        def within(x: jax.Array, floor: jax.Array, below: jax.Array) -> jax.Array:
            return (x >= floor[..., None, None]) & (x > below[..., None, None])

        mass_RP = _part_sums(mass_RPC, within(self.logits, floor_R, below_R))
        parts, inner = self.logits.shape[-2:]
        noise_RAN = _gumbel(self.state.keys, self.positions, number + jnp.arange(count), parts + inner)
        part_RA = jnp.argmax(jnp.log(mass_RP)[..., None, :] + noise_RAN[..., :parts], axis=-1)
        logits_RAC = _take_parts(self.logits, part_RA)
        noisy_RAC = logits_RAC / _divisor(temperature_R)[..., None, None] + noise_RAN[..., parts:]
        noisy_RAC = jnp.where(within(logits_RAC, floor_R, below_R), noisy_RAC, -jnp.inf)
        inner_RA = jnp.argmax(noisy_RAC, axis=-1)
        drawn_RA = jnp.take_along_axis(logits_RAC, inner_RA[..., None], axis=-1)[..., 0]
        return _token(part_RA, inner_RA, self.logits), drawn_RA

    def _mass(self) -> jax.Array:
        """[..., R, P, C], of which the largest is 1."""
        over_RPC = self.logits - self.largest[..., None, None]
        return jnp.exp(over_RPC / _divisor(self.state.temperature)[..., None, None])


def _divisor(temperature_R: jax.Array) -> jax.Array:
    return jnp.maximum(temperature_R, 1e-6)


def _part_sums(x_RPC: jax.Array, where_RPC: jax.Array) -> jax.Array:
    """[..., R, P]; one pass makes all that do not depend on each other, if the compiler does not join sums of sums."""
    return lax.optimization_barrier(jnp.sum(jnp.where(where_RPC, x_RPC, 0), axis=-1))


def _first(values_RA: jax.Array, kept_RA: jax.Array) -> jax.Array:
    """The first value of each row that is kept; the first one where none is."""
    return jnp.take_along_axis(values_RA, jnp.argmax(kept_RA, axis=-1, keepdims=True), axis=-1)[..., 0]


def _gumbel(keys_R2: jax.Array, positions_R: jax.Array, numbers_A: jax.Array, size: int) -> jax.Array:
    """Noise [..., R, A, size] that depends on a row's key and position and a draw's number alone."""

    def row(key: jax.Array, position: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.wrap_key_data(key, impl="threefry2x32"), position)

        def draw(number: jax.Array) -> jax.Array:
            return jax.random.gumbel(jax.random.fold_in(key, number), (size,), jnp.float32)

        return jax.vmap(draw)(numbers_A)

    for _ in positions_R.shape:
        row = jax.vmap(row)
    return row(keys_R2, positions_R)


def _kth_of_few(logits_RPC: jax.Array, columns_RC: jax.Array, k_R: jax.Array) -> jax.Array:
    """The k-th largest logit, for a k from 1 to LISTED."""
    few_RL, _ = _top(logits_RPC, columns_RC, min(LISTED, math.prod(logits_RPC.shape[-2:])))
    return jnp.take_along_axis(few_RL, jnp.clip(k_R - 1, 0, few_RL.shape[-1] - 1)[..., None], axis=-1)[..., 0]


def _kth_largest(logits_RPC: jax.Array, k_R: jax.Array) -> jax.Array:
    """The k-th largest logit: the largest float that at least k reach, found bit by bit."""
    order_RPC = _ordered_bits(logits_RPC)
    steps = jnp.arange(1, 1 << BITS_A_PASS, dtype=jnp.uint32)

    def narrow(index: jax.Array, least_R: jax.Array) -> jax.Array:
        shift = (32 - BITS_A_PASS * (index + 1)).astype(jnp.uint32)
        tried_SR = least_R + (steps << shift).reshape(-1, *(1,) * least_R.ndim)
        count_SR = jnp.sum(order_RPC >= tried_SR[..., None, None], axis=(-2, -1), dtype=jnp.int32)
        return least_R + (jnp.sum(count_SR >= k_R, axis=0, dtype=jnp.uint32) << shift)

    least_R = lax.fori_loop(0, 32 // BITS_A_PASS, narrow, jnp.zeros(k_R.shape, jnp.uint32))
    return jnp.min(jnp.where(order_RPC >= least_R[..., None, None], logits_RPC, jnp.inf), axis=(-2, -1))


def _top(x_RPC: jax.Array, columns_RC: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The k largest [..., R, k] in order, and where in the vocabulary they are.

    They lie in the k columns, places in the parts, that have the largest maxima `columns_RC`, and of these in the k
    groups of parts that have: only maxima and few values are sorted.
    """
    parts, inner = x_RPC.shape[-2:]
    columns, group = min(k, inner), math.gcd(parts, 8)
    column_Rc = lax.top_k(columns_RC, columns)[1]
    x_RPc = jnp.take_along_axis(x_RPC, column_Rc[..., None, :], axis=-1)
    x_RgB = jnp.moveaxis(x_RPc.reshape(*x_RPc.shape[:-2], -1, group, columns), -2, -3)
    x_RgB = x_RgB.reshape(*x_RgB.shape[:-2], -1)
    block_Rb = lax.top_k(jnp.max(x_RgB, axis=-2), min(k, x_RgB.shape[-1]))[1]
    x_Rgb = jnp.take_along_axis(x_RgB, block_Rb[..., None, :], axis=-1)
    values_Rk, best_Rk = lax.top_k(x_Rgb.reshape(*x_Rgb.shape[:-2], -1), k)
    best_block_Rk = jnp.take_along_axis(block_Rb, best_Rk % block_Rb.shape[-1], axis=-1)
    part_Rk = best_block_Rk // columns * group + best_Rk // block_Rb.shape[-1]
    return values_Rk, part_Rk * inner + jnp.take_along_axis(column_Rc, best_block_Rk % columns, axis=-1)


def _ordered_bits(x: jax.Array) -> jax.Array:
    """uint32 that compare as the floats do."""
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def logprobs_of(logits_RV: jax.Array, tokens_R: jax.Array, top: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Log-probability [..., R] of the chosen tokens, and those [..., R, top] and ids of the likeliest."""
    logprobs_RV = jax.nn.log_softmax(logits_RV, axis=-1)
    here_RV = jnp.arange(logits_RV.shape[-1]) == tokens_R[..., None]
    chosen_R = jnp.sum(jnp.where(here_RV, logprobs_RV, 0), axis=-1)
    logprobs_RPC = _in_parts(logprobs_RV)
    return (chosen_R, *_top(logprobs_RPC, jnp.max(logprobs_RPC, axis=-2), top))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Penalties:
    """What the tokens so far change, with `repetition`, `presence` and `frequency` float32 [..., R].

    `counts` int32 and `in_prompt` bool [..., R, V] say how often each token has been generated, and which of them the
    prompt has; the host leaves them out, since they are kept on the device.
    """

    repetition: jax.Array
    presence: jax.Array
    frequency: jax.Array
    counts: jax.Array | None = None
    in_prompt: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adjustments:
    """What changes the logits of each row before sampling.

    Args:
      bias_ids, bias: int32 and float32 [..., R, N], added to single tokens; ids past the vocabulary are ignored.
      penalties: None where no row has any.
      allowed: uint32 [..., R, V / 32 rounded up], a bit a token that may be chosen; None where all may.
    """

    bias_ids: jax.Array
    bias: jax.Array
    penalties: Penalties | None = None
    allowed: jax.Array | None = None


def adjust(logits_RV: jax.Array, by: Adjustments) -> jax.Array:
    """Penalties, then biases, then what is not allowed."""
    if by.penalties is not None:
        logits_RV = _penalise(logits_RV, by.penalties)
    rows = jnp.indices(by.bias_ids.shape, sparse=True)[:-1]
    logits_RV = logits_RV.at[(*rows, by.bias_ids)].add(by.bias, mode="drop")
    if by.allowed is None:
        return logits_RV
    tokens = jnp.arange(logits_RV.shape[-1])
    words_RV = jnp.take(by.allowed, tokens // 32, axis=-1)
    return jnp.where((words_RV >> (tokens % 32).astype(jnp.uint32)) & 1 == 1, logits_RV, -jnp.inf)


def _penalise(logits_RV: jax.Array, by: Penalties) -> jax.Array:
    """As vLLM and the OpenAI API define it.

    The repetition penalty divides positive logits and multiplies negative ones of tokens seen in prompt or output;
    frequency and presence penalties are subtracted for tokens in the output.
    """
    assert by.counts is not None
    assert by.in_prompt is not None
    seen_RV = by.in_prompt | (by.counts > 0)
    factor_R1 = by.repetition[..., None]
    penalised_RV = jnp.where(logits_RV > 0, logits_RV / factor_R1, logits_RV * factor_R1)
    logits_RV = jnp.where(seen_RV, penalised_RV, logits_RV)
    return logits_RV - (by.frequency[..., None] * by.counts + by.presence[..., None] * (by.counts > 0))
