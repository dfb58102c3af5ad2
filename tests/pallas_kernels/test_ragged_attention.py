"""Ragged paged attention: every backend against attention computed query by query in float64."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.attention import RaggedBatch, reference

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
