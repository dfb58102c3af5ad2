"""Sampling on the device, vectorised over requests, each with its own settings and its own randomness.

Logits are looked at in parts of the vocabulary, [..., R, P, C]: a device of a mesh has whole parts, and what is drawn
is first a part by its share and then a token of it, so that little noise is needed. Only log-probabilities are sorted.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

MOST_PARTS = 64
"""Few enough that adding up what a GPU's threads have of a part costs less than the part."""
TRIES = 4
"""Tokens that are drawn at once, to have one that the cuts keep."""
SHARES = (0.25, 0.5, 0.7, 0.85, 1.0, 1.2, 1.5, 2.0, 4.0)
"""The k-th largest logit is first looked for where so many times k are expected to be larger."""
DEPTHS = (1.0, 2.0, 3.0, 4.5, 6.0, 8.0, 11.0, 15.0, 20.0)
"""For a k too large for that: so many temperatures below the largest."""
DEEPEST = 100.0
"""What lies so many temperatures below has no mass in float32."""
MOST_ROUNDS = 64
"""In which any bracket has narrowed to neighbouring floats."""

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
    # Apart from what is made of it, which the compiler would else find in passes over all logits of its own.
    largest_RP = lax.optimization_barrier(jnp.max(logits_RPC, axis=-1))
    part_R1 = jnp.argmax(largest_RP, axis=-1, keepdims=True)
    greedy_R = _token(part_R1, jnp.argmax(_take_parts(logits_RPC, part_R1), axis=-1), logits_RPC)[..., 0]
    if means == "greedy":
        return greedy_R
    drawing = _Drawing(logits_RPC, largest_RP, state, positions_R)
    drawn_R = drawing.plainly() if means == "draw" else drawing.within_cuts()
    return jnp.where(state.temperature > 0, drawn_R, greedy_R)


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


class _Bracket(NamedTuple):
    """Where the k-th largest logit of each row is: at least `low`, below `high`; all [..., R].

    The mass of what top-k keeps is at most `most`, that of all from `low`, and at least `least`.
    """

    low: jax.Array
    high: jax.Array
    most: jax.Array
    least: jax.Array


class _Tries(NamedTuple):
    """Tokens drawn for each row, their logits, and the mass and number of tokens of larger ones; all [..., R, A]."""

    tokens: jax.Array
    logits: jax.Array
    above: jax.Array
    rank: jax.Array


class _Progress(NamedTuple):
    """`below` [..., R]: nothing of this logit or less is kept; `drawn` are the tokens of the rows that are `done`."""

    bracket: _Bracket
    tries: _Tries
    below: jax.Array
    rejected: jax.Array
    drawn: jax.Array
    done: jax.Array


