import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.rotary import rotate_and_keep


@pytest.mark.parametrize(("batch", "kv_heads", "group", "head_dim", "slots"), [(1, 1, 8, 64, 8), (3, 2, 3, 16, 5)])
def test_the_kernel_equals_the_reference(batch: int, kv_heads: int, group: int, head_dim: int, slots: int) -> None:
    rng = np.random.default_rng(batch)

    def draw(*shape: int) -> jnp.ndarray:
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    arguments = (
        draw(batch, 1, kv_heads * group, head_dim),
        draw(batch, 1, kv_heads, head_dim),
        draw(batch, 1, kv_heads, head_dim),
        jnp.asarray(rng.integers(0, 131072, (batch, 1)), jnp.int32)
        .at[batch // 2]
        .set(-1 if batch > 1 else 131071),
        jnp.asarray(150000.0 ** -(np.arange(head_dim // 2) / (head_dim // 2)), jnp.float32),
        draw(4, slots, kv_heads, 2 * head_dim),
        jnp.asarray(rng.permutation(4)[:batch, None] + (np.arange(batch)[:, None] == 1) * 4, jnp.int32),
        jnp.asarray(rng.integers(0, slots, (batch, 1)), jnp.int32),
    )
    options = {"concentration": 1.3, "out_dtype": jnp.float32}
    got = rotate_and_keep(*arguments, **options, backend="triton")
    want = rotate_and_keep(*arguments, **options, backend="reference")
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


def test_a_page_past_the_last_keeps_a_token_out() -> None:
    x = jnp.ones((1, 2, 1, 16))
    pages, slots = jnp.asarray([[1, 2]], jnp.int32), jnp.asarray([[3, 0]], jnp.int32)
    _, kv = rotate_and_keep(
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
