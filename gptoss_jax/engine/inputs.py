"""Fills in the arrays that the host sends for a launch, from the scheduler's plan."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from gptoss_jax.engine.adjusting import AdjustedRows, Adjustments, Penalties
from gptoss_jax.engine.sampling import SamplingState
from gptoss_jax.engine.scheduler import Plan, Work
from gptoss_jax.engine.sequence import Sequence
from gptoss_jax.engine.step import ADJUSTED, BIASES, ForwardInputs, RowInputs, StepShape, seed_key
from gptoss_jax.model.kv_cache import CacheShape, Sequences
from gptoss_jax.types import SamplingParams


@dataclasses.dataclass(frozen=True)
class SampledRow:
    """A sequence's first sampled row on its rank, and the position of the token that it predicts from.

    `generated` counts the sequence's tokens before the launch.
    """

    rank: int
    row: int
    position: int
    work: Work
    generated: int


def of_host[T](make: Callable[..., T], *arrays: Any) -> T:
    """A pytree that a program takes, with the host's arrays in it."""
    return make(*arrays)


def forward_inputs(
    by_rank: list[list[Work]],
    steps: int,
    tokens: int,
    rows: int,
    cache: CacheShape,
    prompt_logprobs: bool = False,
) -> ForwardInputs:
    """The inputs of a forward pass of each rank's work, padded to so many tokens and gathered rows."""
    ranks, sequences = len(by_rank), min(tokens, cache.slots)
    ids, positions, slots = (np.full((ranks, tokens), fill, np.int32) for fill in (0, -1, 0))
    following = np.full((ranks, tokens), -1, np.int32)
    layout = np.zeros((4, ranks, sequences), np.int32)
    gathered = np.zeros((ranks, rows), np.int32)
    updates, sliding = (np.full((ranks, updates_of(tokens, cache), 3), cache.slots, np.int32) for _ in range(2))
    for rank, own in enumerate(by_rank):
        counts = np.asarray([work.tokens if steps == 1 else 1 for work in own], np.int32)
        starts = np.asarray([work.start for work in own], np.int32)
        slot_N = np.asarray([work.slot for work in own], np.int32)
        first_N = np.cumsum(counts) - counts
        used = int(counts.sum())
        layout[:, rank, : len(own)] = slot_N, first_N, counts, starts + counts
        slots[rank, :used] = np.repeat(slot_N, counts)
        positions[rank, :used] = np.repeat(starts - first_N, counts) + np.arange(used)
        ids[rank, :used] = _tokens(own, counts)
        sampled = _sampled_tokens(own, first_N, counts)
        gathered[rank, : len(sampled)] = sampled
        for pool, changes in zip((updates, sliding), _page_changes(own, cache), strict=True):
            pool[rank, : len(changes)] = changes
        if prompt_logprobs:
            for work, at in zip(own, first_N.tolist(), strict=True):
                stop = min(work.start + work.tokens + 1, work.sequence.known_length)
                known = work.sequence.span(work.start + 1, stop)
                following[rank, at : at + len(known)] = known
    return ForwardInputs(
        ids,
        positions,
        slots,
        of_host(Sequences, *layout),
        gathered,
        updates,
        sliding,
        following if prompt_logprobs else None,
    )


def _tokens(works: list[Work], counts: np.ndarray) -> np.ndarray:
    """The first tokens and drafts of each work; -1 for a token that only the device knows yet."""
    parts: list[int] = []
    for work, count in zip(works, counts.tolist(), strict=True):
        sequence, known = work.sequence, work.sequence.known_length - work.start
        if count == 1 and known <= 1:
            parts.append(sequence.newest if known == 1 else -1)
            continue
        own = sequence.span(work.start, work.start + min(known, work.count)).tolist() if known > 0 else []
        parts += own
        parts += [-1] * (work.count - len(own))
        parts += work.drafts
    return np.asarray(parts, np.int32)


def _sampled_tokens(works: list[Work], first_N: np.ndarray, counts: np.ndarray) -> list[int]:
    """The tokens of a rank whose hidden states are sampled from."""
    ends = (first_N + counts).tolist()
    return [
        token
        for work, end in zip(works, ends, strict=True)
        if work.samples
        for token in range(end - 1 - len(work.drafts), end)
    ]


