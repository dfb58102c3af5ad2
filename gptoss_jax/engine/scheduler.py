"""Which requests run, and what each does in the next step. Plain Python: no arrays, no device.

Each part of the batch (one on a single device) has slots, pages and requests of its own.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections import deque

import numpy as np

from gptoss_jax.engine.pages import Prefixes, block_keys
from gptoss_jax.types import SamplingParams

CHEAP_TOKENS = 512
"""A step with fewer is bound by the weights that it reads, not by its tokens."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """How much one part of the batch may do at once.

    Args:
      slots: sequences that run together.
      pages: pages of the cache, `page_size` tokens each.
      snapshots: rings kept for prefixes.
      max_num_batched_tokens: prompt tokens in a step.
      chunk: prompt tokens of one sequence in a step.
      enable_prefix_caching: whether prompts reuse the cached prefixes of earlier ones.
    """

    slots: int
    pages: int
    page_size: int
    snapshots: int
    max_num_batched_tokens: int
    chunk: int
    enable_prefix_caching: bool = True

    @functools.cached_property
    def chunk_sizes(self) -> list[int]:
        """What chunks are padded to: few sizes where they are cheap, more where padding would cost."""
        few = [size for size in (16, 64) if size < self.chunk]
        return few + buckets(2, 256, self.chunk)

    def chunk_size(self, tokens: int) -> int:
        """The size of a chunk for so many tokens."""
        return next(size for size in self.chunk_sizes if size >= tokens)

    def chunks(self, size: int) -> int:
        """How many chunks of a size a step has at most."""
        return max(1, min(self.max_num_batched_tokens // size, self.slots))

    def counts(self, size: int) -> list[int]:
        """What the number of chunks of a size is padded to."""
        counts = [1]
        while counts[-1] < self.chunks(size):
            cheap = 4 * counts[-1] * size <= CHEAP_TOKENS
            counts.append(min(counts[-1] * (4 if cheap else 2), self.chunks(size)))
        return counts

    def decodes(self, beside_chunks: bool) -> list[int]:
        """What the number of decoding sequences is padded to: beside chunks, where they cost little, to few sizes."""
        return buckets(16, 16, self.slots) if beside_chunks else buckets(4, 1, self.slots)

    def room(self, count: int) -> int:
        """The largest size of which a step can have so many chunks; 0 for none."""
        return max((size for size in self.chunk_sizes if self.chunks(size) >= count), default=0)


@dataclasses.dataclass(eq=False)
class Sequence:
    """A request's prompt and what has been generated; `tokens` grows as tokens are read back from the device.

    `ahead` counts tokens that steps in flight are generating, which the host has not seen; `epoch` changes when the
    sequence leaves its slot, so that what steps in flight still generate for it can be told apart.
    """

    request_id: str
    index: int
    prompt: np.ndarray
    params: SamplingParams
    max_tokens: int
    seed: int
    arrival: int = 0
    tokens: list[int] = dataclasses.field(default_factory=list)
    ahead: int = 0
    part: int = -1
    slot: int = -1
    pages: list[int] = dataclasses.field(default_factory=list)
    computed: int = 0
    leader: Sequence | None = None
    keys: list[bytes] = dataclasses.field(default_factory=list)
    wanted_snapshots: list[int] = dataclasses.field(default_factory=list)
    prefix_hits: int = 0
    prefilled: bool = False
    epoch: int = 0
    drafts: list[int] = dataclasses.field(default_factory=list)
    drafted: int = 0
    accepted: int = 0

    @property
    def known(self) -> np.ndarray:
        """Prompt and generated tokens that the host has."""
        return np.concatenate([self.prompt, np.asarray(self.tokens, np.int32)])

    @property
    def known_length(self) -> int:
        """How many those are."""
        return len(self.prompt) + len(self.tokens)

    @property
    def generated(self) -> int:
        """Tokens generated, those in flight included."""
        return len(self.tokens) + self.ahead


@dataclasses.dataclass
class Chunk:
    """A piece of a sequence's prompt: positions `start` to `stop`; `snapshots` are (ring row, position) pairs."""

    sequence: Sequence
    start: int
    stop: int
    snapshots: list[tuple[int, int]]

    @property
    def finishing(self) -> bool:
        """Whether the prompt ends with it."""
        return self.stop == self.sequence.known_length


@dataclasses.dataclass
class Plan:
    """What one part of the batch does in a step; `restores` are (ring row, slot) copies that go before it."""

    decodes: list[Sequence] = dataclasses.field(default_factory=list)
    chunks: list[Chunk] = dataclasses.field(default_factory=list)
    restores: list[tuple[int, int]] = dataclasses.field(default_factory=list)


