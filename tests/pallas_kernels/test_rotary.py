import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.rotary import rotate_and_store

EXAMPLES = pytest.mark.parametrize("examples", [3, pytest.param(15, marks=pytest.mark.long)])


def kernel_equals_reference(
    seed: int, positions: np.ndarray, pages: np.ndarray, slots: np.ndarray, kv_pages: jnp.ndarray, group: int
) -> None:
    """Of tokens at `positions` [T], kept in `slots` of `pages` of the cache `kv_pages`."""
    rng = np.random.default_rng(seed)
    kv_heads, head_dim = kv_pages.shape[2], kv_pages.shape[3] // 2
    arguments = (
        *(
            jnp.asarray(rng.standard_normal((*positions.shape, heads, head_dim)), jnp.float32)
            for heads in (kv_heads * group, kv_heads, kv_heads)
        ),
        jnp.asarray(positions, jnp.int32),
        jnp.asarray(150000.0 ** -(np.arange(head_dim // 2) / (head_dim // 2)), jnp.float32),
        kv_pages,
        jnp.asarray(pages, jnp.int32),
        jnp.asarray(slots, jnp.int32),
    )
    options = {"concentration": 1.3, "out_dtype": jnp.float32}
    got = rotate_and_store(*arguments, **options, backend="triton")
    want = rotate_and_store(*arguments, **options, backend="reference")
    for x, y in zip(got, want, strict=True):
        assert x.dtype == y.dtype
        # Values that differ in their last bits may round to neighbours in the cache's dtype.
        kind = jnp.finfo(y.dtype)
        rtol, atol = (max(1e-5, float(step)) for step in (kind.eps, kind.smallest_subnormal))
        np.testing.assert_allclose(x.astype(jnp.float32), y.astype(jnp.float32), rtol=rtol, atol=atol)


@pytest.mark.parametrize(
    ("tokens", "kv_heads", "group", "head_dim", "slots"), [(1, 1, 8, 64, 8), (3, 2, 3, 16, 5)]
)
def test_the_kernel_equals_the_reference(
    tokens: int, kv_heads: int, group: int, head_dim: int, slots: int
) -> None:
    rng = np.random.default_rng(tokens)
    positions = rng.integers(0, 131072, tokens)
    positions[tokens // 2] = -1 if tokens > 1 else 131071
    pages = rng.permutation(4)[:tokens] + (np.arange(tokens) == 1) * 4
    kv_pages = jnp.asarray(rng.standard_normal((4, slots, kv_heads, 2 * head_dim)), jnp.float32)
    kernel_equals_reference(tokens, positions, pages, rng.integers(0, slots, tokens), kv_pages, group)


@EXAMPLES
def test_any_shape_and_place_equal_the_reference(examples: int) -> None:
    """Some tokens go to pages past the last; no two share a slot."""

    @settings(max_examples=examples)
    @given(
        st.integers(0, 2**32),
        st.sampled_from([1, 2, 3, 4, 12]),
        st.integers(1, 3),
        st.integers(1, 4),
        st.sampled_from([2, 16, 32, 64]),
        st.integers(1, 5),
        st.integers(1, 7),
        st.sampled_from([jnp.float32, jnp.bfloat16, jnp.float8_e4m3fn]),
    )
    def check(
        seed: int,
        tokens: int,
        kv_heads: int,
        group: int,
        head_dim: int,
        pages: int,
        slots: int,
        dtype: jnp.dtype,
    ) -> None:
        rng = np.random.default_rng(seed)
        place = rng.permutation(max(2 * pages * slots, tokens))[:tokens]
        positions = rng.integers(-1, 131072, tokens)
        kv_pages = jnp.asarray(rng.standard_normal((pages, slots, kv_heads, 2 * head_dim)), dtype)
        kernel_equals_reference(seed, positions, place // slots, place % slots, kv_pages, group)

    check()


def test_a_token_with_a_page_past_the_last_is_not_stored() -> None:
    x = jnp.ones((2, 1, 16))
    pages, slots = jnp.asarray([1, 2], jnp.int32), jnp.asarray([3, 0], jnp.int32)
    _, kv = rotate_and_store(
        x,
        x,
        x,
        slots,
        jnp.zeros(8),
        jnp.zeros((2, 4, 1, 32)),
        pages,
        slots,
        concentration=1.0,
        out_dtype=jnp.float32,
    )
    assert float(kv[1, 3].sum()) == float(kv.sum()) == 32