def _page_changes(works: list[Work], cache: CacheShape) -> Iterator[np.ndarray]:
    """The page-table entries [U, 3] of each pool that works change."""
    full: list[tuple[int, int, int]] = []
    sliding: list[tuple[int, int, int]] = []
    for work in works:
        if work.pages:
            # An admitted sequence, which has no rank yet, starts after whole blocks.
            admitted = work.sequence.rank < 0
            first = work.start // cache.page_size if admitted else len(work.sequence.pages)
            full += [(work.slot, entry, page) for entry, page in enumerate(work.pages, first)]
        sliding += [(work.slot, block % cache.sliding_table, page) for block, page in work.sliding.items()]
    return (np.asarray(changes, np.int32).reshape(-1, 3) for changes in (full, sliding))


def updates_of(tokens: int, cache: CacheShape) -> int:
    """The most page-table entries of a pool that change in a step of so many tokens on a rank."""
    return 2 * min(tokens, cache.slots) + tokens // cache.page_size


def admitted_updates(plan: Plan, cache: CacheShape, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The page-table entries [B, size, 3] of both pools of the prefixes that admitted sequences found in the cache."""
    changes: list[tuple[list[tuple[int, int, int]], ...]] = []
    for own in plan.ranks:
        full = [(a.slot, entry, page) for a in own.admitted.values() for entry, page in enumerate(a.pages)]
        sliding = [
            (a.slot, block % cache.sliding_table, page)
            for a in own.admitted.values()
            for block, page in a.sliding.items()
        ]
        changes.append((full, sliding))
    most = max(len(entries) for pools in changes for entries in pools)
    for start in range(0, most, size):
        both = np.full((2, len(changes), size, 3), cache.slots, np.int32)
        for rank, pools in enumerate(changes):
            for pool, entries in enumerate(pools):
                some = entries[start : start + size]
                both[pool, rank, : len(some)] = np.asarray(some, np.int32).reshape(-1, 3)
        yield both[0], both[1]


def sampled_rows(plan: Plan) -> list[SampledRow]:
    """The rows of all work that is sampled from, in the order of `forward_inputs`."""
    found = []
    for rank, own in enumerate(plan.ranks):
        row = 0
        for work in own.work.values():
            if work.samples:
                # Of a launch of several steps, the position in the first one.
                position = work.start + (work.count if plan.steps == 1 else 1) - 1
                found.append(SampledRow(rank, row, position, work, work.sequence.generated))
                row += 1 + len(work.drafts)
    return found


def row_inputs(sampled: list[SampledRow], rows: int, cache: CacheShape, settings: Settings) -> RowInputs:
    """The inputs of sampling so many rows on each rank."""
    ranks = len(settings.state.temperature)
    slots, positions, drafts = (np.full((ranks, rows), fill, np.int32) for fill in (cache.slots, 0, -1))
    heads = np.zeros((ranks, rows), bool)
    if sampled:
        where = np.asarray([(at.rank, at.row, at.work.slot, at.position) for at in sampled], np.int32).T
        rank_N, row_N, slots[*where[:2]], positions[*where[:2]] = where
        heads[rank_N, row_N] = True
    for at in sampled:
        if at.work.drafts:
            here = (at.rank, slice(at.row, at.row + 1 + len(at.work.drafts)))
            slots[here] = at.work.slot
            positions[here] = np.arange(at.position, at.position + 1 + len(at.work.drafts))
            drafts[at.rank, at.row : at.row + len(at.work.drafts)] = at.work.drafts
    return RowInputs(slots, positions, drafts, heads, settings.state)


def idle_inputs(
    shape: StepShape, ranks: int, cache: CacheShape, gathered: int
) -> tuple[ForwardInputs | None, RowInputs | None]:
    """The inputs of a program with nothing to do, None for those that it has not.

    A forward pass that does not sample gathers so many rows.
    """
    forward = rows = None
    if shape.tokens:
        nothing: list[list[Work]] = [[] for _ in range(ranks)]
        gathered = shape.rows or gathered
        forward = forward_inputs(nothing, shape.steps, shape.tokens, gathered, cache, shape.prompt_logprobs)
    if shape.rows:
        rows = row_inputs([], shape.rows, cache, Settings(ranks, cache.slots))
    return forward, rows


def no_adjustments(ranks: int, rows: int, shape: StepShape, vocab_size: int) -> Any:
    """Adjustments of a shape's rows [B, K, ...] that change nothing."""
    size = (ranks, shape.adjusted)
    by = of_host(
        Adjustments,
        np.full((*size, shape.biases), vocab_size, np.int32),
        np.zeros((*size, shape.biases), np.float32),
        of_host(Penalties, np.ones(size, np.float32), *np.zeros((2, *size), np.float32)),
        np.full((*size, -(-vocab_size // 32)), 0xFFFFFFFF, np.uint32),
    )
    return of_host(AdjustedRows, np.full(size, rows, np.int32), by)


@dataclasses.dataclass(frozen=True)
class RowAdjustment:
    """What changes the logits of a row: biases by token, penalties, and a mask of the tokens that are allowed."""

    at: SampledRow
    biases: dict[int, float]
    mask: np.ndarray | None

    @classmethod
    def of(cls, at: SampledRow, mask: np.ndarray | None, eos: frozenset[int]) -> RowAdjustment | None:
        """Of a row whose sequence, or whose mask, changes anything; such sequences have one row."""
        biases = _biases(at.work.sequence.params, at.generated, eos)
        changed = biases or mask is not None or at.work.sequence.params.penalised
        return cls(at, biases, mask) if changed else None


def needed_shape(adjusted: list[RowAdjustment], shape: StepShape) -> StepShape:
    """The shape with room for these adjustments; usually it has enough."""
    per_rank = np.bincount([one.at.rank for one in adjusted], minlength=1)
    rows = min(ADJUSTED, shape.rows)
    if per_rank.max() > rows:
        rows = shape.rows
    width = BIASES
    while width < max((len(one.biases) for one in adjusted), default=0):
        width *= 2
    return dataclasses.replace(shape, adjusted=rows, biases=width)


def adjust_rows(adjustments: Any, adjusted: list[RowAdjustment]) -> None:
    """Fill in the adjustments of rows."""
    filled = [0] * len(adjustments.rows)
    for one in adjusted:
        params, rank = one.at.work.sequence.params, one.at.rank
        here, by = (rank, filled[rank]), adjustments.by
        filled[rank] += 1
        adjustments.rows[here] = one.at.row
        by.bias_ids[here][: len(one.biases)] = list(one.biases.keys())
        by.bias[here][: len(one.biases)] = list(one.biases.values())
        by.penalties.repetition[here] = params.repetition_penalty
        by.penalties.presence[here] = params.presence_penalty
        by.penalties.frequency[here] = params.frequency_penalty
        if one.mask is not None:
            by.allowed[here] = one.mask


def _biases(params: SamplingParams, generated: int, eos: frozenset[int]) -> dict[int, float]:
    biases = dict(params.logit_bias or {})
    if generated < params.min_tokens:
        ends = set(params.stop_token_ids) | (set() if params.ignore_eos else eos)
        biases |= dict.fromkeys(ends, -np.inf)
    return biases


class Settings:
    """The sampling settings of every slot, as arrays [B, slots]."""

    def __init__(self, ranks: int, slots: int) -> None:
        shape = (ranks, slots)
        self.state = of_host(
            SamplingState,
            np.zeros(shape, np.float32),
            np.ones(shape, np.float32),
            np.zeros(shape, np.int32),
            np.zeros(shape, np.float32),
            np.zeros((*shape, 2), np.uint32),
        )
        self._owners: dict[tuple[int, int], tuple[Sequence, int]] = {}

    def update(self, rank: int, work: Work) -> None:
        """Bring a slot's settings up to date with the sequence that has it."""
        sequence, at, state = work.sequence, (rank, work.slot), self.state
        if self._owners.get(at) == (sequence, sequence.epoch):
            return
        params = sequence.params
        values = (params.temperature, params.top_p, params.top_k, params.min_p, seed_key(sequence.seed))
        arrays: Any = (state.temperature, state.top_p, state.top_k, state.min_p, state.keys)
        for array, value in zip(arrays, values, strict=True):
            array[at] = value
        self._owners[at] = sequence, sequence.epoch
