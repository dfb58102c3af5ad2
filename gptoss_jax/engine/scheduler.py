"""Which sequences run, and what each does in the next launch. Plain Python: no arrays on a device.

Each data-parallel rank (one on a single device) has slots, pages and sequences of its own. `Scheduler.plan` changes
nothing; `Scheduler.commit` carries out a plan that has been launched, and `Scheduler.settle` what has been read back.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import operator
import time
from collections.abc import Callable, Iterable

from gptoss_jax.engine.pages import PagePlan, PagePool
from gptoss_jax.engine.sequence import Sequence
from gptoss_jax.model.kv_cache import CacheShape

TYPICAL_OUTPUT = 1024
"""Output tokens that a sequence is expected to need before any has finished, if it may generate so many."""


FULL, LEAST = 0.9, 64
"""A step is shortened to the largest size, of 64 tokens or more, that is 90 % full on average over the ranks.

On a mixed workload of 512 requests, 256 at a time, 7 % of the computed tokens are then padding on one rank, and 10 % on
two; other shares made more. A step of fewer than 64 tokens takes as long as one of 64, which reads the same weights.
"""

DEFERRED, DEFERRALS = 8, 32
"""After 32 steps in a row with less than an eighth of the possible tokens of prompts, one is not shortened."""


_ORDER = operator.attrgetter("order")


@dataclasses.dataclass(frozen=True)
class Limits:
    """How much one data-parallel rank may do at once.

    Args:
      cache: slots and pages.
      window: keys that a sliding layer sees.
      tokens: tokens of a step.
      sizes: numbers of tokens that steps are padded to.
      chunk: prompt tokens of one sequence in a step.
      rows: sampled rows of a step, at least one per slot; drafts take what the sequences leave.
      decode_steps: steps of a launch in which at most `few` sequences decode.
      few: see `decode_steps`.
      decodes: the most sequences of a launch that only decodes.
      caching: whether prompts reuse cached prefixes.
    """

    cache: CacheShape
    window: int
    tokens: int
    sizes: tuple[int, ...]
    chunk: int
    rows: int
    decode_steps: int = 1
    few: int = 0
    decodes: int = 0
    caching: bool = True

    def blocks(self, length: int) -> int:
        """Pages that hold so many tokens."""
        return -(-length // self.cache.page_size)

    def window_start(self, blocks: int) -> int:
        """The first block that a sequence needs in the sliding layers to continue after so many blocks."""
        return max(0, (blocks * self.cache.page_size - self.window + 1) // self.cache.page_size)


@dataclasses.dataclass
class Work:
    """The next tokens of a sequence: positions `start` to `start + count`, and after them `drafts`.

    The last one is sampled from if `samples`. `pages` and `sliding` are the pages that it takes, the latter by block.
    `epoch` is the sequence's: once that has changed, the results no longer matter.
    """

    sequence: Sequence
    epoch: int
    slot: int
    start: int
    count: int
    drafts: list[int]
    samples: bool
    pages: list[int]
    sliding: dict[int, int]

    @property
    def tokens(self) -> int:
        """How many tokens it is in all."""
        return self.count + len(self.drafts)


@dataclasses.dataclass(frozen=True)
class Admission:
    """A sequence that starts or resumes in a slot, with the pages of its cached prefix of `computed` tokens."""

    sequence: Sequence
    slot: int
    computed: int
    pages: list[int]
    sliding: dict[int, int]
    branches: frozenset[int]


@dataclasses.dataclass
class RankPlan:
    """What a rank does in a launch."""

    rank: Rank
    pages: PagePlan
    sliding: PagePlan
    slots: list[int]
    tokens: int = 0
    reserved: int = 0
    preempted: list[Sequence] = dataclasses.field(default_factory=list)
    admitted: dict[Sequence, Admission] = dataclasses.field(default_factory=dict)
    work: dict[Sequence, Work] = dataclasses.field(default_factory=dict)

    @property
    def running(self) -> list[Sequence]:
        """The sequences that run on the rank when the plan is carried out."""
        return [*(s for s in self.rank.running if s not in self.preempted), *self.admitted]


@dataclasses.dataclass
class Plan:
    """What all ranks do in a launch of `steps` steps, which only `decodes` or not.

    A plan that `defers` leaves most of the prompts' tokens that it could compute to later steps, to have less padding.
    """

    ranks: list[RankPlan]
    steps: int = 1
    decodes: bool = False
    defers: bool = False

    @property
    def work(self) -> list[Work]:
        """The work of all ranks."""
        return [work for own in self.by_rank for work in own]

    @property
    def by_rank(self) -> list[list[Work]]:
        """The work of each rank, in the order of its tokens."""
        return [list(plan.work.values()) for plan in self.ranks]


class Rank:
    """The sequences, slots and pages of a data-parallel rank."""

    def __init__(self, number: int, limits: Limits) -> None:
        self.number = number
        self.limits = limits
        self.pages = PagePool(limits.cache.pages)
        self.sliding = PagePool(limits.cache.sliding_pages)
        self.running: list[Sequence] = []

    def plan(self) -> RankPlan:
        """An empty plan."""
        used = {sequence.slot for sequence in self.running}
        free = [slot for slot in range(self.limits.cache.slots) if slot not in used]
        return RankPlan(self, PagePlan(self.pages), PagePlan(self.sliding), free)

    def remove(self, sequence: Sequence) -> None:
        """Release a sequence's slot and pages; their contents stay cached, its last window too."""
        # Last pages first, since other prompts are most likely to share the first ones.
        for page in reversed(sequence.pages):
            self.pages.release(page)
        end = sequence.settled // self.limits.cache.page_size
        for block, page in sequence.sliding.items():
            self.sliding.release(page, cold=not self.limits.window_start(end) <= block < end)
        self.forget(sequence)

    def forget(self, sequence: Sequence) -> None:
        """Take a sequence from its slot without its pages, which are released elsewhere."""
        self.running.remove(sequence)
        sequence.rank = sequence.slot = -1
        sequence.pages, sequence.sliding, sequence.drafts = [], {}, []
        sequence.computed = sequence.settled = sequence.ahead = 0
        sequence.epoch += 1

    def settle(self, sequence: Sequence, length: int) -> None:
        """Name the blocks whose keys are known to be computed, and release the pages that the window has passed."""
        size = self.limits.cache.page_size
        before, after = sequence.settled // size, length // size
        sequence.settled = length
        if after == before:
            return
        if self.limits.caching:
            for block, key in enumerate(sequence.keys(size, length)[before:], before):
                self.pages.name(sequence.pages[block], key)
                self.sliding.name(sequence.sliding[block], key)
        for block in [block for block in sequence.sliding if block < self.limits.window_start(after)]:
            kept = any(self.limits.window_start(end) <= block < end for end in sequence.branches)
            self.sliding.release(sequence.sliding.pop(block), cold=not kept)


