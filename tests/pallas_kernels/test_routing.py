import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.routing import route

EXAMPLES = pytest.mark.parametrize("examples", [3, pytest.param(15, marks=pytest.mark.long)])


def kernel_equals_reference(seed: int, tokens: int, experts: int, k: int, hidden: int) -> None:
    rng = np.random.default_rng(seed)
    x, norm, weight, bias = (
        jnp.asarray(rng.standard_normal(shape), jnp.float32)
        for shape in ((tokens, hidden), (hidden,), (experts, hidden), (experts,))
    )
    normed, ids, weights = route(x, norm, weight, bias, k=k, eps=1e-5, backend="triton")
    want_normed, want_ids, want_weights = route(x, norm, weight, bias, k=k, eps=1e-5, backend="reference")
    np.testing.assert_allclose(normed, want_normed, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(ids, want_ids)
    np.testing.assert_allclose(weights, want_weights, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(("tokens", "experts", "k", "hidden"), [(1, 32, 4, 96), (5, 5, 3, 48), (3, 128, 4, 2880)])
def test_the_kernel_equals_the_reference(tokens: int, experts: int, k: int, hidden: int) -> None:
    kernel_equals_reference(experts, tokens, experts, k, hidden)


@EXAMPLES
def test_any_shape_equals_the_reference(examples: int) -> None:
    @settings(max_examples=examples)
    @given(st.integers(0, 2**32), st.integers(1, 70), st.integers(1, 40), st.integers(1, 8), st.integers(1, 40))
    def check(seed: int, tokens: int, experts: int, k: int, hidden: int) -> None:
        kernel_equals_reference(seed, tokens, experts, min(k, experts), 16 * hidden)

    check()


def test_of_equal_logits_the_first_expert_wins() -> None:
    x, zeros = jnp.ones((1, 16)), jnp.zeros((6, 16))
    _, ids, weights = route(x, jnp.ones(16), zeros, jnp.zeros(6), k=3, eps=1e-5, backend="triton")
    np.testing.assert_array_equal(ids, [[0, 1, 2]])
    np.testing.assert_allclose(weights, np.full((1, 3), 1 / 3), rtol=1e-6)
