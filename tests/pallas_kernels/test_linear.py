import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.linear import linear
from pallas_kernels.linear.triton import pieces

BACKENDS = ("triton", "reference")
EXAMPLES = pytest.mark.parametrize("examples", [3, pytest.param(15, marks=pytest.mark.long)])


def array(value: np.ndarray | None) -> jnp.ndarray | None:
    return None if value is None else jnp.asarray(value, jnp.float32)


def backends_equal_float64(
    seed: int, tokens: int, columns: int, rows: tuple[int, ...], biased: tuple[bool, ...], norm: bool, added: bool
) -> None:
    """`added` asks for a residual, which fits only where all weights have as many rows."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((tokens, columns))
    weights = [rng.standard_normal((r, columns)) for r in rows]
    biases = [rng.standard_normal(r) if here else None for r, here in zip(rows, biased, strict=True)]
    scale = rng.standard_normal(columns)
    residual = rng.standard_normal((tokens, rows[0])) if added and len(set(rows)) == 1 else None
    normed = x / np.sqrt((x**2).mean(axis=1, keepdims=True) + 1e-5) * scale if norm else x
    wants = [normed @ w.T + (0 if b is None else b) for w, b in zip(weights, biases, strict=True)]
    wants = [want if residual is None else want + residual for want in wants]
    for backend in BACKENDS:
        gots = linear(
            array(x),
            [array(w) for w in weights],
            [array(b) for b in biases],
            norm_I=array(scale) if norm else None,
            residual_TO=array(residual),
            backend=backend,
        )
        for got, want in zip(gots, wants, strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("columns", "rows"), [(96, (40, 16, 17)), (2864, (7,)), (64, (5, 5))])
@pytest.mark.parametrize("norm", [False, True])
def test_the_kernel_equals_float64(columns: int, rows: tuple[int, ...], norm: bool) -> None:
    biased = tuple(i > 0 for i in range(len(rows)))
    backends_equal_float64(columns, 1, columns, rows, biased, norm, added=True)


@EXAMPLES
def test_any_shape_equals_float64(examples: int) -> None:
    @settings(max_examples=examples)
    @given(
        st.integers(0, 2**32),
        st.sampled_from([1, 1, 1, 5]),
        st.integers(1, 300).map(lambda n: 16 * n),
        st.lists(st.tuples(st.integers(1, 40), st.booleans()), min_size=1, max_size=3),
        st.booleans(),
        st.booleans(),
    )
    def check(
        seed: int, tokens: int, columns: int, weights: list[tuple[int, bool]], norm: bool, added: bool
    ) -> None:
        rows, biased = zip(*weights, strict=True)
        backends_equal_float64(seed, tokens, columns, rows, biased, norm, added)

    check()


def test_rows_are_split_into_powers_of_two() -> None:
    assert list(pieces(2880, 2048)) == [(0, 2048), (2048, 512), (2560, 256), (2816, 64)]
