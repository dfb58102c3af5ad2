import logging

import jax
import jax.numpy as jnp
import pytest

import pallas_kernels
from pallas_kernels import backend
from pallas_kernels.backend import Backend, dispatch


def plain(x: jax.Array) -> str:
    return "plain"


def picky(x: jax.Array, interpret: bool) -> str:
    if x.ndim != 1:
        raise NotImplementedError("only vectors")
    return f"picky {interpret}"


BACKENDS = (Backend("picky", frozenset({"cuda"}), picky),)


def test_the_platform_picks() -> None:
    x = jnp.zeros(3)
    assert dispatch("op", BACKENDS, plain, x) == "plain"
    with pallas_kernels.platform("cuda"):
        assert pallas_kernels.current_platform() == "cuda"
        assert dispatch("op", BACKENDS, plain, x) == "picky False"
        assert dispatch("op", BACKENDS, plain, x, backend="reference") == "plain"
    assert pallas_kernels.current_platform() == "cpu"


def test_a_fall_back_on_an_accelerator_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    backend._told.clear()
    with pallas_kernels.platform("cuda"), caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert dispatch("op", BACKENDS, plain, jnp.zeros((2, 3))) == "plain"
    [record] = caplog.records
    assert "op" in record.message
    assert "only vectors" in record.message
    assert "float32[2, 3]" in record.message


def test_a_backend_can_be_forced_for_one_call_or_for_all() -> None:
    x = jnp.zeros(3)
    assert dispatch("op", BACKENDS, plain, x, backend="picky") == "picky True"
    with pallas_kernels.use_backend("picky"):
        assert dispatch("op", BACKENDS, plain, x) == "picky True"
        with pallas_kernels.use_backend("reference"):
            assert dispatch("op", BACKENDS, plain, x) == "plain"
        with pytest.raises(NotImplementedError):
            dispatch("op", BACKENDS, plain, jnp.zeros((2, 3)))
    with pallas_kernels.use_backend("of another op"):
        assert dispatch("op", BACKENDS, plain, x) == "plain"
    with pytest.raises(ValueError, match="picky"):
        dispatch("op", BACKENDS, plain, x, backend="unknown")
