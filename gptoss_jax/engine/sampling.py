"""Sampling on the device, vectorised over requests, each with its own settings and its own randomness.

Logits are looked at in parts of the vocabulary, [..., R, P, C]: a device of a mesh has whole parts, and what is drawn
is first a part by its share and then a token of it, so that little noise is needed. Only log-probabilities are sorted.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sharding import constrain

MOST_PARTS = 32
"""As many devices can share the vocabulary; more would leave a GPU little of each part to add up."""
STRETCHES = 8
"""Of each part, whose largest logits tell where the k-th largest of all may be."""
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
QUARTERS, FINER = 4, 8
"""Pieces that the second look at all rows cuts the brackets in, and those at the few rows that are left."""
LEAST_ROWS = 4
"""That another round looks at together, if so many are left."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingState:
    """The sampling settings of R rows, as arrays [..., R]; `keys` uint32 [..., R, 2] are derived from the seeds."""

    temperature: jax.Array
    top_p: jax.Array
    top_k: jax.Array
    min_p: jax.Array
    keys: jax.Array


def sample(logits_RV: jax.Array, state: SamplingState, positions_R: jax.Array, cuts: bool = True) -> jax.Array:
    """Sample a token int32 [..., R] for each row from logits float32 [..., R, V].

    Without `cuts`, no row may have top-k or top-p. The same seed, position and logits give the same token in any batch,
    with and without `cuts`.
    """
    logits_RPC = _in_parts(logits_RV)
    # Apart from what is made of it, which the compiler would else find in passes over all logits of its own.
    peaks_RPQ = _unsharded(lax.optimization_barrier(_peaks(logits_RPC)))
    part_R1 = jnp.argmax(jnp.max(peaks_RPQ, axis=-1), axis=-1, keepdims=True)
    greedy_R = _token(part_R1, jnp.argmax(_take_parts(logits_RPC, part_R1), axis=-1), logits_RPC)[..., 0]
    # As many as there are is all, which needs no look for the last of them.
    top_k_R = jnp.where(state.top_k < logits_RV.shape[-1], state.top_k, 0)
    state = dataclasses.replace(state, top_k=top_k_R)
    drawing = _Drawing(logits_RPC, peaks_RPQ.reshape(*peaks_RPQ.shape[:-2], -1), state, positions_R)
    drawn_R = drawing.within_cuts() if cuts else drawing.plainly()
    return jnp.where(state.temperature > 0, drawn_R, greedy_R)


def _in_parts(x_RV: jax.Array) -> jax.Array:
    """[..., R, V] -> [..., R, P, C], whose parts are the same on any mesh."""
    parts = MOST_PARTS
    while x_RV.shape[-1] % parts:
        parts //= 2
    return x_RV.reshape(*x_RV.shape[:-1], parts, -1)


def _unsharded(x_BR: jax.Array) -> jax.Array:
    """[B, R, ...], small and the same on all devices that share the vocabulary, so that they need not communicate."""
    return constrain(x_BR, ("samples", *(None,) * (x_BR.ndim - 1)))


def _peaks(x_RPC: jax.Array) -> jax.Array:
    """The largest of some stretches of each part, [..., R, P, Q]."""
    stretches = min(STRETCHES, x_RPC.shape[-1])
    missing = -x_RPC.shape[-1] % stretches
    padded_RPC = jnp.pad(x_RPC, [(0, 0)] * (x_RPC.ndim - 1) + [(0, missing)], constant_values=-jnp.inf)
    return jnp.max(padded_RPC.reshape(*x_RPC.shape[:-1], stretches, -1), axis=-1)


def _take_parts(x_RPC: jax.Array, parts_RA: jax.Array) -> jax.Array:
    """[..., R, A, C] of the given parts."""
    return jnp.take_along_axis(x_RPC, parts_RA[..., None], axis=-2)


def _token(parts_RA: jax.Array, inner_RA: jax.Array, x_RPC: jax.Array) -> jax.Array:
    """Where in the vocabulary the places in some parts are."""
    return (parts_RA * x_RPC.shape[-1] + inner_RA).astype(jnp.int32)


class _Bracket(NamedTuple):
    """Where the k-th largest logit of each row is: at least `low`, below `high`; all [..., R].

    As many as `reach` are at least `low`. The mass of what top-k keeps is at most `most`, that of all from `low`, and
    at least `least`.
    """

    low: jax.Array
    high: jax.Array
    reach: jax.Array
    most: jax.Array
    least: jax.Array


