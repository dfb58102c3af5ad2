from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.attention import attention, paged_attention, reference, triton


def naive(q, kv, sinks, q_positions, kv_positions, window, sm_scale):
    """Query by query and head by head in float64."""
    batch, length, heads, head_dim = q.shape
    out = np.zeros(q.shape)
    for b, t, h in np.ndindex(batch, length, heads):
        p, kp = q_positions[b, t], kv_positions[b]
        seen = (kp >= 0) & (kp <= p) & (kp > p - (window or 1 << 30))
        rows = kv[b, seen, h // (heads // kv.shape[2])]
        scores = rows[:, :head_dim] @ q[b, t, h] * sm_scale
        top = max(scores.max(initial=-np.inf), sinks[h])
        weights = np.exp(scores - top)
        out[b, t, h] = weights @ rows[:, head_dim:] / (weights.sum() + np.exp(sinks[h] - top))
    return out


def case(seed: int, batch: int, length: int, keys: int, kv_heads: int, group: int, head_dim: int):
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((batch, length, kv_heads * group, head_dim))
    kv = rng.standard_normal((batch, keys, kv_heads, 2 * head_dim))
    sinks = rng.standard_normal(kv_heads * group)
    q_positions = rng.integers(-1, keys + 3, (batch, length))
    kv_positions = rng.permuted(np.tile(np.arange(keys), (batch, 1)), axis=1)
    kv_positions = np.where(rng.random(kv_positions.shape) < 0.1, -1, kv_positions)
    return q, kv, sinks, q_positions, kv_positions


def as_arrays(q, kv, sinks, q_positions, kv_positions):
    floats = [jnp.asarray(x, jnp.float32) for x in (q, kv, sinks)]
    return [*floats, jnp.asarray(q_positions, jnp.int32), jnp.asarray(kv_positions, jnp.int32)]


def computed(function: Callable[..., jax.Array], *arrays: jax.Array, **options: Any) -> jax.Array:
    """The function under jit: op-by-op execution would compile every operation for every shape."""
    return jax.jit(partial(function, **options))(*arrays)


@settings(max_examples=10)
@given(
    st.integers(0, 2**32),
    st.integers(1, 2),
    st.integers(1, 20),
    st.integers(1, 40),
    st.integers(1, 3),
    st.integers(1, 4),
    st.sampled_from([16, 32, 64]),
    st.sampled_from([None, 1, 7, 128]),
)
def test_equals_a_naive_computation(seed, batch, length, keys, kv_heads, group, head_dim, window) -> None:
    arguments = case(seed, batch, length, keys, kv_heads, group, head_dim)
    got = computed(attention, *as_arrays(*arguments), window=window, sm_scale=0.3)
    np.testing.assert_allclose(got, naive(*arguments, window, 0.3), rtol=1e-4, atol=1e-5)


def test_blocks_of_queries_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = case(3, 2, 17, 29, 2, 2, 16)
    whole = computed(attention, *as_arrays(*arguments), window=5, sm_scale=0.25)
    monkeypatch.setattr(reference, "MAX_SCORES", 5 * 2 * 4 * 29)
    in_blocks = computed(attention, *as_arrays(*arguments), window=5, sm_scale=0.25)
    np.testing.assert_allclose(in_blocks, whole, atol=1e-6)


def test_padding_gives_zero() -> None:
    q, kv, sinks, q_positions, kv_positions = case(0, 1, 4, 8, 1, 2, 16)
    got = attention(
        *as_arrays(q, kv, sinks, np.full_like(q_positions, -1), kv_positions), window=None, sm_scale=1.0
    )
    assert not np.asarray(got).any()


@settings(max_examples=10)
@given(st.integers(0, 2**32), st.integers(1, 3), st.integers(1, 9), st.sampled_from([2, 8]), st.integers(1, 4))
def test_paged_attention_equals_contiguous_attention(seed, batch, length, page_size, pages) -> None:
    q, kv, sinks, _, _ = case(seed, batch, length, pages * page_size, 2, 2, 16)
    rng = np.random.default_rng(seed)
    keys = pages * page_size
    starts = rng.integers(0, max(keys - length, 0) + 1, (batch, 1))
    q_positions = np.where(starts + np.arange(length) < keys, starts + np.arange(length), -1)
    table = rng.permutation(batch * pages + 2)[: batch * pages].reshape(batch, pages)
    kv_pages = rng.standard_normal((batch * pages + 2, page_size, 2, 32))
    kv_pages[table.reshape(-1)] = kv.reshape(batch * pages, page_size, 2, 32)
    kv_positions = np.tile(np.arange(keys), (batch, 1))
    arrays = as_arrays(q, kv_pages, sinks, q_positions, table)
    got = computed(paged_attention, *(arrays[i] for i in (0, 1, 4, 2, 3)), sm_scale=0.3)
    np.testing.assert_allclose(
        got, naive(q, kv, sinks, q_positions, kv_positions, None, 0.3), rtol=1e-4, atol=1e-5
    )


def agrees(backend: ModuleType, arguments, window: int | None, **options) -> None:
    options |= {"window": window, "sm_scale": 0.3, "interpret": True}
    got = computed(backend.attention, *as_arrays(*arguments), **options)
    np.testing.assert_allclose(got, naive(*arguments, window, 0.3), rtol=1e-4, atol=1e-5)


@settings(max_examples=5)
@given(
    st.integers(0, 2**32),
    st.integers(1, 2),
    st.integers(1, 20),
    st.integers(1, 90),
    st.integers(1, 2),
    st.integers(1, 4),
    st.sampled_from([16, 32, 64]),
    st.sampled_from([None, 1, 7, 128]),
)
def test_the_kernel_equals_a_naive_computation(
    seed, batch, length, keys, kv_heads, group, head_dim, window
) -> None:
    agrees(triton, case(seed, batch, length, keys, kv_heads, group, head_dim), window)


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("splits", [1, 3, 5])
def test_decode_split_over_the_keys(splits: int, window: int | None) -> None:
    arguments = case(splits, 2, 1, 75, 2, 3, 16)
    agrees(triton, arguments, window, config=triton.Config(1, 16, splits, 4, 1))


def chunk_over_a_cache():
    """Two sequences of different lengths, one with padding, in the order of their positions."""
    q, kv, sinks, _, _ = case(1, 2, 37, 90, 2, 2, 16)
    q_positions = np.stack([np.arange(37) + 53, np.where(np.arange(37) < 30, np.arange(37) + 10, -1)])
    kv_positions = np.stack([np.arange(90), np.where(np.arange(90) < 40, np.arange(90), -1)])
    return q, kv, sinks, q_positions, kv_positions


@pytest.mark.parametrize("window", [None, 9, 40])
def test_a_chunk_over_an_existing_cache_skips_what_it_cannot_see(window: int | None) -> None:
    arguments = chunk_over_a_cache()
    config = triton.Config(8, 16, 1, 4, 1)
    agrees(triton, arguments, window, config=config)
    blocks = triton._visible_blocks(*(jnp.asarray(x) for x in arguments[3:]), window, config)
    if window == 9:
        assert int(jnp.max(blocks[..., 1] - blocks[..., 0])) <= 3


@pytest.mark.parametrize("backend", ["triton"])
@pytest.mark.parametrize(("length", "page_size", "pages"), [(1, 4, 9), (1, 16, 3), (12, 8, 5), (33, 16, 4)])
def test_the_kernel_over_pages(backend: str, length: int, page_size: int, pages: int) -> None:
    keys, batch = page_size * pages, 2
    q, kv, sinks, _, _ = case(length, batch, length, keys, 2, 3, 16)
    rng = np.random.default_rng(length)
    starts = rng.integers(0, keys - length + 1, (batch, 1))
    q_positions = starts + np.arange(length)
    q_positions[1, length // 2 + 1 :] = -1
    table = rng.permutation(batch * pages + 2)[: batch * pages].reshape(batch, pages)
    kv_pages = np.full((batch * pages + 2, page_size, 2, 32), 1e3)
    kv_pages[table.reshape(-1)] = kv.reshape(batch * pages, page_size, 2, 32)
    arrays = as_arrays(q, kv_pages, sinks, q_positions, table)
    got = computed(paged_attention, *(arrays[i] for i in (0, 1, 4, 2, 3)), sm_scale=0.3, backend=backend)
    want = naive(q, kv, sinks, q_positions, np.tile(np.arange(keys), (batch, 1)), None, 0.3)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["triton"])
def test_the_kernel_in_bfloat16_is_no_worse_than_the_reference(backend: str) -> None:
    arguments = case(7, 2, 5, 60, 2, 4, 64)
    halves = [jnp.asarray(x, jnp.bfloat16) for x in arguments[:3]]
    exact = naive(*(np.asarray(x, np.float64) for x in halves), *arguments[3:], None, 0.125)
    positions = [jnp.asarray(x, jnp.int32) for x in arguments[3:]]

    def error(backend: str) -> float:
        got = computed(attention, *halves, *positions, window=None, sm_scale=0.125, backend=backend)
        return float(np.linalg.norm(np.asarray(got, np.float64) - exact) / np.linalg.norm(exact))

    assert error(backend) < 1.1 * error("reference")


def test_a_head_size_that_is_not_a_power_of_two_is_unsupported() -> None:
    with pytest.raises(NotImplementedError, match="head_dim"):
        agrees(triton, case(0, 1, 2, 3, 1, 1, 24), None)