class Scheduler:
    """Admits sequences in order of priority and arrival, decodes all that can, and fills the rest with prompts."""

    def __init__(self, limits: Limits, ranks: int) -> None:
        self.limits = limits
        self.ranks = [Rank(number, limits) for number in range(ranks)]
        self.waiting: list[Sequence] = []
        self.preemptions = self.hit_tokens = self._deferrals = 0
        self._arrivals = itertools.count()
        self._typical = float(TYPICAL_OUTPUT)

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence."""
        sequence.arrival = next(self._arrivals)
        self.queue(sequence)

    def queue(self, sequence: Sequence) -> None:
        """Let a sequence that does not run wait, at its place in the order."""
        bisect.insort(self.waiting, sequence, key=_ORDER)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it is."""
        if sequence.rank >= 0:
            self.ranks[sequence.rank].remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def finished(self, sequence: Sequence) -> None:
        """Record the output of a finished sequence, which tells what others are likely to need."""
        self._typical += (len(sequence.tokens) - self._typical) / 16

    def reset(self) -> None:
        """Let all sequences wait, to be computed again from their tokens in an empty cache."""
        for sequence in [s for rank in self.ranks for s in rank.running]:
            self.ranks[sequence.rank].forget(sequence)
            self.queue(sequence)
        self.ranks = [Rank(rank.number, self.limits) for rank in self.ranks]

    def plan(self, single: Callable[[Sequence], bool] = lambda _: False) -> Plan:
        """What to launch next; nothing changes until `commit`.

        A sequence for which `single` is true needs the host after each step.
        """
        plans = [rank.plan() for rank in self.ranks]
        steps = self._decode_steps(single)
        for plan in plans:
            self._plan_decodes(plan, max(1, steps))
        for plan in plans:
            self._plan_prompts(plan)
        if self.waiting:
            self._admit(plans)
        defers = self._deferrals < DEFERRALS and self._trim(plans)
        return Plan(plans, max(1, steps), steps > 0, defers)

    def commit(self, plan: Plan) -> None:
        """Carry out a plan that has been launched."""
        self._deferrals = self._deferrals + 1 if plan.defers else 0
        for own in plan.ranks:
            own.pages.commit()
            own.sliding.commit()
            for sequence in own.preempted:
                own.rank.forget(sequence)
                self.queue(sequence)
            self.preemptions += len(own.preempted)
            for admission in own.admitted.values():
                self._start(own.rank, admission)
            for work in own.work.values():
                work.sequence.pages += work.pages
                work.sequence.sliding |= work.sliding
                work.sequence.computed += work.count
                work.sequence.ahead += plan.steps if work.samples else 0

    def settle(self, sequence: Sequence, length: int) -> None:
        """Record that the keys of a running sequence's first `length` positions have been computed."""
        self.ranks[sequence.rank].settle(sequence, length)

    def _start(self, rank: Rank, admission: Admission) -> None:
        sequence = admission.sequence
        self.waiting.remove(sequence)
        rank.running.append(sequence)
        sequence.rank, sequence.slot = rank.number, admission.slot
        sequence.computed = sequence.settled = admission.computed
        sequence.pages, sequence.sliding = list(admission.pages), dict(admission.sliding)
        sequence.branches = admission.branches
        self.hit_tokens += admission.computed
        if sequence.epoch == 0:
            # Prefix hits after a preemption are on the sequence's own pages and do not count.
            sequence.prefix_hits = admission.computed
            sequence.admitted = time.monotonic()

    def _decode_steps(self, single: Callable[[Sequence], bool]) -> int:
        """The steps of a launch that only decodes: several for few sequences, which all decode so many more; else 0."""
        by_rank = [[s for s in rank.running if s.generated < s.max_tokens] for rank in self.ranks]
        running, most = [s for own in by_rank for s in own], max(map(len, by_rank))
        alike = all(s.decoding and not s.drafts and not single(s) for s in running)
        if self.waiting or most > self.limits.decodes or not alike:
            return 0
        if most > self.limits.few:
            return 1
        steps = self.limits.decode_steps
        # A first token that has not been read back yet would arrive only after all of these steps; before `min_tokens`
        # tokens that end a sequence are excluded, after them not.
        if any(
            s.max_tokens - s.generated < steps
            or not s.tokens
            or s.generated < s.params.min_tokens < s.generated + steps
            for s in running
        ):
            return 0
        for rank, own in zip(self.ranks, by_rank, strict=True):
            missing = (self.limits.blocks(s.computed + steps) - len(s.pages) for s in own)
            if sum(n for n in missing if n > 0) > rank.pages.available:
                return 0
        return steps

    def _plan_decodes(self, plan: RankPlan, steps: int) -> None:
        rows = self.limits.rows - sum(s.decoding for s in plan.rank.running)
        for sequence in sorted(plan.rank.running, key=_ORDER):
            ends = sequence.generated >= sequence.max_tokens
            if sequence in plan.preempted or not sequence.decoding or ends:
                continue
            drafts = sequence.drafts[: max(0, rows)] if sequence.drafts else []
            count = steps + len(drafts)
            fits = sequence.computed + count <= len(sequence.pages) * self.limits.cache.page_size
            if fits or self._make_room(plan, sequence, count):
                rows -= len(drafts)
                self._add_work(plan, sequence, steps, drafts)

    def _make_room(self, plan: RankPlan, sequence: Sequence, count: int) -> bool:
        """Preempt the last in the order until a running sequence can have pages for `count` more tokens."""
        while not self._has_room(plan, sequence, sequence.computed + count):
            victim = max(plan.running, key=_ORDER)
            self._preempt(plan, victim)
            if victim is sequence:
                return False
        return True

    def _preempt(self, plan: RankPlan, victim: Sequence) -> None:
        if work := plan.work.pop(victim, None):
            plan.tokens -= work.tokens
            for page in work.pages:
                plan.pages.give_back(page)
            for page in work.sliding.values():
                plan.sliding.give_back(page)
        for page in victim.pages:
            plan.pages.release(page)
        for page in victim.sliding.values():
            plan.sliding.release(page)
        plan.preempted.append(victim)
        plan.slots.append(victim.slot)

    def _has_room(self, plan: RankPlan, sequence: Sequence, length: int) -> bool:
        _, pages, sliding = self._held(plan, sequence)
        blocks = self.limits.blocks(length)
        missing = sum(block not in sliding for block in range(pages, blocks))
        return blocks - pages <= plan.pages.available and missing <= plan.sliding.available

    def _held(self, plan: RankPlan, sequence: Sequence) -> tuple[int, int, dict[int, int]]:
        """A sequence's computed tokens, its number of pages, and its sliding pages, before the plan's work."""
        if admission := plan.admitted.get(sequence):
            return admission.computed, len(admission.pages), admission.sliding
        return sequence.computed, len(sequence.pages), sequence.sliding

    def _add_work(self, plan: RankPlan, sequence: Sequence, count: int, drafts: Iterable[int] = ()) -> None:
        """Plan `count` tokens and drafts of a sequence, with the pages for them, which must be available."""
        start, pages, sliding = self._held(plan, sequence)
        admission, drafts = plan.admitted.get(sequence), list(drafts)
        blocks = range(pages, self.limits.blocks(start + count + len(drafts)))
        work = plan.work[sequence] = Work(
            sequence,
            sequence.epoch,
            sequence.slot if admission is None else admission.slot,
            start,
            count,
            drafts,
            start + count >= sequence.length,
            [plan.pages.take() for _ in blocks],
            {block: plan.sliding.take() for block in blocks if block not in sliding},
        )
        plan.tokens += work.tokens

    def _plan_prompts(self, plan: RankPlan) -> None:
        """Continue the prompts of running sequences, the first to arrive first."""
        prompts = [s for s in plan.running if s not in plan.work and not s.decoding]
        prompts.sort(key=_ORDER)
        for index, sequence in enumerate(prompts):
            if sequence in plan.preempted:
                continue
            if index == 0 and not self._make_room(plan, sequence, 1):
                continue
            self._plan_chunk(plan, sequence, alone=len(prompts) == 1 and not self.waiting)

    def _plan_chunk(self, plan: RankPlan, sequence: Sequence, alone: bool) -> None:
        """Plan a prompt's next tokens; one of several steps leaves half of each to others that wait or prefill."""
        start, pages, _ = self._held(plan, sequence)
        left = sequence.known_length - start
        most = self.limits.tokens if alone or left <= self.limits.tokens else max(1, self.limits.tokens // 2)
        room = (pages + min(plan.pages.available, plan.sliding.available)) * self.limits.cache.page_size - start
        count = min(left, most, self.limits.chunk, self.limits.tokens - plan.tokens, room)
        if count > 0:
            self._add_work(plan, sequence, count)

    def _trim(self, plans: list[RankPlan]) -> bool:
        """Shorten prompts so that the step has little padding; returns whether that defers most of their tokens.

        Unless others wait to be admitted, none gets its first token later for it.
        """
        others_wait = len(self.waiting) > sum(len(plan.admitted) for plan in plans)
        least, most = 0, max(plan.tokens for plan in plans)
        for plan in plans:
            kept = [
                work for work in plan.work.values() if work.sequence.decoding or (work.samples and not others_wait)
            ]
            least = max(least, sum(work.tokens for work in kept))

        larger = [size for size in self.limits.sizes if size >= most][:1]
        used = {
            size: sum(min(plan.tokens, size) for plan in plans) / size / len(plans)
            for size in [size for size in self.limits.sizes if max(least, LEAST) <= size < most] + larger
        }
        size = max(
            (size for size in used if used[size] >= FULL), default=max(used, key=used.__getitem__, default=most)
        )
        before = sum(plan.tokens for plan in plans)
        for plan in plans:
            self._cut(plan, size)
        after = sum(plan.tokens for plan in plans)
        decodes = sum(work.tokens for plan in plans for work in plan.work.values() if work.sequence.decoding)
        return DEFERRED * (after - decodes) < before - decodes

    def _cut(self, plan: RankPlan, tokens: int) -> None:
        """Shorten the last prompts until the plan has no more than so many tokens."""
        for work in reversed(list(plan.work.values())):
            excess = min(plan.tokens - tokens, work.count)
            if excess <= 0:
                return
            work.count -= excess
            work.samples = False
            plan.tokens -= excess
            kept = self.limits.blocks(work.start + work.count)
            for block in [block for block in work.sliding if block >= kept]:
                plan.sliding.give_back(work.sliding.pop(block))
            while work.pages and self._held(plan, work.sequence)[1] + len(work.pages) > kept:
                plan.pages.give_back(work.pages.pop())
            if not work.count:
                del plan.work[work.sequence]

    def _admit(self, plans: list[RankPlan]) -> None:
        """Admit waiting sequences in order while slots, pages and the step's tokens last."""
        for plan in plans:
            plan.reserved = sum(self._still_needed(plan, s) for s in plan.running)
        for sequence in self.waiting:
            if self._follows(plans, sequence):
                continue
            options = [
                (self._pending(plan) + sequence.known_length - admission.computed, plan.rank.number, admission)
                for plan in plans
                if plan.slots and plan.tokens < self.limits.tokens and (admission := self._fits(plan, sequence))
            ]
            if not options:
                return
            _, number, admission = min(options, key=lambda option: option[:2])
            plan = plans[number]
            plan.slots.remove(admission.slot)
            for page in admission.pages:
                plan.pages.hold(page)
            for page in admission.sliding.values():
                plan.sliding.hold(page)
            plan.admitted[sequence] = admission
            self._plan_chunk(plan, sequence, alone=len(self.waiting) == 1)
            plan.reserved += self._still_needed(plan, sequence)

    def _follows(self, plans: list[RankPlan], sequence: Sequence) -> bool:
        """Whether a copy of a prompt waits for the first one, whose pages it then shares; others need not wait."""
        leader, size = sequence.leader, self.limits.cache.page_size
        if leader is None or any(leader in plan.admitted for plan in plans):
            return leader is not None
        return leader.rank >= 0 and leader.settled // size < (len(leader.prompt) - 1) // size

    def _pending(self, plan: RankPlan) -> int:
        """Tokens that the rank has still to compute, one for each sequence that decodes."""
        return sum(max(1, s.known_length - self._held(plan, s)[0]) for s in plan.running)

    def _fits(self, plan: RankPlan, sequence: Sequence) -> Admission | None:
        """How the sequence would be admitted; None if running ones are expected to need the pages that are left."""
        admission = self._lookup(plan, sequence)
        free_hits = sum(plan.rank.pages.is_free(page) for page in admission.pages)
        needed = self._expected(sequence) - len(admission.pages) + free_hits
        fits = needed <= plan.pages.available - plan.reserved
        first = self.limits.blocks(admission.computed + 1) - len(admission.pages) + free_hits
        return admission if fits or (not plan.running and first <= plan.pages.available) else None

    def _expected(self, sequence: Sequence) -> int:
        """Pages that a sequence is expected to need in the end."""
        size = self.limits.cache.page_size
        more = max(self._typical - len(sequence.tokens), size)
        return self.limits.blocks(
            sequence.known_length + int(min(sequence.max_tokens - len(sequence.tokens), more))
        )

    def _still_needed(self, plan: RankPlan, sequence: Sequence) -> int:
        """Pages that a running sequence is expected to need beyond those that it has."""
        taken = len(plan.work[sequence].pages) if sequence in plan.work else 0
        return max(0, self._expected(sequence) - self._held(plan, sequence)[1] - taken)

    def _lookup(self, plan: RankPlan, sequence: Sequence) -> Admission:
        """The longest prefix whose full pages are cached, and the sliding pages of the window before its end."""
        slot = min(plan.slots)
        if not self.limits.caching or sequence.params.prompt_logprobs is not None:
            return Admission(sequence, slot, 0, [], {}, frozenset())
        size = self.limits.cache.page_size
        # The last token is always computed: the next one is sampled from its logits.
        keys = sequence.keys(size, sequence.known_length - 1)
        pages = list(itertools.takewhile(lambda page: page is not None, map(plan.pages.find, keys)))
        sliding = [plan.sliding.find(key) for key in keys[: len(pages)]]
        run = end = 0
        for block, page in enumerate(sliding, 1):
            run = run + 1 if page is not None else 0
            if run >= block - self.limits.window_start(block):
                end = block
        window = {b: page for b in range(self.limits.window_start(end), end) if (page := sliding[b]) is not None}
        hits = [page for page in pages[:end] if page is not None]
        return Admission(sequence, slot, end * size, hits, window, frozenset({len(pages), len(keys)} - {0, end}))
