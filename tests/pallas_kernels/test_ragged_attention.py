"""Ragged paged attention, and attention of whole sequences, against attention query by query in float64."""

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

from pallas_kernels.attention import RaggedBatch, attention, mosaic_tpu, reference, triton
from pallas_kernels.attention.triton import Config, Decode, Prompt
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


@settings(max_examples=15)
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


@settings(max_examples=10)
@given(
    st.integers(1, 2),
    st.integers(1, 40),
    st.integers(1, 3),
    st.integers(1, 4),
    st.sampled_from([16, 32]),
    st.sampled_from([None, 1, 7, 128]),
    st.integers(0, 2**32),
)
def test_whole_sequences_equal_a_naive_computation(
    batch: int, length: int, kv_heads: int, group: int, head_dim: int, window: int | None, seed: int
) -> None:
    arrays, want = whole_sequences(batch, length, kv_heads, group, head_dim, window, seed)
    got = jax.jit(partial(attention, window=window, sm_scale=SCALE))(*arrays)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def whole_sequences(
    batch: int, length: int, kv_heads: int, group: int, head_dim: int, window: int | None, seed: int = 0
) -> tuple[list[jax.Array], np.ndarray]:
    """Queries, keys and sinks of `attention`, and what it gives."""
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((batch, length, kv_heads * group, head_dim))
    kv = rng.standard_normal((batch, length, kv_heads, 2 * head_dim))
    sinks = rng.standard_normal(kv_heads * group)
    out = np.zeros(q.shape)
    for b, t, h in np.ndindex(batch, length, kv_heads * group):
        rows = kv[b, max(0, t + 1 - (window or t + 1)) : t + 1, h // group]
        weights = np.exp(rows[:, :head_dim] @ q[b, t, h] * SCALE)
        out[b, t, h] = weights @ rows[:, head_dim:] / (weights.sum() + np.exp(sinks[h]))
    return [jnp.asarray(x, jnp.float32) for x in (q, kv, sinks)], out


@pytest.mark.parametrize("window", [None, 5])
def test_whole_sequences_in_blocks_of_queries(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    arrays, want = whole_sequences(2, 17, 2, 2, 16, window)
    monkeypatch.setattr(reference, "MAX_SCORES", 5 * 2 * 4 * 17)
    got = jax.jit(partial(attention, window=window, sm_scale=SCALE))(*arrays)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("length", "window"), [(1, None), (16, 7), (37, None), (130, 128)])
def test_whole_sequences_as_pages(length: int, window: int | None) -> None:
    arrays, want = whole_sequences(2, length, 1, 3, 16, window)
    got = attention(*arrays, window=window, sm_scale=SCALE, backend="triton")
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_attention_of_whole_sequences_has_gradients() -> None:
    arrays, _ = whole_sequences(1, 6, 2, 2, 16, 4)
    q, *others = arrays
    loss = jax.jit(lambda q: jnp.sum(jnp.sin(attention(q, *others, window=4, sm_scale=SCALE))))
    direction = jnp.asarray(np.random.default_rng(1).standard_normal(q.shape), jnp.float32)
    want = (loss(q + 1e-2 * direction) - loss(q - 1e-2 * direction)) / 2e-2
    np.testing.assert_allclose(jnp.vdot(jax.grad(loss)(q), direction), want, rtol=1e-2)


SMALL = Config(Decode(keys=16, chunk=32, programs=16), Prompt(queries=4, keys=16))
"""Several splits and several blocks for the lengths of CASES."""


def triton_equals_naive(case: Case, **options: Any) -> None:
    got = computed(triton.ragged_paged_attention, case, interpret=True, **options)
    np.testing.assert_allclose(got, naive(case), rtol=1e-4, atol=1e-5)


@settings(max_examples=8)
@given(CASES, st.sampled_from([None, SMALL]))
def test_triton_on_any_batch(case: Case, config: Config | None) -> None:
    triton_equals_naive(case, config=config)


@pytest.mark.long
@settings(max_examples=60)
@given(CASES, st.sampled_from([None, SMALL, Config(Decode(32, 32, 64), Prompt(16, 32))]), st.booleans())
def test_triton_on_more_batches(case: Case, config: Config | None, bounded: bool) -> None:
    most = max(count for count, _ in case.sequences) if bounded else None
    triton_equals_naive(case, config=config, max_queries=most)


@pytest.mark.parametrize("max_queries", [None, 1])
@pytest.mark.parametrize("programs", [4, 200])
def test_triton_splits_a_long_sequence_beside_short_ones(max_queries: int | None, programs: int) -> None:
    """Into two parts, or into more than are joined at a time."""
    case = Case(((1, 70), (1, 3000), (0, 0), (1, 1), (1, 33)), group=3, padding=2)
    config = Config(Decode(16, 32, programs, 4, 1), SMALL.prompt)
    triton_equals_naive(case, config=config, max_queries=max_queries)


def test_the_keys_of_one_sequence_fill_the_programs() -> None:
    """Whatever the batch: its splits are as many as there are programs, and those of others are not fewer than one."""
    op = triton._Op(group=8, few=1, window=None, scale=1.0)
    config = Decode(keys=128, chunk=256, programs=512)
    for lengths in ([100_000], [100_000, *[50] * 63], [100_000, *[0] * 255], [5], [8000] * 64, [1000] * 256):
        length_N = jnp.asarray(lengths, jnp.int32)
        index_N = jnp.arange(len(lengths), dtype=jnp.int32)
        batch = RaggedBatch(jnp.zeros((1, 1), jnp.int32), index_N, index_N, jnp.minimum(length_N, 1), length_N)
        items = triton.Items.of(batch, 1 << 17, 8, op, config)
        records = np.asarray(items.records_IF)[np.asarray(items.records_IF)[:, triton.QUERIES] > 0]
        keys = records[:, triton.END] - records[:, triton.BEGIN]
        assert keys.min() > 0
        assert np.bincount(records[:, triton.ROW], keys, len(lengths)).tolist() == lengths
        if lengths[0] == 100_000:
            assert 60 <= np.sum(records[:, triton.ROW] == 0) <= 64
            assert items.joins_JF is not None
            assert np.asarray(items.joins_JF)[:, 1].max() <= items.parts


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("queries", [1, 2])
def test_triton_decodes_over_a_window(queries: int, seed: int) -> None:
    """In one block of keys for one query, at lengths around the window."""
    lengths = (1, 2, 127, 128, 129, 130, 140, 300)
    case = Case(tuple((min(queries, n), n) for n in lengths), group=8, kv_heads=1, window=128, seed=seed)
    triton_equals_naive(case, max_queries=queries)
    op = triton._Op(group=8, few=queries, window=128, scale=1.0)
    config = triton.choose(op, queries, 4096, jnp.float32).decode
    batch = jax.tree.map(jnp.asarray, case.arrays()[2])
    items = triton.Items.of(batch, 4096, 1, op, config)
    keys = np.asarray(items.records_IF)[:, triton.END] - np.asarray(items.records_IF)[:, triton.BEGIN]
    assert items.joins_JF is None
    assert keys.tolist() == [min(n, 127 + min(queries, n)) for n in lengths]
    assert config.keys == 128


@pytest.mark.parametrize("window", [None, 9])
def test_triton_mixes_decodes_prompts_and_gaps(window: int | None) -> None:
    """Sequences of as many queries as the decode kernel takes (16 rows of 4 heads), and of one more."""
    sequences = ((1, 90), (37, 37), (4, 50), (0, 0), (5, 60), (1, 1), (3, 3), (20, 120))
    triton_equals_naive(Case(sequences, group=4, kv_heads=1, window=window, padding=6), config=SMALL)


@pytest.mark.parametrize("window", [None, 9])
def test_triton_computes_drafts(window: int | None) -> None:
    """Where no sequence has many queries, all are the decode kernel's, with more rows."""
    case = Case(((4, 90), (1, 37), (3, 3), (2, 120)), group=8, kv_heads=1, window=window, padding=3)
    triton_equals_naive(case, config=SMALL, max_queries=4)
    assert triton._few(8, 4) == 4


@pytest.mark.parametrize("cache", [jnp.bfloat16, jnp.float8_e4m3fn, jnp.float32])
def test_triton_in_bfloat16_is_no_worse_than_the_reference(cache: Any) -> None:
    case = Case(((1, 60), (30, 75), (2, 9)), group=4, head_dim=64)
    q, kv, batch, sinks = case.arrays()
    q, sinks = (jnp.asarray(x, jnp.bfloat16) for x in (q, sinks))
    pages, layout = jnp.asarray(kv, cache), jax.tree.map(jnp.asarray, batch)

    def run(function: Any, q: jax.Array, pages: jax.Array, **options: Any) -> np.ndarray:
        compute = jax.jit(partial(function, window=None, sm_scale=0.125, **options))
        return np.asarray(compute(q, pages, layout, sinks), np.float64)

    exact = run(reference.ragged_paged_attention, q.astype(jnp.float32), pages.astype(jnp.float32))
    plain = run(reference.ragged_paged_attention, q, pages)
    got = run(triton.ragged_paged_attention, q, pages, interpret=True, config=SMALL)
    assert np.linalg.norm(got - exact) < 1.1 * np.linalg.norm(plain - exact)


def test_a_head_size_that_is_not_a_power_of_two_is_unsupported() -> None:
    with pytest.raises(NotImplementedError, match="head_dim"):
        triton_equals_naive(Case(((2, 3),), head_dim=24))


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
