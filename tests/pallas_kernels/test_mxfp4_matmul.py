import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptoss_jax.mxfp4 import MXFP4Tensor, dequantize
from pallas_kernels.mxfp4_matmul import expert_mlp
from pallas_kernels.mxfp4_matmul.reference import tiling

LIMIT = 7.0


def dense_mlp(x, ids, weights, gate_up, gate_up_bias, down, down_bias):
    """Token by token and choice by choice in float64."""
    out = np.zeros(x.shape)
    for t, k in np.ndindex(ids.shape):
        e = ids[t, k]
        if e >= len(gate_up):
            continue
        h = gate_up[e] @ x[t] + gate_up_bias[e]
        gate, up = np.minimum(h[0::2], LIMIT), np.clip(h[1::2], -LIMIT, LIMIT)
        out[t] += weights[t, k] * (down[e] @ (gate / (1 + np.exp(-1.702 * gate)) * (up + 1)) + down_bias[e])
    return out


def case(seed: int, tokens: int, experts: int, k: int, hidden: int = 64, inner: int = 32) -> dict:
    rng = np.random.default_rng(seed)

    def packed(rows: int, columns: int) -> MXFP4Tensor:
        return MXFP4Tensor(
            jnp.asarray(rng.integers(0, 256, (experts, rows, columns // 32, 16), dtype=np.uint8)),
            jnp.asarray(rng.integers(121, 125, (experts, rows, columns // 32), dtype=np.uint8)),
        )

    return {
        "x_TD": jnp.asarray(rng.standard_normal((tokens, hidden)), jnp.float32),
        "expert_ids_Tk": jnp.asarray(
            rng.permuted(np.tile(np.arange(experts), (tokens, 1)), axis=1)[:, :k], jnp.int32
        ),
        "expert_weights_Tk": jnp.asarray(rng.random((tokens, k)), jnp.float32),
        "gate_up_EFD": packed(2 * inner, hidden),
        "gate_up_bias_EF": jnp.asarray(rng.standard_normal((experts, 2 * inner)), jnp.float32),
        "down_EDI": packed(hidden, inner),
        "down_bias_ED": jnp.asarray(rng.standard_normal((experts, hidden)), jnp.float32),
    }


def expected(arguments: dict) -> np.ndarray:
    values = [dequantize(a) if isinstance(a, MXFP4Tensor) else a for a in arguments.values()]
    return dense_mlp(*(np.asarray(v, np.float64 if v.dtype != jnp.int32 else np.int64) for v in values))


@given(st.integers(0, 2**32), st.integers(1, 70), st.integers(1, 9), st.integers(1, 4))
def test_equals_a_dense_computation(seed: int, tokens: int, experts: int, k: int) -> None:
    arguments = case(seed, tokens, experts, min(k, experts))
    got = expert_mlp(**arguments, swiglu_limit=LIMIT)
    np.testing.assert_allclose(got, expected(arguments), rtol=1e-4, atol=2e-3)


@pytest.mark.parametrize("ids", [0, 3, 4])
def test_all_tokens_on_one_expert_or_on_one_that_is_not_here(ids: int) -> None:
    arguments = case(0, 33, 4, 1) | {"expert_ids_Tk": jnp.full((33, 1), ids, jnp.int32)}
    got = expert_mlp(**arguments, swiglu_limit=LIMIT)
    np.testing.assert_allclose(got, expected(arguments), rtol=1e-4, atol=2e-3)


def test_float_experts_give_the_same() -> None:
    arguments = case(5, 20, 5, 2)
    floats = {name: dequantize(a) if isinstance(a, MXFP4Tensor) else a for name, a in arguments.items()}
    packed = expert_mlp(**arguments, swiglu_limit=LIMIT)
    np.testing.assert_allclose(expert_mlp(**floats, swiglu_limit=LIMIT), packed, rtol=1e-6)


def test_a_token_does_not_depend_on_the_rest_of_the_batch() -> None:
    arguments = case(1, 64, 8, 2)
    whole = expert_mlp(**arguments, swiglu_limit=LIMIT)
    part = {n: a[:7] if n.endswith(("TD", "Tk")) else a for n, a in arguments.items()}
    np.testing.assert_allclose(expert_mlp(**part, swiglu_limit=LIMIT), whole[:7], rtol=1e-5, atol=1e-4)


@given(st.lists(st.integers(0, 40), min_size=1, max_size=12))
def test_tiles_hold_any_routing(counts: list[int]) -> None:
    rows = sum(counts)
    if rows:
        tile_rows, tiles = tiling(rows, len(counts))
        assert sum(-(-count // tile_rows) for count in counts) <= tiles


def test_no_unpacked_copy_of_all_experts_exists() -> None:
    """The compiled program's temporaries stay far under the float size of the experts."""
    arguments = jax.eval_shape(lambda: case(0, 4, 64, 2, 256, 256))
    compiled = jax.jit(lambda a: expert_mlp(**a, swiglu_limit=LIMIT)).lower(arguments).compile()
    one_expert = 3 * 256 * 256 * 4
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * one_expert
