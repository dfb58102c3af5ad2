import logging

import jax
import jax.numpy as jnp
import pytest

import pallas_kernels
from pallas_kernels import backend
from pallas_kernels.backend import Backend, dispatch

PLAIN, PICKY, INTERPRETED = 0, 1, 2
traced = []


def plain(x: jax.Array, scale: float = 1.0, shift: jax.Array | None = None) -> jax.Array:
    return jnp.int32(PLAIN)


def picky(x: jax.Array, interpret: bool, scale: float = 1.0, shift: jax.Array | None = None) -> jax.Array:
    if x.ndim != 1:
        raise NotImplementedError("only vectors")
    traced.append(scale)
    return jnp.int32(INTERPRETED if interpret else PICKY)


BACKENDS = (Backend("picky", frozenset({"cuda"}), picky),)


def test_the_platform_selects_the_backend() -> None:
    x = jnp.zeros(3)
    assert dispatch("op", BACKENDS, plain, x) == PLAIN
    with pallas_kernels.platform("cuda"):
        assert pallas_kernels.current_platform() == "cuda"
        assert dispatch("op", BACKENDS, plain, x) == PICKY
        assert dispatch("op", BACKENDS, plain, x, backend="reference") == PLAIN
    assert pallas_kernels.current_platform() == "cpu"


def test_layers_of_equal_shapes_trace_a_kernel_once() -> None:
    def layers(x: jax.Array, y: jax.Array) -> jax.Array:
        same = [dispatch("op", BACKENDS, plain, at, scale=2.0, shift=at) for at in (x, y, x + y)]
        return sum(same, dispatch("op", BACKENDS, plain, x, scale=3.0))

    traced.clear()
    with pallas_kernels.platform("cuda"):
        assert jax.jit(layers)(jnp.zeros(5), jnp.ones(5)) == 4 * PICKY
    assert sorted(traced) == [2.0, 3.0]


def test_a_fallback_on_an_accelerator_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    backend._warned.clear()
    with pallas_kernels.platform("cuda"), caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert dispatch("op", BACKENDS, plain, jnp.zeros((2, 3))) == PLAIN
    [record] = caplog.records
    assert "op" in record.message
    assert "only vectors" in record.message
    assert "float32[2, 3]" in record.message


def test_a_backend_can_be_forced_for_one_call_or_for_all() -> None:
    x = jnp.zeros(3)
    assert dispatch("op", BACKENDS, plain, x, backend="picky") == INTERPRETED
    with pallas_kernels.use_backend("picky"):
        assert dispatch("op", BACKENDS, plain, x) == INTERPRETED
        with pallas_kernels.use_backend("reference"):
            assert dispatch("op", BACKENDS, plain, x) == PLAIN
        with pytest.raises(NotImplementedError):
            dispatch("op", BACKENDS, plain, jnp.zeros((2, 3)))
    with pallas_kernels.use_backend("of another op"):
        assert dispatch("op", BACKENDS, plain, x) == PLAIN
    with pytest.raises(ValueError, match="picky"):
        dispatch("op", BACKENDS, plain, x, backend="unknown")