@dataclasses.dataclass(frozen=True)
class _Drawing:
    """Draws from logits float32 [..., R, P, C], of whose parts `peaks` [..., R, P] are the largest."""

    logits: jax.Array
    peaks: jax.Array
    state: SamplingState
    positions: jax.Array

    @functools.cached_property
    def largest(self) -> jax.Array:
        """[..., R]."""
        return jnp.max(self.peaks, axis=-1)

    def plainly(self) -> jax.Array:
        """Tokens [..., R] of rows that have neither top-k nor top-p."""
        nothing_R = jnp.full(self.largest.shape, -jnp.inf)
        return self._draw(nothing_R, nothing_R, 0, 1)[0][..., 0]

    def within_cuts(self) -> jax.Array:
        """Tokens [..., R] among those that top-k and then top-p keep.

        These are the tokens of at least some logit, which need not be known: a token drawn from more than is kept is,
        if it is kept, drawn from what is. If it is not, nothing of that logit or less is, and the next ones are drawn
        from the rest. A token's rank decides on top-k, and on top-p the mass above it, as a share of what top-k
        keeps. Of that, bounds are enough, mostly those of the first two looks at where the k-th logit is.
        """
        first, floor_R = self._first_bracket()
        nothing_R = jnp.full(self.largest.shape, -jnp.inf)
        tries = self._try(floor_R, nothing_R, jnp.int32(0))
        # Of rows that have too few above the floor nothing is known yet.
        well_R1 = ((self.state.top_k == 0) | (first.low >= floor_R))[..., None]
        tries = tries._replace(
            logits=jnp.where(well_R1, tries.logits, -jnp.inf), rank=jnp.where(well_R1, tries.rank, jnp.inf)
        )
        undecided_R = jnp.zeros(self.largest.shape, bool)
        # What a row draws that takes the likeliest does not matter.
        done_R = self.state.temperature <= 0
        progress = _Progress(
            self._narrowed(first), tries, nothing_R, undecided_R, jnp.zeros(done_R.shape, jnp.int32), done_R
        )

        def unsettled(carry: tuple[jax.Array, _Progress]) -> jax.Array:
            return ~jnp.all(carry[1].done)

        def again(carry: tuple[jax.Array, _Progress]) -> tuple[jax.Array, _Progress]:
            number, now = carry
            tries = self._try(now.bracket.low, now.below, number)
            tries = jax.tree.map(lambda new, old: jnp.where(now.rejected[..., None], new, old), tries, now.tries)
            now = now._replace(bracket=self._narrowed(now.bracket), tries=tries)
            return number + 1, self._decided(now, last=number >= MOST_ROUNDS)

        start = (jnp.int32(1), self._decided(progress, last=jnp.bool_(False)))
        return lax.while_loop(unsettled, again, start)[1].drawn

    def _first_bracket(self) -> tuple[_Bracket, jax.Array]:
        """Where the k-th largest is, and a logit [..., R] that most likely at least k reach.

        Rows without top-k keep all, which is known.
        """
        temperature_R, all_R = self._temperature(), self.state.top_k == 0
        thresholds_RA, expected_RA = self._expected()
        depths_RA = self.largest[..., None] - temperature_R[..., None] * jnp.asarray(DEPTHS)
        thresholds_RA = jnp.where(expected_RA, thresholds_RA, depths_RA)
        floor_R = jnp.where(expected_RA[..., -2], thresholds_RA[..., -2], thresholds_RA[..., -1])
        fewer = [(jnp.float32(1), self.logits < thresholds_RA[..., i, None, None]) for i in range(len(SHARES))]
        sums_RA = self._sums(*fewer, (self._mass(), jnp.bool_(True)))
        low_R, high_R = self._ends(thresholds_RA, self._vocabulary - sums_RA[..., :-1])
        whole_R, nothing_R = sums_RA[..., -1], jnp.full_like(low_R, -jnp.inf)
        low_R = jnp.maximum(low_R, self.largest - DEEPEST * temperature_R)
        bracket = _Bracket(
            low=jnp.where(all_R, nothing_R, low_R),
            high=jnp.minimum(high_R, jnp.nextafter(self.largest, jnp.inf)),
            most=whole_R,
            least=jnp.where(all_R, whole_R, 0),
        )
        return bracket, jnp.where(all_R, nothing_R, floor_R)

    def _expected(self) -> tuple[jax.Array, jax.Array]:
        """Logits [..., R, A] that about SHARES times k should reach, and whether that many can be told from the peaks.

        Of n tokens thrown into P parts 1 - exp(-n / P) of the parts get one, so as many peaks are among the n largest.
        """
        parts = self.peaks.shape[-1]
        count_RA = self.state.top_k[..., None] * jnp.asarray(SHARES)
        hit_RA = jnp.clip(jnp.ceil(-parts * jnp.expm1(-count_RA / parts)), 1, parts)
        reach_RP = jnp.sum(self.peaks[..., None, :] >= self.peaks[..., :, None], axis=-1)
        enough_RAP = reach_RP[..., None, :] >= hit_RA[..., None]
        thresholds_RA = jnp.max(jnp.where(enough_RAP, self.peaks[..., None, :], -jnp.inf), axis=-1)
        return thresholds_RA, count_RA < 0.7 * parts * math.log(parts)

    def _narrowed(self, bracket: _Bracket) -> _Bracket:
        """A quarter of each bracket; where no float is left between its ends, `low` is the k-th largest."""
        quarter_R1 = (bracket.high - bracket.low)[..., None] / 4
        thresholds_RA = bracket.low[..., None] + quarter_R1 * jnp.arange(4)
        thresholds_RA = jnp.concatenate([thresholds_RA, bracket.high[..., None]], axis=-1)
        count_RA, mass_RA = self._counts_and_masses(thresholds_RA, jnp.greater_equal, jnp.less)
        low_R, high_R = self._ends(thresholds_RA, count_RA)
        top_k_R1 = self.state.top_k[..., None]
        most_R = jnp.min(mass_RA, axis=-1, where=count_RA >= top_k_R1, initial=jnp.inf)
        least_R = jnp.max(mass_RA, axis=-1, where=count_RA <= top_k_R1, initial=0)
        narrower = _Bracket(
            jnp.maximum(low_R, bracket.low),
            jnp.minimum(high_R, bracket.high),
            jnp.minimum(most_R, bracket.most),
            jnp.maximum(least_R, bracket.least),
        )
        exact_R = (narrower.low == bracket.low) & (narrower.high == bracket.high)
        narrower = narrower._replace(least=jnp.where(exact_R, narrower.most, narrower.least))
        return jax.tree.map(lambda new, old: jnp.where(self.state.top_k > 0, new, old), narrower, bracket)

    def _ends(self, thresholds_RA: jax.Array, count_RA: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The largest threshold that at least k logits reach, and the smallest that fewer do, [..., R]."""
        enough_RA = count_RA >= self.state.top_k[..., None]
        return (
            jnp.max(thresholds_RA, axis=-1, where=enough_RA, initial=-jnp.inf),
            jnp.min(thresholds_RA, axis=-1, where=~enough_RA, initial=jnp.inf),
        )

    def _try(self, floor_R: jax.Array, below_R: jax.Array, number: jax.Array) -> _Tries:
        """Draw a few tokens of at least some logit and above another."""
        tokens_RA, logits_RA = self._draw(floor_R, below_R, number * TRIES, TRIES)
        rank_RA, above_RA = self._counts_and_masses(logits_RA, jnp.greater, jnp.less_equal)
        return _Tries(tokens_RA, logits_RA, above_RA, rank_RA)

    def _counts_and_masses(
        self, bounds_RA: jax.Array, within: Callable[..., jax.Array], outside: Callable[..., jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        """How many tokens are within each bound, and their mass, [..., R, A] each.

        What is outside is counted, since the compiler would keep a condition that is used twice in memory.
        """
        bounds = [bounds_RA[..., i, None, None] for i in range(bounds_RA.shape[-1])]
        terms = [(jnp.float32(1), outside(self.logits, bound)) for bound in bounds]
        terms += [(self._mass(), within(self.logits, bound)) for bound in bounds]
        sums_RA = self._sums(*terms)
        return self._vocabulary - sums_RA[..., : len(bounds)], sums_RA[..., len(bounds) :]

    def _sums(self, *terms: tuple[jax.Array, jax.Array]) -> jax.Array:
        """Float32 [..., R, A]: of each pair the sum of the values [..., R, P, C] where the condition holds."""
        return jnp.sum(_part_sums(*terms), axis=-1)

    @property
    def _vocabulary(self) -> int:
        return math.prod(self.logits.shape[-2:])

    def _decided(self, now: _Progress, last: jax.Array) -> _Progress:
        """Take each row's first token that is kept, if those before it are not; the `last` time what comes nearest."""
        tries, bracket, top_p_R1 = now.tries, now.bracket, self.state.top_p[..., None]
        own_RA = jnp.exp((tries.logits - self.largest[..., None]) / self._temperature()[..., None])
        in_top_k_RA = (tries.rank < self.state.top_k[..., None]) | (self.state.top_k == 0)[..., None]
        # At 1 everything stays, whatever rounding makes of the sums.
        all_R1 = top_p_R1 >= 1
        least_RA = jnp.maximum(bracket.least[..., None], tries.above + own_RA)
        most_R1 = jnp.where(last, jnp.inf, bracket.most[..., None])
        kept_RA = in_top_k_RA & ((tries.above < top_p_R1 * least_RA) | all_R1)
        may_be_RA = in_top_k_RA & ((tries.above < top_p_R1 * most_R1) | all_R1)
        rejected_R = ~jnp.any(may_be_RA, axis=-1)
        found_R = _first(kept_RA, may_be_RA) & ~rejected_R
        drawn_R = jnp.where(now.done, now.drawn, _first(tries.tokens, may_be_RA))
        highest_R = jnp.max(tries.logits, axis=-1)
        return now._replace(
            below=jnp.where(rejected_R, highest_R, now.below),
            rejected=rejected_R,
            drawn=drawn_R,
            done=now.done | found_R | last,
        )

    def _draw(
        self, floor_R: jax.Array, below_R: jax.Array, number: jax.Array | int, count: int
    ) -> tuple[jax.Array, jax.Array]:
        """Tokens and their logits [..., R, count], the draws of given numbers, of what min-p and the bounds leave."""
        floor_R = jnp.maximum(floor_R, self.largest + self.state.temperature * jnp.log(self.state.min_p))

        def within(x: jax.Array) -> jax.Array:
            return (x >= floor_R[..., None, None]) & (x > below_R[..., None, None])

        mass_RP = _part_sums((self._mass(), within(self.logits)))[..., 0, :]
        parts, inner = self.logits.shape[-2:]
        noise_RAN = _gumbel(self.state.keys, self.positions, number + jnp.arange(count), parts + inner)
        part_RA = jnp.argmax(jnp.log(mass_RP)[..., None, :] + noise_RAN[..., :parts], axis=-1)
        logits_RAC = _take_parts(self.logits, part_RA)
        noisy_RAC = logits_RAC / self._temperature()[..., None, None] + noise_RAN[..., parts:]
        inner_RA = jnp.argmax(jnp.where(within(logits_RAC), noisy_RAC, -jnp.inf), axis=-1)
        drawn_RA = jnp.take_along_axis(logits_RAC, inner_RA[..., None], axis=-1)[..., 0]
        return _token(part_RA, inner_RA, self.logits), drawn_RA

    def _mass(self) -> jax.Array:
        """[..., R, P, C], of which the largest is 1."""
        over_RPC = self.logits - self.largest[..., None, None]
        return jnp.exp(over_RPC / self._temperature()[..., None, None])

    def _temperature(self) -> jax.Array:
        """[..., R], by which can be divided."""
        return jnp.maximum(self.state.temperature, 1e-6)


def _part_sums(*terms: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Float32 [..., R, A, P]: of each of A pairs the sum over each part of the values where the condition holds.

    One pass over the logits makes all of them, if the compiler does not join what comes after. Counts are exact.
    """
    values = tuple(jnp.where(where, x, 0.0).astype(jnp.float32) for x, where in terms)
    zeros = (jnp.float32(0),) * len(values)

    def add(some: tuple[jax.Array, ...], others: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        return tuple(x + y for x, y in zip(some, others, strict=True))

    sums = lax.optimization_barrier(lax.reduce(values, zeros, add, (values[0].ndim - 1,)))
    return jnp.stack(sums, axis=-2)


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


def _top(x_RPC: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The k largest [..., R, k] in order, and where in the vocabulary they are.

    They lie in the k columns, places in the parts, that have the largest maxima, and of these in the k groups of
    parts that have: only maxima and few values are sorted.
    """
    parts, inner = x_RPC.shape[-2:]
    columns, group = min(k, inner), math.gcd(parts, 8)
    column_Rc = lax.top_k(jnp.max(x_RPC, axis=-2), columns)[1]
    x_RPc = jnp.take_along_axis(x_RPC, column_Rc[..., None, :], axis=-1)
    x_RgB = jnp.moveaxis(x_RPc.reshape(*x_RPc.shape[:-2], -1, group, columns), -2, -3)
    x_RgB = x_RgB.reshape(*x_RgB.shape[:-2], -1)
    block_Rb = lax.top_k(jnp.max(x_RgB, axis=-2), min(k, x_RgB.shape[-1]))[1]
    x_Rgb = jnp.take_along_axis(x_RgB, block_Rb[..., None, :], axis=-1)
    values_Rk, best_Rk = lax.top_k(x_Rgb.reshape(*x_Rgb.shape[:-2], -1), k)
    best_block_Rk = jnp.take_along_axis(block_Rb, best_Rk % block_Rb.shape[-1], axis=-1)
    part_Rk = best_block_Rk // columns * group + best_Rk // block_Rb.shape[-1]
    return values_Rk, part_Rk * inner + jnp.take_along_axis(column_Rc, best_block_Rk % columns, axis=-1)


def logprobs_of(logits_RV: jax.Array, tokens_R: jax.Array, top: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Log-probability [..., R] of the chosen tokens, and those [..., R, top] and ids of the likeliest."""
    logprobs_RV = jax.nn.log_softmax(logits_RV, axis=-1)
    here_RV = jnp.arange(logits_RV.shape[-1]) == tokens_R[..., None]
    chosen_R = jnp.sum(jnp.where(here_RV, logprobs_RV, 0), axis=-1)
    return (chosen_R, *_top(_in_parts(logprobs_RV), top))
