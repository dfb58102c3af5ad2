import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from gptoss_jax.engine.pages import Prefixes
from gptoss_jax.engine.scheduler import Limits, Scheduler, Sequence
from gptoss_jax.types import SamplingParams


@given(
    st.lists(st.integers(1, 3000), min_size=1, max_size=30),
    st.integers(1, 3),
    st.sampled_from([(16, 16), (8, 100), (300, 300), (512, 512), (2048, 2048), (512, 2048), (64, 4096)]),
)
def test_prompts_are_computed_whole_in_steps_of_bounded_size(
    lengths: list[int], parts: int, sizes: tuple[int, int]
) -> None:
    chunk, max_num_batched_tokens = sizes
    limits = Limits(8, 4000, 32, 0, max_num_batched_tokens, chunk, enable_prefix_caching=False)
    scheduler = Scheduler(limits, parts)
    for i, length in enumerate(lengths):
        scheduler.add(Sequence(str(i), 0, np.zeros(length, np.int32), SamplingParams(), 1, seed=0))
    done = dict.fromkeys(map(str, range(len(lengths))), 0)
    while scheduler.waiting or any(part.running for part in scheduler.parts):
        plans = scheduler.plan()
        chunks = [chunk for plan in plans for chunk in plan.chunks]
        size = limits.chunk_size(max(c.stop - c.start for c in chunks))
        assert max(len(plan.chunks) for plan in plans) * size <= max_num_batched_tokens
        for c in chunks:
            assert c.start == done[c.sequence.request_id] < c.stop
            done[c.sequence.request_id] = c.stop
            if c.finishing:
                scheduler.remove(c.sequence)
    assert list(done.values()) == lengths


def test_short_prompts_share_a_step_and_a_long_one_fills_it() -> None:
    scheduler = Scheduler(Limits(8, 400, 32, 0, 2048, 2048, enable_prefix_caching=False), 1)
    for i, length in enumerate([500, 400, 512, 30, 5000]):
        scheduler.add(Sequence(str(i), 0, np.zeros(length, np.int32), SamplingParams(), 1, seed=0))
    planned = [[(c.sequence.request_id, c.stop - c.start) for c in scheduler.plan()[0].chunks] for _ in range(4)]
    assert planned == [
        [("0", 500), ("1", 400), ("2", 512), ("3", 30)],
        [("4", 2048)],
        [("4", 2048)],
        [("4", 904)],
    ]


def test_completions_waiting_for_their_prompt_block_no_other_request() -> None:
    scheduler = Scheduler(Limits(8, 400, 32, 0, 512, 512, enable_prefix_caching=True), 1)

    def add(name: str, index: int, length: int, leader: Sequence | None) -> Sequence:
        sequence = Sequence(name, index, np.arange(length, dtype=np.int32), SamplingParams(), 1, seed=0)
        sequence.leader = leader
        scheduler.add(sequence)
        return sequence

    first = add("long", 0, 1000, None)
    add("long", 1, 1000, first)
    add("long", 2, 1000, first)
    add("short", 0, 10, None)
    scheduler.plan()
    assert [s.request_id for s in scheduler.parts[0].running] == ["long", "short"]
    assert [s.index for s in scheduler.waiting] == [1, 2]
    scheduler.plan()
    scheduler.plan()
    assert [(s.request_id, s.index) for s in scheduler.parts[0].running] == [
        ("long", 0),
        ("short", 0),
        ("long", 1),
        ("long", 2),
    ]


def test_a_used_snapshot_ring_is_evicted_last() -> None:
    prefixes = Prefixes(pages=8, snapshots=2, first_snapshot=0)

    def remember(key: bytes) -> None:
        page = prefixes.pages.take()
        prefixes.pages.name(page, key)
        prefixes.pages.release(page)
        row = prefixes.snapshot(key)
        assert row is not None
        prefixes.release_snapshot(row)

    remember(b"hot")
    for other in (b"a", b"b", b"c"):
        remember(other)
        assert prefixes.longest([b"hot"])[0] == 1
    assert prefixes.longest([b"a"]) == (0, None)
    assert prefixes.longest([b"c"])[0] == 1