class NeedsDrain(Exception):
    """No page is free: the steps in flight must be read back before a sequence can be preempted."""


class Part:
    """The requests, slots and pages of one part of the batch."""

    def __init__(self, number: int, limits: Limits) -> None:
        self.number = number
        self.limits = limits
        self.prefixes = Prefixes(limits.pages, limits.snapshots, limits.slots)
        self.running: list[Sequence] = []
        self._free_slots = list(range(limits.slots - 1, -1, -1))
        self.preemptions = 0

    @property
    def load(self) -> int:
        """Tokens held by what runs here."""
        return sum(s.known_length for s in self.running)

    def can_admit(self, sequence: Sequence) -> bool:
        """Whether a slot is free, and pages for all that is known of the sequence and one token more."""
        needed = -(-(sequence.known_length + 1) // self.limits.page_size)
        return bool(self._free_slots) and self.prefixes.pages.available >= needed

    def admit(self, sequence: Sequence, plan: Plan) -> None:
        """Give a sequence a slot and what of its prompt is known already."""
        sequence.part = self.number
        self._free_slots.sort(reverse=True)
        sequence.slot = self._free_slots.pop()
        sequence.computed, sequence.prefilled = 0, False
        self.running.append(sequence)
        if self.limits.enable_prefix_caching and sequence.params.prompt_logprobs is None:
            self._take_up_prefix(sequence, plan)
        # All of the prompt's pages now, so that sequences that prefill together cannot starve each other.
        grown = self.grow(sequence, sequence.known_length + 1)
        assert grown, "can_admit was not asked"

    def _take_up_prefix(self, sequence: Sequence, plan: Plan) -> None:
        size, known = self.limits.page_size, sequence.known
        # The last token is always computed: its logits choose the next one.
        sequence.keys = block_keys(known, size)
        usable = sequence.keys[: (len(known) - 1) // size]
        blocks, ring = self.prefixes.longest(usable)
        # Where this prompt parts from one seen before, others may; and its end, which a longer one may repeat.
        ends = {self.prefixes.known_blocks(usable), len(usable)} - {0, blocks}
        sequence.wanted_snapshots = sorted(end * size for end in ends)
        if ring is None:
            return
        for key in usable[:blocks]:
            page = self.prefixes.pages.find(key)
            assert page is not None
            self.prefixes.pages.hold(page)
            sequence.pages.append(page)
        plan.restores.append((ring, sequence.slot))
        sequence.computed = blocks * size
        if sequence.epoch == 0:
            # Prefix hits after a preemption are on its own pages and do not count.
            sequence.prefix_hits = sequence.computed

    def grow(self, sequence: Sequence, length: int) -> bool:
        """Hold pages for `length` tokens; False if they have run out."""
        while len(sequence.pages) * self.limits.page_size < length:
            if self.prefixes.pages.available == 0:
                return False
            sequence.pages.append(self.prefixes.pages.take())
        return True

    def remember(self, sequence: Sequence, length: int) -> None:
        """Make the whole blocks among a sequence's first `length` tokens known to later prompts."""
        if self.limits.enable_prefix_caching:
            for key, page in zip(sequence.keys[: length // self.limits.page_size], sequence.pages, strict=False):
                self.prefixes.pages.name(page, key)

    def release(self, sequence: Sequence) -> None:
        """Give back all that a sequence holds."""
        self.running.remove(sequence)
        self._free_slots.append(sequence.slot)
        # Last pages first: the beginning of a prompt is what another is likeliest to share.
        for page in reversed(sequence.pages):
            self.prefixes.pages.release(page)
        sequence.pages, sequence.slot, sequence.part, sequence.prefilled = [], -1, -1, False
        sequence.ahead, sequence.drafts = 0, []
        sequence.epoch += 1


class Scheduler:
    """Admits requests in order of arrival, decodes all that run, and fills the rest of a step with prompts."""

    def __init__(self, limits: Limits, parts: int) -> None:
        self.limits = limits
        self.parts = [Part(number, limits) for number in range(parts)]
        self.waiting: deque[Sequence] = deque()
        self._arrivals = itertools.count()

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence."""
        sequence.arrival = next(self._arrivals)
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it is."""
        if sequence.part >= 0:
            self.parts[sequence.part].release(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def plan(self, draining: bool = False) -> list[Plan]:
        """What each part does next; everything it needs is held when this returns.

        Raises NeedsDrain, without having changed anything that matters, if a sequence must be pre-empted while steps
        are in flight; call again with `draining` when they have been read back.
        """
        plans = [Plan() for _ in self.parts]
        for part, plan in zip(self.parts, plans, strict=True):
            self._plan_decodes(part, plan, draining)
        self._admit(plans)
        for part, plan in zip(self.parts, plans, strict=True):
            self._plan_chunks(part, plan, plans)
            for chunk in plan.chunks:
                for row, _ in chunk.snapshots:
                    part.prefixes.release_snapshot(row)
        return plans

    def rounds(self, plans: list[Plan], most: int) -> int:
        """How many times in a row these plans can be carried out as they are: `most`, or 1. Holds the pages for it."""
        # A first token that is still to be read would come only after all of them.
        if any(plan.chunks or plan.restores or not all(s.tokens for s in plan.decodes) for plan in plans):
            return 1
        for part, plan in zip(self.parts, plans, strict=True):
            for sequence in plan.decodes:
                enough = sequence.max_tokens - sequence.generated >= most
                # Until then a sequence's ends are biased away, from there on not.
                changes = sequence.generated < sequence.params.min_tokens < sequence.generated + most
                if (
                    not enough
                    or changes
                    or not part.grow(sequence, len(sequence.prompt) + sequence.generated + most - 1)
                ):
                    return 1
        return most

    def _plan_decodes(self, part: Part, plan: Plan, draining: bool) -> None:
        for sequence in sorted(part.running, key=lambda s: s.arrival):
            if sequence.part != part.number or not sequence.prefilled or sequence.generated >= sequence.max_tokens:
                continue
            # The last token's own key goes to the position before its successor's.
            while not part.grow(sequence, len(sequence.prompt) + sequence.generated + len(sequence.drafts)):
                if not draining and any(s.ahead for s in part.running):
                    raise NeedsDrain
                self._preempt(part, plan)
                if sequence.part < 0:
                    break
            if sequence.part == part.number:
                plan.decodes.append(sequence)

    def _preempt(self, part: Part, plan: Plan) -> None:
        """Send the latest arrival back to wait; what it has generated becomes part of its prompt."""
        victim = max(part.running, key=lambda s: s.arrival)
        if victim in plan.decodes:
            plan.decodes.remove(victim)
        part.release(victim)
        part.preemptions += 1
        self.waiting.appendleft(victim)

    def _admit(self, plans: list[Plan]) -> None:
        passed: list[Sequence] = []
        while self.waiting:
            sequence = self.waiting.popleft()
            if sequence.leader is not None and not sequence.leader.prefilled and sequence.leader.part >= 0:
                # Copies of a prompt wait for the first one, whose pages they then share; others need not.
                passed.append(sequence)
                continue
            able = [part for part in self.parts if part.can_admit(sequence)]
            if not able:
                passed.append(sequence)
                break
            part = min(able, key=lambda p: (p.load, p.number))
            if sequence.leader is not None and any(p.number == sequence.leader.part for p in able):
                part = self.parts[sequence.leader.part]
            part.admit(sequence, plans[part.number])
        self.waiting.extendleft(reversed(passed))

    def _plan_chunks(self, part: Part, plan: Plan, plans: list[Plan]) -> None:
        # All chunks of a step are padded to the size of the longest, and all parts to the count of the fullest.
        fullest = max(len(p.chunks) for p in plans)
        longest = max((c.stop - c.start for p in plans for c in p.chunks), default=0)
        for sequence in sorted(part.running, key=lambda s: s.arrival):
            if sequence.prefilled:
                continue
            room = self.limits.room(max(len(plan.chunks) + 1, fullest))
            if room < longest:
                break
            stop = min(sequence.known_length, sequence.computed + room)
            snapshots = []
            for position in sequence.wanted_snapshots:
                if sequence.computed < position <= stop:
                    row = part.prefixes.snapshot(sequence.keys[position // self.limits.page_size - 1])
                    if row is not None:
                        snapshots.append((row, position))
            plan.chunks.append(Chunk(sequence, sequence.computed, stop, snapshots))
            longest = max(longest, stop - sequence.computed)
            part.remember(sequence, stop)
            sequence.computed = stop
            sequence.prefilled = stop == sequence.known_length


def buckets(factor: int, least: int, most: int) -> list[int]:
    """Sizes least, least * factor, ... up to `most`, which is the last."""
    sizes = [min(least, most)]
    while sizes[-1] < most:
        sizes.append(min(sizes[-1] * factor, most))
    return sizes
