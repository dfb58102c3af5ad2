"""Ragged paged attention: every backend against attention computed query by query in float64."""

import dataclasses
from functools import partial
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.attention import RaggedBatch, mosaic_tpu, reference
from pallas_kernels.tpu import Chip

SCALE = 0.3


@dataclasses.dataclass(frozen=True)
class Case:
    """Sequences as (queries, length), with random queries, pages and tables."""

    sequences: tuple[tuple[int, int], ...]
    kv_heads: int = 2
    group: int = 2
    head_dim: int = 16
    page_size: int = 8
    window: int | None = None
    padding: int = 0
    seed: int = 0

    def arrays(self) -> tuple[np.ndarray, np.ndarray, RaggedBatch, np.ndarray]:
        """Queries [T, H, D], pages, the layout, and sinks; unused pages hold NaN and unused entries no page."""
        rng = np.random.default_rng(self.seed)
        counts, lengths = (np.array(x, np.int32) for x in zip(*self.sequences, strict=True))
        # Tables of windows are cyclic, with entries for the window, the queries, and the ends of two pages.
        longest = int(lengths.max(initial=1))
        entries = -(-longest // self.page_size)
        if self.window is not None:
            needed = -(-(self.window + int(counts.max(initial=1))) // self.page_size) + 1
            entries = min(entries, needed) if entries > needed else needed
        rows = rng.permutation(len(counts) + 2)[: len(counts)].astype(np.int32)
        pages = len(counts) * entries + 3
        free = list(rng.permutation(pages))
        tables = np.full((len(counts) + 2, entries), 2**30, np.int32)
        kv = np.full((pages, self.page_size, self.kv_heads, 2 * self.head_dim), np.nan)
        for n, (count, length) in enumerate(self.sequences):
            if not count:
                continue
            first = max(0, length - count - self.window + 1) if self.window is not None else 0
            for block in range(first // self.page_size, (length - 1) // self.page_size + 1):
                tables[rows[n], block % entries] = free.pop()
            for p in range(first, length):
                page = tables[rows[n], p // self.page_size % entries]
                kv[page, p % self.page_size] = rng.standard_normal(kv.shape[2:])
        # Gaps between sequences are padding.
        gaps = rng.integers(0, 3, len(counts)) if self.padding else np.zeros(len(counts), int)
        starts = (np.cumsum(counts + gaps) - counts).astype(np.int32)
        tokens = int(starts[-1] + counts[-1]) + self.padding
        q = rng.standard_normal((tokens, self.kv_heads * self.group, self.head_dim))
        sinks = rng.standard_normal(self.kv_heads * self.group)
        return q, kv, RaggedBatch(tables, rows, starts, counts, lengths), sinks


def naive(case: Case) -> np.ndarray:
    """Query by query and head by head in float64."""
    q, kv, batch, sinks = case.arrays()
    out = np.zeros(q.shape)
    entries = batch.page_tables_RM.shape[1]
    for n, (count, length) in enumerate(case.sequences):
        for i in range(count):
            p = length - count + i
            keys = np.arange(max(0, p - case.window + 1) if case.window is not None else 0, p + 1)
            pages = batch.page_tables_RM[batch.rows_N[n], keys // case.page_size % entries]
            rows = kv[pages, keys % case.page_size]
            for h in range(q.shape[1]):
                own = rows[:, h // case.group]
                scores = own[:, : case.head_dim] @ q[batch.starts_N[n] + i, h] * SCALE
                top = max(scores.max(), sinks[h])
                weights = np.exp(scores - top)
                total = weights.sum() + np.exp(sinks[h] - top)
                out[batch.starts_N[n] + i, h] = weights @ own[:, case.head_dim :] / total
    return out


def computed(function: Any, case: Case, dtype: Any = jnp.float32, **options: Any) -> jax.Array:
    q, kv, batch, sinks = case.arrays()
    run = jax.jit(partial(function, window=case.window, sm_scale=SCALE, **options))
    return run(jnp.asarray(q, dtype), jnp.asarray(kv, dtype), jax.tree.map(jnp.asarray, batch), jnp.asarray(sinks))


SEQUENCES = st.lists(
    st.tuples(st.integers(0, 40), st.integers(0, 150)).map(lambda x: (x[0], x[0] + x[1] if x[0] else 0)),
    min_size=1,
    max_size=5,
).filter(lambda x: any(count for count, _ in x))
CASES = st.builds(
    Case,
    SEQUENCES.map(tuple),
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 4),
    head_dim=st.sampled_from([16, 32]),
    page_size=st.sampled_from([4, 8, 32]),
    window=st.sampled_from([None, 1, 7, 128]),
    padding=st.integers(0, 9),
    seed=st.integers(0, 2**32),
)


@settings(max_examples=25)
@given(CASES)
def test_the_reference_equals_a_naive_computation(case: Case) -> None:
    got = computed(reference.ragged_paged_attention, case)
    np.testing.assert_allclose(got, naive(case), rtol=1e-4, atol=1e-5)


@settings(max_examples=10)
@given(st.lists(st.integers(1, 300), min_size=1, max_size=6), st.sampled_from([None, 7, 128]), st.integers(0, 99))
def test_a_batch_that_only_decodes(lengths: list[int], window: int | None, seed: int) -> None:
    case = Case(tuple((1, length) for length in lengths), window=window, seed=seed)
    got = computed(reference.ragged_paged_attention, case, max_queries=1)
    np.testing.assert_allclose(got, naive(case), rtol=1e-4, atol=1e-5)


# TPUs.

RACES = pltpu.InterpretParams(detect_races=True)
"""On the TPU interpreter uninitialised memory is NaN, and indices out of bounds are errors."""


def the_tpu_kernel_equals_a_naive_computation(case: Case, interpret: Any = True, **options: Any) -> None:
    got = computed(mosaic_tpu.ragged_paged_attention, case, interpret=interpret, **options)
    np.testing.assert_allclose(got, naive(case), rtol=1e-4, atol=1e-5)
    if interpret is not True:
        assert not interpret_pallas_call.races.races_found


@settings(max_examples=3)
@given(CASES)
def test_the_tpu_kernel(case: Case) -> None:
    the_tpu_kernel_equals_a_naive_computation(case)


@pytest.mark.slow
@settings(max_examples=20)
@given(
    CASES,
    st.sampled_from([(1, 16), (4, 32), (64, 16), (16, 128)]).map(lambda x: mosaic_tpu.Config(*x)),
    st.integers(1, 2),
)
def test_the_tpu_kernel_with_any_blocks(case: Case, config: mosaic_tpu.Config, cores: int) -> None:
    the_tpu_kernel_equals_a_naive_computation(case, config=config, chip=Chip(cores=cores))


MIXED = ((1, 60), (0, 0), (37, 90), (1, 1), (30, 40), (2, 33))


@pytest.mark.parametrize(("window", "cores"), [(None, 1), (9, 2)])
def test_the_tpu_kernel_does_not_race(window: int | None, cores: int) -> None:
    case = Case(MIXED, window=window, padding=3, group=3)
    interpret = dataclasses.replace(RACES, num_cores_or_threads=cores)
    options: Any = {"config": mosaic_tpu.Config(8, 16), "chip": Chip(cores=cores)}
    the_tpu_kernel_equals_a_naive_computation(case, interpret, **options)


@pytest.mark.parametrize("cores", [1, 2])
def test_the_tpu_kernel_does_not_race_when_it_decodes(cores: int) -> None:
    """Sequences of one and of several blocks follow each other, with absent ones between and after them."""
    case = Case(((1, 20), (0, 0), (1, 1), (1, 75), (0, 0), (1, 16), (0, 0)), kv_heads=1, page_size=4)
    interpret = dataclasses.replace(RACES, num_cores_or_threads=cores)
    options: Any = {"config": mosaic_tpu.Config(1, 16), "chip": Chip(cores=cores)}
    the_tpu_kernel_equals_a_naive_computation(case, interpret, max_queries=1, **options)


def test_the_tpu_kernel_without_any_sequence() -> None:
    case = Case(((0, 0), (0, 0)), padding=4)
    got = computed(mosaic_tpu.ragged_paged_attention, case, interpret=RACES, chip=Chip(cores=2))
    assert not np.asarray(got).any()


@pytest.mark.parametrize(
    ("window", "entries"),
    [(110, 138), pytest.param(100, 128, marks=pytest.mark.slow), pytest.param(None, 301, marks=pytest.mark.slow)],
)
def test_a_tpu_block_of_keys_has_entries_in_two_rows_of_lanes(window: int | None, entries: int) -> None:
    case = Case(((27, 301), (1, 200)), page_size=1, window=window)
    assert case.arrays()[2].page_tables_RM.shape[1] == entries
    the_tpu_kernel_equals_a_naive_computation(case, RACES, config=mosaic_tpu.Config(16, 32))


@pytest.mark.parametrize("window", [None, 20])
def test_the_tpu_kernel_copies_parts_of_large_pages(window: int | None) -> None:
    case = Case(((40, 150), (1, 66), (1, 64)), page_size=64, window=window)
    entries = case.arrays()[2].page_tables_RM.shape[1]
    blocks = mosaic_tpu.Blocks.of(64, case.kv_heads, entries, window, 16)
    assert (blocks.unit, blocks.parts) == (16, 4)
    the_tpu_kernel_equals_a_naive_computation(case, RACES, config=mosaic_tpu.Config(16, 16))


@pytest.mark.parametrize(
    ("context", "window", "most"), [(2048, None, 8.5), (16384, None, 15.1), (16384, 128, 1.9)]
)
def test_how_often_a_prompt_reads_its_keys_on_a_tpu(context: int, window: int | None, most: float) -> None:
    """A chunk of 2048 queries, at the released shape."""
    config = mosaic_tpu.Config.of(8, 8, 32, window, 2048)
    blocks = mosaic_tpu.Blocks.of(32, 8, 4096, window, config.keys)
    one = [jnp.array([x], jnp.int32) for x in (0, 0, 2048, context)]
    items = mosaic_tpu.Items.of(RaggedBatch(jnp.zeros((1, 4096), jnp.int32), *one), 2048, config.queries, blocks)
    copied = int(jnp.sum(items.last - items.first)) * blocks.unit
    needed = context if window is None else min(context, 2048 + window - 1)
    assert 1 <= copied / needed <= most


def test_the_tpu_kernel_in_bfloat16_is_no_worse_than_the_reference() -> None:
    case = Case(((5, 60), (1, 33)), head_dim=64, group=4)
    q, kv, batch, sinks = case.arrays()
    q, kv, sinks = (np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64) for x in (q, kv, sinks))
    with mock.patch.object(Case, "arrays", return_value=(q, kv, batch, sinks)):
        exact = naive(case)
        kernel = computed(mosaic_tpu.ragged_paged_attention, case, jnp.bfloat16, interpret=True)
        plain = computed(reference.ragged_paged_attention, case, jnp.bfloat16)
    errors = [np.linalg.norm(np.asarray(x, np.float64) - exact) for x in (kernel, plain)]
    assert errors[0] < 1.1 * errors[1]


@pytest.mark.parametrize(("head_dim", "kv_heads", "reason"), [(32, 2, "64 lanes"), (64, 3, "3 bfloat16")])
def test_the_compiled_tpu_kernel_names_what_it_does_not_support(head_dim: int, kv_heads: int, reason: str) -> None:
    case = Case(((2, 3),), kv_heads=kv_heads, head_dim=head_dim)
    with pytest.raises(NotImplementedError, match=reason):
        computed(mosaic_tpu.ragged_paged_attention, case, jnp.bfloat16, interpret=False)