class _Progress(NamedTuple):
    """What is known of each row; all [..., R] but the `tokens` drawn for it last and their `logits` [..., R, A].

    `below`: nothing of this logit or less is kept; `drawn` are the tokens of the rows that are `done`, after as many
    `rounds`.
    """

    bracket: _Bracket
    tokens: jax.Array
    logits: jax.Array
    below: jax.Array
    rejected: jax.Array
    drawn: jax.Array
    done: jax.Array
    rounds: jax.Array


@dataclasses.dataclass(frozen=True)
class _Drawing:
    """Draws from logits float32 [..., R, P, C], of whose stretches `peaks` [..., R, N] are the largest."""

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
        bounds = self._bounds()
        return self._draw(self._part_mass(bounds), bounds, jnp.int32(0), 1)[0][..., 0]

    def within_cuts(self) -> jax.Array:
        """Tokens [..., R] among those that top-k and then top-p keep.

        These are the tokens of at least some logit, which need not be known: a token drawn from more than is kept is,
        if it is kept, drawn from what is. If it is not, nothing of that logit or less is, and the next ones are drawn
        from the rest. A token's rank decides on top-k, and on top-p the mass above it, as a share of what top-k
        keeps. Of that, bounds are enough, mostly those of the first two looks at where the k-th logit is.
        """
        return lax.while_loop(lambda now: ~jnp.all(now.done), self._some_again, self._first_round()).drawn

    def _first_round(self) -> _Progress:
        """Of all rows: a look for the k-th largest logit, and a second one with a few draws."""
        bracket, floor_R, mass_RP = self._first_bracket()
        tokens_RA, logits_RA = self._draw(mass_RP, self._bounds(floor_R), jnp.int32(0), TRIES)
        zeros_R = jnp.zeros(floor_R.shape, jnp.int32)
        now = _Progress(
            bracket,
            tokens_RA,
            logits_RA,
            below=jnp.full_like(floor_R, -jnp.inf),
            rejected=zeros_R > 0,
            drawn=zeros_R,
            # What a row draws that takes the likeliest does not matter.
            done=self.state.temperature <= 0,
            rounds=zeros_R,
        )
        # Draws of rows that have too few above the floor are not among all that are kept.
        return self._settled(now, (self.state.top_k == 0) | (bracket.low >= floor_R), QUARTERS)

    def _some_again(self, now: _Progress) -> _Progress:
        """Another round of the first few rows that are not done: a round reads all of a row, and few are left."""
        count = now.done.shape[-1]
        few = min(count, max(LEAST_ROWS, count // 8))
        place_R = jnp.cumsum(~now.done, axis=-1) - 1
        chosen_R = ~now.done & (place_R < few)
        here_SR = chosen_R[..., None, :] & (place_R[..., None, :] == jnp.arange(few)[:, None])
        rows_S = jnp.argmax(here_SR, axis=-1)

        def take[Rows](tree: Rows) -> Rows:
            return jax.tree.map(lambda x: _take_rows(x, rows_S), tree)

        some = _Drawing(take(self.logits), take(self.peaks), take(self.state), take(self.positions))
        again = jax.tree.map(lambda new_S: _take_rows(new_S, place_R), some._again(take(now)))
        return jax.tree.map(lambda new, old: jnp.where(_like(chosen_R, old), new, old), again, now)

    def _again(self, now: _Progress) -> _Progress:
        bounds = self._bounds(now.bracket.low, now.below)
        drawn = self._draw(self._part_mass(bounds), bounds, now.rounds * TRIES, TRIES)
        tokens_RA, logits_RA = jax.tree.map(
            lambda new, old: jnp.where(now.rejected[..., None], new, old), drawn, (now.tokens, now.logits)
        )
        return self._settled(now._replace(tokens=tokens_RA, logits=logits_RA), jnp.bool_(True), FINER)

    def _first_bracket(self) -> tuple[_Bracket, jax.Array, jax.Array]:
        """Where the k-th largest is, a logit [..., R] that most likely at least k reach, and from it each part's mass.

        Rows without top-k keep all, which is known.
        """
        temperature_R, all_R = self._temperature(), self.state.top_k == 0
        thresholds_RA, expected_RA = self._expected()
        depths_RA = self.largest[..., None] - temperature_R[..., None] * jnp.asarray(DEPTHS)
        thresholds_RA = jnp.where(expected_RA, thresholds_RA, depths_RA)
        floor_R = jnp.where(expected_RA[..., -2], thresholds_RA[..., -2], thresholds_RA[..., -1])
        floor_R = jnp.where(all_R, -jnp.inf, floor_R)
        terms = [(self._mass(), jnp.bool_(True)), (self._mass(), self._within(*self._bounds(floor_R)))]
        sums_RAP = _part_sums(*self._fewer(thresholds_RA), *terms)
        fewer_RA, whole_R = jnp.sum(sums_RAP[..., :-2, :], axis=-1), jnp.sum(sums_RAP[..., -2, :], axis=-1)
        low_R, high_R, count_R = self._ends(thresholds_RA, self._vocabulary - fewer_RA)
        deepest_R = self.largest - DEEPEST * temperature_R
        bracket = _Bracket(
            low=jnp.where(all_R, -jnp.inf, jnp.maximum(low_R, deepest_R)),
            high=jnp.minimum(high_R, jnp.nextafter(self.largest, jnp.inf)),
            # Of the mass, all that top-k can keep is above the deepest.
            reach=jnp.where(low_R > deepest_R, count_R, self.state.top_k),
            most=whole_R,
            least=jnp.where(all_R, whole_R, 0),
        )
        return bracket, floor_R, sums_RAP[..., -1, :]

    def _expected(self) -> tuple[jax.Array, jax.Array]:
        """Logits [..., R, A] that about SHARES times k should reach, and whether that many can be told from the peaks.

        Of n tokens thrown into N stretches 1 - exp(-n / N) of these get one, so as many peaks are among the n largest.
        """
        stretches = self.peaks.shape[-1]
        count_RA = self.state.top_k[..., None] * jnp.asarray(SHARES)
        hit_RA = jnp.clip(jnp.ceil(-stretches * jnp.expm1(-count_RA / stretches)), 1, stretches)
        reach_RN = jnp.sum(self.peaks[..., None, :] >= self.peaks[..., :, None], axis=-1)
        enough_RAN = reach_RN[..., None, :] >= hit_RA[..., None]
        thresholds_RA = jnp.max(jnp.where(enough_RAN, self.peaks[..., None, :], -jnp.inf), axis=-1)
        return thresholds_RA, count_RA < 0.7 * stretches * math.log(stretches)

    def _settled(self, now: _Progress, valid_R: jax.Array, pieces: int) -> _Progress:
        """Look at the logits once more: narrow the brackets, find each draw's place, and decide; not if not `valid`."""
        width_R1 = (now.bracket.high - now.bracket.low)[..., None] / pieces
        ends_RA = now.bracket.low[..., None] + width_R1 * jnp.arange(pieces)
        ends_RA = jnp.concatenate([ends_RA, now.bracket.high[..., None]], axis=-1)
        terms = [self._fewer(ends_RA[..., 1:-1]), self._mass_from(ends_RA)]
        terms += [self._no_more(now.logits), self._mass_above(now.logits)]
        sums_RA = jnp.sum(_part_sums(*itertools.chain(*terms)), axis=-1)
        splits = np.cumsum([len(own) for own in terms[:-1]])
        fewer_RA, reached_RA, no_more_RA, above_RA = jnp.split(sums_RA, splits, axis=-1)
        bracket = self._narrowed(now.bracket, ends_RA, self._vocabulary - fewer_RA, reached_RA)
        rank_RA = jnp.where(valid_R[..., None], self._vocabulary - no_more_RA, jnp.inf)
        return self._decided(now._replace(bracket=bracket), rank_RA, above_RA)

    def _narrowed(
        self, bracket: _Bracket, ends_RA: jax.Array, inner_RA: jax.Array, mass_RA: jax.Array
    ) -> _Bracket:
        """A piece of each bracket; where no float is left between its ends, `low` is the k-th largest.

        `inner` has how many logits reach each end but the first and the last, of which it is known.
        """
        count_RA = jnp.concatenate(
            [bracket.reach[..., None], inner_RA, jnp.zeros_like(inner_RA[..., :1])], axis=-1
        )
        low_R, high_R, count_R = self._ends(ends_RA, count_RA)
        top_k_R1 = self.state.top_k[..., None]
        most_R = jnp.min(mass_RA, axis=-1, where=count_RA >= top_k_R1, initial=jnp.inf)
        least_R = jnp.max(mass_RA, axis=-1, where=count_RA <= top_k_R1, initial=0)
        narrower = _Bracket(
            low_R,
            jnp.minimum(high_R, bracket.high),
            count_R,
            jnp.minimum(most_R, bracket.most),
            jnp.maximum(least_R, bracket.least),
        )
        exact_R = (narrower.low == bracket.low) & (narrower.high == bracket.high)
        narrower = narrower._replace(least=jnp.where(exact_R, narrower.most, narrower.least))
        return jax.tree.map(lambda new, old: jnp.where(self.state.top_k > 0, new, old), narrower, bracket)

    def _ends(self, thresholds_RA: jax.Array, count_RA: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The largest threshold that at least k logits reach, the smallest that fewer do, and the first's count."""
        enough_RA = count_RA >= self.state.top_k[..., None]
        return (
            jnp.max(thresholds_RA, axis=-1, where=enough_RA, initial=-jnp.inf),
            jnp.min(thresholds_RA, axis=-1, where=~enough_RA, initial=jnp.inf),
            jnp.min(count_RA, axis=-1, where=enough_RA, initial=jnp.inf),
        )

    def _fewer(self, bounds_RA: jax.Array) -> list[_Term]:
        """What to add up for the number of logits below each bound.

        What is outside is counted, since the compiler would keep a condition that is used twice in memory.
        """
        return [(jnp.float32(1), self.logits < bound) for bound in _each(bounds_RA)]

    def _no_more(self, bounds_RA: jax.Array) -> list[_Term]:
        """Likewise for the number of logits up to each bound."""
        return [(jnp.float32(1), self.logits <= bound) for bound in _each(bounds_RA)]

    def _mass_from(self, bounds_RA: jax.Array) -> list[_Term]:
        return [(self._mass(), self.logits >= bound) for bound in _each(bounds_RA)]

    def _mass_above(self, bounds_RA: jax.Array) -> list[_Term]:
        return [(self._mass(), self.logits > bound) for bound in _each(bounds_RA)]

    @property
    def _vocabulary(self) -> int:
        return math.prod(self.logits.shape[-2:])

    def _decided(self, now: _Progress, rank_RA: jax.Array, above_RA: jax.Array) -> _Progress:
        """Take each row's first token that is kept, if those before it are not; the last time what comes nearest.

        `rank` is the number of larger logits than each token's, and `above` their mass.
        """
        last_R = now.rounds >= MOST_ROUNDS
        bracket, top_p_R1 = now.bracket, self.state.top_p[..., None]
        own_RA = jnp.exp(self._over(now.logits))
        in_top_k_RA = (rank_RA < self.state.top_k[..., None]) | (self.state.top_k == 0)[..., None]
        # At 1 everything stays, whatever rounding makes of the sums.
        all_R1 = top_p_R1 >= 1
        least_RA = jnp.maximum(bracket.least[..., None], above_RA + own_RA)
        most_R1 = jnp.where(last_R, jnp.inf, bracket.most)[..., None]
        kept_RA = in_top_k_RA & ((above_RA < top_p_R1 * least_RA) | all_R1)
        may_be_RA = in_top_k_RA & ((above_RA < top_p_R1 * most_R1) | all_R1)
        rejected_R = ~jnp.any(may_be_RA, axis=-1)
        found_R = _first(kept_RA, may_be_RA) & ~rejected_R
        drawn_R = jnp.where(now.done, now.drawn, _first(now.tokens, may_be_RA))
        # A row whose draws were not valid has the rank of none, and nothing is known of it.
        known_R = jnp.isfinite(rank_RA[..., 0])
        highest_R = jnp.where(known_R, jnp.max(now.logits, axis=-1), -jnp.inf)
        return now._replace(
            below=jnp.where(rejected_R, highest_R, now.below),
            rejected=rejected_R,
            drawn=drawn_R,
            done=now.done | found_R | last_R,
            rounds=now.rounds + 1,
        )

    def _bounds(
        self, floor_R: jax.Array | None = None, below_R: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """The least logit [..., R] to draw, with min-p, and what it must exceed."""
        nothing_R = jnp.full(self.largest.shape, -jnp.inf)
        floor_R = nothing_R if floor_R is None else floor_R
        floor_R = jnp.maximum(floor_R, self.largest + self.state.temperature * jnp.log(self.state.min_p))
        return floor_R, nothing_R if below_R is None else below_R

    def _within(self, floor_R: jax.Array, below_R: jax.Array, x: jax.Array | None = None) -> jax.Array:
        x = self.logits if x is None else x
        return (x >= floor_R[..., None, None]) & (x > below_R[..., None, None])

    def _draw(
        self, mass_RP: jax.Array, bounds: tuple[jax.Array, jax.Array], number: jax.Array, count: int
    ) -> tuple[jax.Array, jax.Array]:
        """Tokens and their logits [..., R, count], draws from `number` on, of what is in bounds, each part's mass."""
        parts, inner = self.logits.shape[-2:]
        numbers_RA = jnp.broadcast_to(number, self.positions.shape)[..., None] + jnp.arange(count)
        noise_RAN = _unsharded(_gumbel(self.state.keys, self.positions, numbers_RA, parts + inner))
        part_RA = jnp.argmax(jnp.log(mass_RP)[..., None, :] + noise_RAN[..., :parts], axis=-1)
        logits_RAC = _take_parts(self.logits, part_RA)
        # Relative to the largest, since large quotients would leave no digits for the noise.
        noisy_RAC = self._over(logits_RAC) + noise_RAN[..., parts:]
        inner_RA = jnp.argmax(jnp.where(self._within(*bounds, logits_RAC), noisy_RAC, -jnp.inf), axis=-1)
        drawn_RA = jnp.take_along_axis(logits_RAC, inner_RA[..., None], axis=-1)[..., 0]
        return _token(part_RA, inner_RA, self.logits), drawn_RA

    def _mass(self) -> jax.Array:
        """[..., R, P, C], of which the largest is 1."""
        return jnp.exp(self._over(self.logits))

    def _part_mass(self, bounds: tuple[jax.Array, jax.Array]) -> jax.Array:
        """[..., R, P], of what is in bounds."""
        return _part_sums((self._mass(), self._within(*bounds)))[..., 0, :]

    def _over(self, x_R: jax.Array) -> jax.Array:
        """Logits [..., R, and maybe more axes] above the row's largest, in temperatures."""
        return (x_R - _like(self.largest, x_R)) / _like(self._temperature(), x_R)

    def _temperature(self) -> jax.Array:
        """[..., R], by which can be divided."""
        return jnp.maximum(self.state.temperature, 1e-6)


type _Term = tuple[jax.Array, jax.Array]
"""A value for each logit, and for which logits it is added up."""


def _each(bounds_RA: jax.Array) -> list[jax.Array]:
    """The bounds of all rows one after the other, to be compared with logits [..., R, P, C]."""
    return [bounds_RA[..., i, None, None] for i in range(bounds_RA.shape[-1])]


def _part_sums(*terms: _Term) -> jax.Array:
    """Float32 [..., R, A, P]: of each of A pairs the sum over each part of the values where the condition holds.

    One pass over the logits makes all of them, if the compiler does not join what comes after. Counts are exact.
    """
    values = tuple(_folded(jnp.where(where, x, 0.0).astype(jnp.float32)) for x, where in terms)
    zeros = (jnp.float32(0),) * len(values)

    def add(some: tuple[jax.Array, ...], others: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        return tuple(x + y for x, y in zip(some, others, strict=True))

    sums = lax.optimization_barrier(lax.reduce(values, zeros, add, (values[0].ndim - 1,)))
    return _unsharded(jnp.stack(sums, axis=-2))


def _folded(x_RPC: jax.Array) -> jax.Array:
    """A part's quarters added up, [..., R, P, C / 4].

    XLA gives a GPU's thread about 16 values of what it reduces, and adding up over threads takes as long as 30.
    """
    x_RPFc = _in_quarters(x_RPC)
    return functools.reduce(jnp.add, [x_RPFc[..., i, :] for i in range(x_RPFc.shape[-2])])


def _in_quarters(x_RPC: jax.Array) -> jax.Array:
    """[..., R, P, C] -> [..., R, P, 4, C / 4], or fewer if C does not divide."""
    pieces = next(n for n in (4, 2, 1) if x_RPC.shape[-1] % n == 0)
    return x_RPC.reshape(*x_RPC.shape[:-1], pieces, -1)


def _first(values_RA: jax.Array, kept_RA: jax.Array) -> jax.Array:
    """The first value of each row that is kept; the first one where none is."""
    return jnp.take_along_axis(values_RA, jnp.argmax(kept_RA, axis=-1, keepdims=True), axis=-1)[..., 0]


def _like(x_R: jax.Array, other: jax.Array) -> jax.Array:
    """[..., R] with as many axes as another array, of size 1."""
    return x_R.reshape(*x_R.shape, *(1,) * (other.ndim - x_R.ndim))


def _take_rows(x_R: jax.Array, rows_S: jax.Array) -> jax.Array:
    """[..., R, and maybe more axes] -> [..., S, ...], the given rows [..., S]."""
    return jnp.take_along_axis(x_R, _like(rows_S, x_R), axis=rows_S.ndim - 1, mode="clip")


def _gumbel(keys_R2: jax.Array, positions_R: jax.Array, numbers_RA: jax.Array, size: int) -> jax.Array:
    """Noise [..., R, A, size] that depends on a row's key and position and a draw's number alone."""

    def row(key: jax.Array, position: jax.Array, numbers_A: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.wrap_key_data(key, impl="threefry2x32"), position)

        def draw(number: jax.Array) -> jax.Array:
            return jax.random.gumbel(jax.random.fold_in(key, number), (size,), jnp.float32)

        return jax.vmap(draw)(numbers_A)

    for _ in positions_R.shape:
        row = jax.vmap(row)
    return row(keys_R2, positions_R, numbers_RA)


def _top(x_RPC: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The k largest [..., R, k] in order, and where in the vocabulary they are.

    They lie in the k columns, places in the quarters of parts, that have the largest maxima, and of the columns of all
    quarters that are left in k again, and of these in the k groups of parts that have: only maxima and few values are
    sorted.
    """
    parts, inner = x_RPC.shape[-2:]
    x_RPFc = _in_quarters(x_RPC)
    quarters, width = x_RPFc.shape[-2:]
    x_RPFk, column_Rk = _best_columns(x_RPFc.reshape(*x_RPC.shape[:-2], parts * quarters, width), k)
    x_RPN = x_RPFk.reshape(*x_RPC.shape[:-1], -1)
    inner_RN = jnp.arange(quarters)[:, None] * width + column_Rk[..., None, :]
    x_RPk, best_Rk = _best_columns(x_RPN, k)
    inner_Rk = jnp.take_along_axis(inner_RN.reshape(*inner_RN.shape[:-2], -1), best_Rk, axis=-1)
    columns, group = x_RPk.shape[-1], math.gcd(parts, 8)
    x_RgB = jnp.moveaxis(x_RPk.reshape(*x_RPk.shape[:-2], -1, group, columns), -2, -3)
    x_Rgb, block_Rb = _best_columns(x_RgB.reshape(*x_RgB.shape[:-2], -1), k)
    values_Rk, best_Rk = lax.top_k(x_Rgb.reshape(*x_Rgb.shape[:-2], -1), k)
    best_block_Rk = jnp.take_along_axis(block_Rb, best_Rk % block_Rb.shape[-1], axis=-1)
    part_Rk = best_block_Rk // columns * group + best_Rk // block_Rb.shape[-1]
    return values_Rk, part_Rk * inner + jnp.take_along_axis(inner_Rk, best_block_Rk % columns, axis=-1)


def _best_columns(x_RNC: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The up to k columns [..., R, N, k] that have the largest maxima, and which they are, [..., R, k]."""
    column_Rk = lax.top_k(jnp.max(x_RNC, axis=-2), min(k, x_RNC.shape[-1]))[1]
    return jnp.take_along_axis(x_RNC, column_Rk[..., None, :], axis=-1), column_Rk


def logprobs_of(logits_RV: jax.Array, tokens_R: jax.Array, top: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Log-probability [..., R] of the chosen tokens, and those [..., R, top] and ids of the likeliest."""
    logits_RPC = _in_parts(logits_RV)
    # As `sample` finds it, so that the compiler can share the pass.
    largest_R = jnp.max(_peaks(logits_RPC), axis=(-1, -2))
    mass_RPC = jnp.exp(logits_RPC - largest_R[..., None, None])
    # Not gathered, since a mesh's devices have parts of the vocabulary.
    here_RV = jnp.arange(logits_RV.shape[-1]) == tokens_R[..., None]
    sums_R2 = jnp.sum(_part_sums((mass_RPC, jnp.bool_(True)), (logits_RPC, _in_parts(here_RV))), axis=-1)
    norm_R = largest_R + jnp.log(sums_R2[..., 0])
    values_Rk, ids_Rk = _top(logits_RPC, top)
    return sums_R2[..., 1] - norm_R, values_Rk - norm_R[..., None], ids_Rk
