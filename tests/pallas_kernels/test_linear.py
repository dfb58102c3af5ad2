import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.linear import linear
from pallas_kernels.linear.triton import pieces


@pytest.mark.parametrize(("columns", "rows"), [(96, (40, 16, 17)), (2864, (7,)), (64, (5, 5))])
@pytest.mark.parametrize("norm", [False, True])
def test_the_kernel_equals_float64(columns: int, rows: tuple[int, ...], norm: bool) -> None:
    rng = np.random.default_rng(columns)
    x = rng.standard_normal((1, columns))
    weights = [rng.standard_normal((r, columns)) for r in rows]
    biases = [None, *(rng.standard_normal(r) for r in rows[1:])]
    scale = rng.standard_normal(columns)
    residual = rng.standard_normal((1, rows[0])) if len(set(rows)) == 1 else None
    normed = x / np.sqrt((x**2).mean() + 1e-5) * scale if norm else x
    wants = [normed @ w.T + (0 if b is None else b) for w, b in zip(weights, biases, strict=True)]
    wants = [want if residual is None else want + residual for want in wants]

    def array(value: np.ndarray | None) -> jnp.ndarray | None:
        return None if value is None else jnp.asarray(value, jnp.float32)

    for backend in ("triton", "reference"):
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


def test_rows_are_cut_into_powers_of_two() -> None:
    assert list(pieces(2880, 2048)) == [(0, 2048), (2048, 512), (2560, 256), (2816, 64)]
