import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pallas_kernels.attention import attention, paged_attention, reference


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
    got = attention(*as_arrays(*arguments), window=window, sm_scale=0.3)
    np.testing.assert_allclose(got, naive(*arguments, window, 0.3), rtol=1e-4, atol=1e-5)


def test_blocks_of_queries_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = case(3, 2, 17, 29, 2, 2, 16)
    whole = attention(*as_arrays(*arguments), window=5, sm_scale=0.25)
    monkeypatch.setattr(reference, "MAX_SCORES", 5 * 2 * 4 * 29)
    np.testing.assert_allclose(attention(*as_arrays(*arguments), window=5, sm_scale=0.25), whole, atol=1e-6)


def test_padding_gives_zero() -> None:
    q, kv, sinks, q_positions, kv_positions = case(0, 1, 4, 8, 1, 2, 16)
    got = attention(
        *as_arrays(q, kv, sinks, np.full_like(q_positions, -1), kv_positions), window=None, sm_scale=1.0
    )
    assert not np.asarray(got).any()


@given(st.integers(0, 2**32), st.integers(1, 3), st.integers(1, 9), st.sampled_from([2, 8]), st.integers(1, 4))
def test_pages_are_the_sequence_in_pieces(seed, batch, length, page_size, pages) -> None:
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
    got = paged_attention(arrays[0], arrays[1], arrays[4], arrays[2], arrays[3], sm_scale=0.3)
    np.testing.assert_allclose(
        got, naive(q, kv, sinks, q_positions, kv_positions, None, 0.3), rtol=1e-4, atol=1e-5
    )
