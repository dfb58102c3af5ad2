import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptoss_jax.model.mxfp4 import GROUP, MXFP4Tensor, dequantize, quantize


def independent_dequantize(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Decoded with ml_dtypes' float4 and float64 powers of two."""
    nibbles = np.stack([blocks & 0xF, blocks >> 4], axis=-1).reshape(*scales.shape, GROUP)
    values = nibbles.view(ml_dtypes.float4_e2m1fn).astype(np.float64)
    return (values * 2.0 ** (scales.astype(np.float64) - 127)[..., None]).reshape(*scales.shape[:-1], -1)


def random_packed(seed: int, low: int, high: int) -> MXFP4Tensor:
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (3, 4, 2, 16), dtype=np.uint8)
    return MXFP4Tensor(jnp.asarray(blocks), jnp.asarray(rng.integers(low, high, (3, 4, 2), dtype=np.uint8)))


def test_every_nibble_and_every_normal_scale_is_exact() -> None:
    blocks = np.arange(256, dtype=np.uint8).reshape(16, 1, 16)
    for scale in range(2, 252):
        scales = np.full((16, 1), scale, np.uint8)
        got = dequantize(MXFP4Tensor(jnp.asarray(blocks), jnp.asarray(scales)))
        np.testing.assert_array_equal(np.asarray(got, np.float64), independent_dequantize(blocks, scales))


def test_the_low_nibble_is_the_even_index() -> None:
    blocks = jnp.zeros((1, 16), jnp.uint8).at[0, 0].set(0x71)
    values = dequantize(MXFP4Tensor(blocks, jnp.full((1,), 128, jnp.uint8)))
    assert values[:3].tolist() == [1.0, 12.0, 0.0]


@given(st.integers(0, 2**32 - 1))
def test_bfloat16_is_exact(seed: int) -> None:
    packed = random_packed(seed, 90, 160)
    exact = np.asarray(dequantize(packed, jnp.float32))
    np.testing.assert_array_equal(np.asarray(dequantize(packed, jnp.bfloat16)).astype(np.float32), exact)


@given(st.integers(0, 2**32 - 1))
def test_packed_values_survive_packing(seed: int) -> None:
    packed = random_packed(seed, 10, 240)
    values = dequantize(packed)
    np.testing.assert_array_equal(np.asarray(dequantize(quantize(values))), np.asarray(values))


@given(st.integers(0, 2**32 - 1), st.floats(-60, 60))
def test_quantize_rounds_to_the_nearest_value(seed: int, size: float) -> None:
    values = np.random.default_rng(seed).standard_normal((4, 64)).astype(np.float32) * np.float32(2.0**size)
    packed = quantize(jnp.asarray(values))
    scale = 2.0 ** (np.asarray(packed.scales, np.float64) - 127)[..., None]
    groups = values.reshape(4, 2, GROUP).astype(np.float64)
    largest = np.abs(groups).max(-1, keepdims=True)
    np.testing.assert_array_equal(scale, 2.0 ** (np.floor(np.log2(largest)) - 2))
    representable = np.concatenate(
        [np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float64)]
    )
    nearest = np.abs(groups[..., None] - representable * scale[..., None]).min(-1)
    got = np.asarray(dequantize(packed), np.float64).reshape(groups.shape)
    np.testing.assert_allclose(np.abs(got - groups), nearest, rtol=1e-6)


def test_quantize_of_zeros_is_zero() -> None:
    assert not np.asarray(dequantize(quantize(jnp.zeros((2, 32))))).any()


def test_quantize_rejects_incomplete_groups() -> None:
    with pytest.raises(ValueError, match="multiple of 32"):
        quantize(jnp.zeros((2, 48)))
