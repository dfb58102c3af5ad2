"""The scheduler and the page pools, without a device: random requests, whose launches are read back later."""

import copy
import dataclasses
import random
from collections import deque
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptoss_jax.engine.pace import Pace, padded
from gptoss_jax.engine.pages import PagePlan, PagePool
from gptoss_jax.engine.scheduler import DEFERRALS, Limits, Plan, Scheduler, Work
from gptoss_jax.engine.sequence import Sequence
from gptoss_jax.model.kv_cache import CacheShape
from gptoss_jax.types import SamplingParams

WINDOW = 20


def limits(
    slots: int = 8,
    pages: int = 400,
    tokens: int = 2048,
    chunk: int | None = None,
    size: int = 32,
    caching: bool = False,
    steps: int = 1,
    cached: int = 0,
) -> Limits:
    """A sliding pool just large enough for all slots and two launches, and so many cached pages."""
    own = -(-(WINDOW - 1) // size) + -(-(size - 1 + 2 * steps) // size)
    in_flight = 2 * -(-tokens // size)
    cache = CacheShape(slots, size, pages, slots * own + in_flight + cached, pages, own + in_flight + 1)
    sizes = Pace.of("gpu", None, tokens, None, slots).token_sizes
    return Limits(cache, WINDOW, tokens, sizes, chunk or tokens, max(slots, 16), steps, slots, slots, caching)


def sequence(name: str, prompt: list[int] | int, max_tokens: int = 1) -> Sequence:
    tokens = np.arange(prompt) if isinstance(prompt, int) else np.asarray(prompt)
    return Sequence(name, 0, tokens.astype(np.int32), SamplingParams(), max_tokens, seed=0)


def next_token(own: Sequence) -> int:
    """What the pretended model generates: it depends on the length alone, so that equal prompts go on equally."""
    return own.known_length * 7 % 11


class Device:
    """Runs plans one launch behind, as the engine does, and checks that pages hold what their names say."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.flying: deque[Plan] = deque()
        self.computed: dict[str, int] = {}
        self.launches: list[list[list[Work]]] = []
        # What each page of each pool and rank contains: the tokens of all positions up to it, by slot.
        self.contents: dict[tuple[int, str, int], dict[int, tuple[int, ...]]] = {}

    def step(self) -> list[Sequence]:
        plan = self.scheduler.plan()
        if plan.work:
            self.check(plan)
            self.scheduler.commit(plan)
            self.launches.append(plan.by_rank)
            self.flying.append(plan)
        if len(self.flying) > 1 or not plan.work:
            return self.read()
        return []

    def check(self, plan: Plan) -> None:
        limits, size = self.scheduler.limits, self.scheduler.limits.cache.page_size
        for own in plan.ranks:
            assert own.tokens == sum(work.tokens for work in own.work.values())
            assert own.tokens <= max(limits.tokens, limits.rows)
            slots = [work.slot for work in own.work.values()]
            assert len(set(slots)) == len(slots)
            for sequence, work in own.work.items():
                admission = own.admitted.get(sequence)
                start = admission.computed if admission else sequence.computed
                held = admission.pages if admission else sequence.pages
                sliding = (admission.sliding if admission else sequence.sliding) | work.sliding
                assert work.start == start
                pages = [*held, *work.pages]
                assert len(pages) * size >= work.start + work.tokens
                first = max(0, work.start - limits.window + 1) // size
                assert set(range(first, (work.start + work.tokens - 1) // size + 1)) <= sliding.keys()
                assert len(sliding) <= limits.cache.sliding_table
                self.write(own.rank.number, sequence, work, pages, sliding)

    def write(self, rank: int, own: Sequence, work: Work, pages: list[int], sliding: dict[int, int]) -> None:
        """Write positions to their pages, and see that all that they attend to is there."""
        size, window = self.scheduler.limits.cache.page_size, self.scheduler.limits.window
        tokens = [*own.prompt.tolist(), *own.tokens]
        tokens += [p * 7 % 11 for p in range(len(tokens), work.start + work.count)]
        for p in range(work.start, work.start + work.count):
            for pool, page in (("full", pages[p // size]), ("sliding", sliding[p // size])):
                kept = self.contents.setdefault((rank, pool, page), {})
                kept[p % size] = tuple(tokens[: p + 1])
            for key in {0, p // 2, max(0, p - window + 1), p}:
                assert self.contents[rank, "full", pages[key // size]][key % size] == tuple(tokens[: key + 1])
                if key > p - window:
                    found = self.contents[rank, "sliding", sliding[key // size]][key % size]
                    assert found == tuple(tokens[: key + 1])

    def read(self) -> list[Sequence]:
        """Read back the oldest launch; the sequences that finished."""
        if not self.flying:
            return []
        plan, finished = self.flying.popleft(), []
        for work in plan.work:
            own = work.sequence
            if own.epoch != work.epoch:
                continue
            if not work.samples:
                self.scheduler.settle(own, work.start + work.count)
                continue
            own.ahead -= plan.steps
            for _ in range(plan.steps):
                own.tokens.append(next_token(own))
            self.scheduler.settle(own, own.known_length - 1)
            if len(own.tokens) >= own.max_tokens:
                self.scheduler.finished(own)
                self.scheduler.remove(own)
                finished.append(own)
        return finished


def state(scheduler: Scheduler) -> Any:
    """All that a plan must not change."""
    pools = [(vars(rank.pages), vars(rank.sliding)) for rank in scheduler.ranks]
    sequences = [vars(s) for s in [*scheduler.waiting, *(s for rank in scheduler.ranks for s in rank.running)]]
    return copy.deepcopy(
        (pools, [{n: v for n, v in s.items() if n not in ("prompt", "leader", "_keys")} for s in sequences])
    )


def random_requests(rng: random.Random, count: int) -> list[Sequence]:
    """Prompts that share beginnings, also with the outputs of others."""
    common = [rng.randrange(11) for _ in range(150)]
    made = []
    for i in range(count):
        own = common[: rng.randrange(150)] + [rng.randrange(11) for _ in range(rng.randrange(1, 60))]
        if rng.random() < 0.3 and made:
            before = rng.choice(made)
            known = [*before.prompt.tolist()]
            own = known + [p * 7 % 11 for p in range(len(known), len(known) + before.max_tokens)] + own[-20:]
        made.append(sequence(str(i), own[:220], rng.randrange(1, 60)))
    return made


@pytest.mark.parametrize("examples", [25, pytest.param(300, marks=pytest.mark.slow)])
def test_any_schedule_computes_every_position_from_what_it_attends_to(examples: int) -> None:
    """With few pages, random cancellations and lost launches; planning changes nothing; all is free afterwards."""
    sizes, steps = st.sampled_from([4, 16]), st.sampled_from([1, 4])
    schedules = given(st.integers(0, 10**6), st.integers(1, 2), st.booleans(), steps, sizes)
    settings(max_examples=examples)(schedules(any_schedule))()


def any_schedule(seed: int, ranks: int, caching: bool, steps: int, size: int) -> None:
    rng = random.Random(seed)
    scheduler = Scheduler(limits(4, 320 // size, 64, 48, size, caching, steps), ranks)
    device, todo, alive = Device(scheduler), random_requests(rng, 12), []
    if rng.random() < 0.5:
        scheduler._expected = lambda s: scheduler.limits.blocks(s.known_length + 1)  # type: ignore[method-assign]
    while todo or alive:
        if todo and rng.random() < 0.4:
            alive.append(todo.pop())
            scheduler.add(alive[-1])
        if alive and rng.random() < 0.03:
            scheduler.remove(alive.pop(rng.randrange(len(alive))))
        if rng.random() < 0.02:
            device.flying.clear()
            device.contents.clear()
            scheduler.reset()
        before = state(scheduler)
        scheduler.plan()
        assert state(scheduler) == before
        finished = device.step()
        alive = [s for s in alive if s not in finished]
    while device.flying:
        device.read()
    for rank in scheduler.ranks:
        assert not rank.running
        for pool in (rank.pages, rank.sliding):
            assert pool.available == pool.size
            assert not any(pool._holders)


@given(st.integers(0, 10**6))
def test_a_page_plan_does_what_the_pool_would(seed: int) -> None:
    rng = random.Random(seed)
    pool = PagePool(6)
    held: list[int] = []
    for number in range(30):
        plan, before = PagePlan(pool), copy.deepcopy(vars(pool))
        new, released = [], []
        for page in [page for page in held if rng.random() < 0.3]:
            plan.release(page)
            released.append(page)
        for _ in range(rng.randrange(4)):
            if rng.random() < 0.4 and (found := plan.find(rng.randrange(number + 1))) is not None:
                plan.hold(found)
                new.append(found)
            elif plan.available:
                new.append(plan.take())
        for page in [page for page in new if page in plan._taken and rng.random() < 0.2]:
            plan.give_back(page)
            new.remove(page)
        assert vars(pool) == before
        left = plan.available
        plan.commit()
        assert pool.available == left
        for page in released:
            held.remove(page)
        held += new
        assert sorted(held) == sorted(p for p, count in enumerate(pool._holders) for _ in range(count))
        for page in set(new):
            pool.name(page, number)


@settings(max_examples=10)
@given(
    st.lists(st.integers(1, 3000), min_size=1, max_size=30),
    st.integers(1, 3),
    st.sampled_from([(16, 16), (100, 8), (300, 300), (512, 512), (2048, 2048), (2048, 512), (4096, 64)]),
)
def test_prompts_are_computed_whole_in_steps_of_bounded_size(
    lengths: list[int], ranks: int, sizes: tuple[int, int]
) -> None:
    scheduler = Scheduler(limits(pages=4000, tokens=sizes[0], chunk=sizes[1]), ranks)
    for i, length in enumerate(lengths):
        scheduler.add(sequence(str(i), length))
    device = Device(scheduler)
    done: list[str] = []
    while len(done) < len(lengths):
        done += [own.request_id for own in device.step()]
    works = [work for launch in device.launches for own in launch for work in own]
    assert all(work.count <= sizes[1] for work in works)
    for i, length in enumerate(lengths):
        own = [work for work in works if work.sequence.request_id == str(i)]
        assert [work.start for work in own] == [0, *np.cumsum([work.count for work in own])[:-1]]
        assert sum(work.count for work in own) == length


def test_a_long_prompt_leaves_room_for_others() -> None:
    scheduler = Scheduler(limits(tokens=2048, pages=4000), 1)
    for name, length in (("long", 20_000), ("a", 300), ("b", 700)):
        scheduler.add(sequence(name, length))
    device = Device(scheduler)
    device.step()
    first = {work.sequence.request_id: work.count for work in device.launches[0][0]}
    assert first == {"long": 1024, "a": 300, "b": 700}
    device.step()
    device.step()
    assert [work.count for work in device.launches[2][0]] == [2048]


def test_requests_are_admitted_only_with_the_pages_that_they_will_need() -> None:
    """64 prompts of 512 tokens that each generate 512 more, over 16 slots and 300 pages."""
    scheduler = Scheduler(limits(slots=16, pages=300), 1)
    for i in range(64):
        scheduler.add(sequence(str(i), 512, 512))
    device = Device(scheduler)
    device.write = lambda *_: None  # type: ignore[method-assign]
    done = 0
    while done < 64:
        done += len(device.step())
    prefilled = sum(work.count for launch in device.launches for work in launch[0] if work.start < 512)
    assert prefilled == 64 * 512
    assert scheduler.preemptions == 0
    most = max(len(launch[0]) for launch in device.launches)
    assert most == 300 // (1024 // 32)


def test_completions_waiting_for_their_prompt_block_no_other_request() -> None:
    scheduler = Scheduler(limits(tokens=512, caching=True), 1)
    first = sequence("long", 1000)
    copies = [sequence("long", 1000) for _ in range(2)]
    for own in (first, *copies, sequence("short", 10)):
        own.leader = first if own in copies else None
        scheduler.add(own)
    device = Device(scheduler)
    device.step()
    assert [s.request_id for s in scheduler.ranks[0].running] == ["long", "short"]
    while copies[0].rank < 0:
        device.step()
    assert [s.computed for s in copies] == [1000, 1000]
    assert [s.prefix_hits for s in copies] == [31 * 32, 31 * 32]


def finish(device: Device, own: Sequence) -> None:
    device.scheduler.add(own)
    while own not in device.step():
        pass


@pytest.mark.parametrize("size", [4, 16, 32])
def test_a_tool_loop_computes_its_new_tokens_and_at_most_one_block(size: int) -> None:
    """Each turn's prompt is the one before with its answer and the tool's result."""
    scheduler = Scheduler(limits(pages=4000, size=size, caching=True), 1)
    device, prompt = Device(scheduler), [3] * 100
    for turn in range(10):
        own = sequence(str(turn), prompt, 50)
        finish(device, own)
        if turn:
            assert len(own.prompt) - own.prefix_hits <= 30 + 1 + size
        prompt = [*own.prompt.tolist(), *own.tokens, *[turn] * 30]


def test_a_prompt_that_parts_from_another_is_taken_up_there_next_time() -> None:
    """The sliding pages before the point where two prompts part are kept, though both went far beyond it."""
    scheduler = Scheduler(limits(pages=400, size=4, caching=True, tokens=64), 1)
    device = Device(scheduler)
    system = list(range(90))
    for number in range(2):
        finish(device, sequence(str(number), system + [number] * 150))
    third = sequence("2", system + [2] * 10)
    finish(device, third)
    assert third.prefix_hits == 90 // 4 * 4


def test_windows_that_were_passed_are_evicted_first() -> None:
    scheduler = Scheduler(limits(slots=1, pages=800, size=4, caching=True, tokens=16, cached=24), 1)
    device = Device(scheduler)
    finish(device, sequence("a", [5] * 60))
    finish(device, sequence("b", list(range(400))))
    again = sequence("again", [5] * 60 + [1])
    finish(device, again)
    assert again.prefix_hits == 60
    assert scheduler.limits.cache.sliding_pages < 400 // 4


def test_ranks_share_the_work_evenly_and_prefer_the_one_that_has_the_prefix() -> None:
    scheduler = Scheduler(limits(slots=8, caching=True, tokens=512), 2)
    device = Device(scheduler)
    finish(device, sequence("a", [1] * 320))
    followers = [sequence(str(i), [1] * 320 + [i] * 40) for i in range(2)]
    for own in followers:
        scheduler.add(own)
    device.step()
    assert [own.rank for own in followers] == [0, 0]
    others = [sequence(f"o{i}", [i + 20] * 100) for i in range(8)]
    for own in others:
        scheduler.add(own)
    while not all(own.rank >= 0 or own.tokens for own in others):
        device.step()
    tokens = [
        sum(w.count for launch in device.launches for w in launch[rank] if w.sequence in others) for rank in (0, 1)
    ]
    assert abs(tokens[0] - tokens[1]) <= 100


def test_steps_are_padded_little() -> None:
    """While prompts wait, a step's tokens are cut to a size that programs have."""
    scheduler = Scheduler(limits(slots=16, pages=4000), 1)
    rng = random.Random(0)
    for i in range(100):
        scheduler.add(sequence(str(i), rng.randrange(50, 900), 1))
    device = Device(scheduler)
    done = 0
    while done < 100:
        done += len(device.step())
    tokens = [sum(work.tokens for work in launch[0]) for launch in device.launches]
    padding = sum(padded(count, scheduler.limits.sizes) - count for count in tokens)
    assert padding < 0.1 * sum(tokens)


@pytest.mark.parametrize("ranks", [1, 2])
def test_mixed_requests_are_padded_little(ranks: int) -> None:
    """Of twice as many requests as there are slots, prompts and decodes share steps, on all ranks alike."""
    pace = Pace.of("gpu", None, None, None, 256 // ranks, 0, ranks)
    own = limits(slots=256 // ranks, pages=40000, tokens=pace.token_sizes[-1])
    scheduler = Scheduler(dataclasses.replace(own, sizes=pace.token_sizes), ranks)
    rng = np.random.default_rng(0)
    lengths = np.minimum(rng.lognormal((4.92, 5.17), (1.035, 0.755), (512, 2)), (2606, 1024)).astype(int)
    for i, (prompt, new) in enumerate(lengths.tolist()):
        scheduler.add(sequence(str(i), prompt + 1, new + 1))
    device = Device(scheduler)
    device.write = lambda *_: None  # type: ignore[method-assign]
    done = used = padding = 0
    while done < 512:
        done += len(device.step())
    for launch in device.launches:
        counts = [sum(work.tokens for work in works) for works in launch]
        decodes = max(counts) <= max(pace.decode_sizes) and all(
            work.tokens == 1 for works in launch for work in works
        )
        sizes = pace.decode_sizes if decodes else pace.token_sizes
        used += sum(counts)
        padding += ranks * padded(max(counts), sizes) - sum(counts)
    assert padding < 0.1 * (used + padding)


def test_prompts_are_not_deferred_for_long() -> None:
    """Short prompts beside as many decodes as a step's size, while others wait: every step with them has padding."""
    scheduler = Scheduler(limits(slots=66, pages=4000), 1)
    device = Device(scheduler)
    for i in range(64):
        scheduler.add(sequence(str(i), 4, 400))
    while any(not own.tokens for own in scheduler.ranks[0].running) or scheduler.waiting:
        device.step()
    for i in range(10):
        scheduler.add(sequence(f"short {i}", 10, 1))
    finished: list[str] = []
    for _ in range(5 * (DEFERRALS + 3)):
        finished += [own.request_id for own in device.step()]
    assert finished == [f"short {i}" for i in range(10)]
