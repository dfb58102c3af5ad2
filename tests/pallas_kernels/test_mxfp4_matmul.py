import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptoss_jax.mxfp4 import MXFP4Tensor, dequantize
from pallas_kernels.mxfp4_matmul import expert_mlp, gpu_layout, tiles, tpu_layout, triton
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


def prepared(arguments: dict) -> dict:
    """The same experts in the GPU kernels' layout."""
    return arguments | {
        "gate_up_EFD": gpu_layout.prepare(arguments["gate_up_EFD"], 2),
        "down_EDI": gpu_layout.prepare(arguments["down_EDI"], 1),
    }


def relative_error(got: jax.Array, want: np.ndarray) -> float:
    return float(np.linalg.norm(np.asarray(got, np.float64) - want) / np.linalg.norm(want))


def expected(arguments: dict) -> np.ndarray:
    values = [dequantize(a) if isinstance(a, MXFP4Tensor) else a for a in arguments.values()]
    return dense_mlp(*(np.asarray(v, np.float64 if v.dtype != jnp.int32 else np.int64) for v in values))


@settings(max_examples=8)
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


@settings(max_examples=6)
@given(
    st.integers(0, 2**32),
    st.integers(1, 3),
    st.sampled_from([1, 5, 32]),
    st.integers(1, 9),
    st.sampled_from([1, 2]),
)
def test_the_gpu_layout_is_the_same_bits(seed: int, experts: int, rows: int, groups: int, parts: int) -> None:
    rng = np.random.default_rng(seed)
    packed = MXFP4Tensor(
        jnp.asarray(rng.integers(0, 256, (experts, rows * parts, groups, 16), dtype=np.uint8)),
        jnp.asarray(rng.integers(0, 129, (experts, rows * parts, groups), dtype=np.uint8)),
    )
    experts_in_blocks = gpu_layout.prepare(packed, parts)
    assert experts_in_blocks.shape == packed.shape
    jax.tree.map(np.testing.assert_array_equal, gpu_layout.released(experts_in_blocks), packed)
    jax.tree.map(np.testing.assert_array_equal, experts_in_blocks[experts - 1], packed[experts - 1])


def test_the_gpu_layout_refuses_scales_that_overflow() -> None:
    packed = MXFP4Tensor(jnp.zeros((1, 2, 1, 16), jnp.uint8), jnp.full((1, 2, 1), 129, jnp.uint8))
    with pytest.raises(ValueError, match="scale"):
        gpu_layout.prepare(packed, 1)


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize(
    ("tokens", "experts", "k", "hidden", "inner"),
    [(1, 5, 2, 96, 32), (3, 4, 2, 64, 96), (9, 9, 4, 160, 64), (40, 3, 2, 288, 160), (130, 2, 1, 64, 32)],
)
def test_backends_equal_a_dense_computation(
    backend: str, tokens: int, experts: int, k: int, hidden: int, inner: int
) -> None:
    arguments = case(tokens, tokens, experts, k, hidden, inner)
    ids = arguments["expert_ids_Tk"]
    arguments |= {"expert_ids_Tk": jnp.where(ids == 1, experts + 1, ids)}
    got = expert_mlp(**prepared(arguments), swiglu_limit=LIMIT, backend=backend)
    np.testing.assert_allclose(got, expected(arguments), rtol=1e-4, atol=2e-3)


@settings(max_examples=2)
@given(st.integers(0, 2**32), st.integers(1, 60), st.integers(1, 9), st.integers(1, 4))
def test_sorted_tiles_equal_a_dense_computation(seed: int, tokens: int, experts: int, k: int) -> None:
    arguments = case(seed, tokens, experts, min(k, experts))
    got = expert_mlp(**prepared(arguments), swiglu_limit=LIMIT, backend="triton")
    np.testing.assert_allclose(got, expected(arguments), rtol=1e-4, atol=2e-3)


@pytest.mark.parametrize("backend", ["triton", "triton_vector"])
@pytest.mark.parametrize(
    ("tokens", "experts", "k", "hidden", "inner"), [(1, 5, 4, 96, 32), (2, 6, 3, 576, 64), (1, 3, 1, 64, 1952)]
)
def test_bfloat16_is_no_worse_than_the_reference(
    backend: str, tokens: int, experts: int, k: int, hidden: int, inner: int
) -> None:
    arguments = case(hidden, tokens, experts, k, hidden, inner)
    ids = arguments["expert_ids_Tk"]
    residual = jnp.asarray(np.random.default_rng(0).standard_normal((tokens, hidden)), jnp.bfloat16)
    arguments |= {
        "x_TD": arguments["x_TD"].astype(jnp.bfloat16),
        "expert_ids_Tk": jnp.where(ids == 1, experts, ids) if k > 1 else ids,
    }
    want = expected(arguments) + np.asarray(residual, np.float64)
    options = {"swiglu_limit": LIMIT, "residual_TD": residual}
    plain = relative_error(expert_mlp(**arguments, **options, backend="reference"), want)
    assert relative_error(expert_mlp(**prepared(arguments), **options, backend=backend), want) < 1.1 * plain


@pytest.mark.parametrize("ids", [0, 3, 4])
def test_kernels_with_all_tokens_on_one_expert_or_on_none(ids: int) -> None:
    arguments = case(0, 33, 4, 1) | {"expert_ids_Tk": jnp.full((33, 1), ids, jnp.int32)}
    got = expert_mlp(**prepared(arguments), swiglu_limit=LIMIT, backend="triton")
    np.testing.assert_allclose(got, expected(arguments), rtol=1e-4, atol=2e-3)


@given(st.lists(st.integers(0, 6), min_size=1, max_size=60), st.sampled_from([1, 4, 16]))
def test_tiles_by_expert_hold_each_row_once(ids: list[int], tile_rows: int) -> None:
    num_experts = 5
    cut = tiles.tiles_by_expert(jnp.asarray(ids, jnp.int32), num_experts, tile_rows)
    rows, experts, starts, counts = (np.asarray(x) for x in jax.tree.leaves(cut))
    seen = []
    for expert, start, count in zip(experts, starts, counts, strict=True):
        own = rows[start : start + max(count, 0)].tolist()
        assert len(own) <= tile_rows
        assert all(ids[row] == expert for row in own)
        seen += own
    assert sorted(seen) == [row for row, expert in enumerate(ids) if expert < num_experts]


def test_many_rows_are_sorted_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 9, 300), jnp.int32)
    compared = tiles.tiles_by_expert(ids, 8, 16)
    monkeypatch.setattr(tiles, "COMPARED_ROWS", 10)
    jax.tree.map(np.testing.assert_array_equal, tiles.tiles_by_expert(ids, 8, 16), compared)


def test_what_the_kernels_do_not_cover_is_said() -> None:
    arguments = case(0, 3, 4, 2)
    with pytest.raises(NotImplementedError, match="layout"):
        expert_mlp(**arguments, swiglu_limit=LIMIT, backend="triton")
    half = prepared(arguments) | {"x_TD": arguments["x_TD"].astype(jnp.float16)}
    with pytest.raises(NotImplementedError, match="float16"):
        expert_mlp(**half, swiglu_limit=LIMIT, backend="triton")


@pytest.mark.parametrize("rows", [32, 96, 256, 1024, 4096, 32768])
def test_configs_cut_the_released_shapes_evenly(rows: int) -> None:
    for config in triton.choose(rows, 32):
        assert config.weight_rows <= 128
        assert 8 <= config.tile_rows <= 128
