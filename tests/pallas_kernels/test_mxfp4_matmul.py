import itertools
from collections.abc import Iterator
from functools import cache, partial
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call as gpu_interpreter
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractDevice, AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from gptoss_jax.model.mxfp4 import MXFP4Tensor, dequantize
from pallas_kernels.mxfp4_matmul import (
    expert_mlp,
    gpu_layout,
    mosaic_gpu,
    mosaic_tpu,
    tiles,
    tpu_layout,
    triton,
    triton_vector,
)
from pallas_kernels.mxfp4_matmul.reference import tiling
from pallas_kernels.tpu import Chip

LIMIT = 7.0

DTYPES = {
    "reference": jnp.float32,
    "triton": jnp.float32,
    "triton_vector": jnp.bfloat16,
    "mosaic_gpu": jnp.bfloat16,
    "mosaic_tpu": jnp.float32,
}
"""All backends, with the dtype of the tokens that shows most of each: float32 where it is covered."""


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


def prepared(arguments: dict, backend: str = "triton") -> dict:
    """The same experts in the backend's layout."""
    layout = tpu_layout if backend == "mosaic_tpu" else gpu_layout
    prepare = jax.jit(lambda gate_up, down: (layout.prepare(gate_up, 2), layout.prepare(down, 1)))
    gate_up, down = prepare(arguments["gate_up_EFD"], arguments["down_EDI"])
    return arguments | {"gate_up_EFD": gate_up, "down_EDI": down}


def computed(arguments: dict, **options: Any) -> jax.Array:
    """`expert_mlp` as one program: one operation at a time would be compiled anew for each shape."""
    return jax.jit(partial(expert_mlp, swiglu_limit=LIMIT, **options))(**arguments)


def relative_error(got: jax.Array, want: np.ndarray) -> float:
    return float(np.linalg.norm(np.asarray(got, np.float64) - want) / np.linalg.norm(want))


def expected(arguments: dict) -> np.ndarray:
    values = [jax.jit(dequantize)(a) if isinstance(a, MXFP4Tensor) else a for a in arguments.values()]
    return dense_mlp(*(np.asarray(v, np.float64 if v.dtype != jnp.int32 else np.int64) for v in values))


def agrees(backend: str, arguments: dict, absent: int) -> None:
    """A backend equals the dense computation; in bfloat16 it errs no more than the reference does.

    The expert `absent` is not here. `triton_vector` gets the first tokens, as many as it takes.
    """
    ids = arguments["expert_ids_Tk"]
    arguments |= {
        "x_TD": arguments["x_TD"].astype(DTYPES[backend]),
        "expert_ids_Tk": jnp.where(ids == absent, len(arguments["down_bias_ED"]) + 1, ids),
    }
    if backend == "triton_vector":
        most = triton_vector.MAX_ROWS // ids.shape[1]
        arguments |= {n: a[:most] for n, a in arguments.items() if n.endswith(("TD", "Tk"))}
    want = expected(arguments)
    got = computed(prepared(arguments, backend), backend=backend)
    if DTYPES[backend] == jnp.float32:
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=2e-3)
    elif np.any(want):
        plain = computed(arguments, backend="reference")
        assert relative_error(got, want) < 1.1 * relative_error(plain, want)
    else:
        assert not np.any(np.asarray(got, np.float32))


@pytest.mark.parametrize("ids", [0, 3, 4])
def test_all_tokens_on_one_expert_or_on_one_that_is_not_here(ids: int) -> None:
    arguments = case(0, 33, 4, 1) | {"expert_ids_Tk": jnp.full((33, 1), ids, jnp.int32)}
    got = computed(arguments)
    np.testing.assert_allclose(got, expected(arguments), rtol=1e-4, atol=2e-3)


def test_float_experts_give_the_same() -> None:
    arguments = case(5, 20, 5, 2)
    floats = {name: dequantize(a) if isinstance(a, MXFP4Tensor) else a for name, a in arguments.items()}
    packed = computed(arguments)
    np.testing.assert_allclose(computed(floats), packed, rtol=1e-6)


def test_a_token_does_not_depend_on_the_rest_of_the_batch() -> None:
    arguments = case(1, 64, 8, 2)
    whole = computed(arguments)
    part = {n: a[:7] if n.endswith(("TD", "Tk")) else a for n, a in arguments.items()}
    np.testing.assert_allclose(computed(part), whole[:7], rtol=1e-5, atol=1e-4)


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


@pytest.mark.parametrize("layout", [gpu_layout, tpu_layout], ids=["gpu", "tpu"])
@settings(max_examples=6)
@given(
    st.integers(0, 2**32),
    st.integers(1, 3),
    st.sampled_from([1, 5, 32, 65]),
    st.integers(1, 9),
    st.sampled_from([1, 2]),
)
def test_a_backend_s_layout_is_the_same_bits(
    layout: ModuleType, seed: int, experts: int, rows: int, groups: int, parts: int
) -> None:
    rng = np.random.default_rng(seed)
    packed = MXFP4Tensor(
        jnp.asarray(rng.integers(0, 256, (experts, rows * parts, groups, 16), dtype=np.uint8)),
        jnp.asarray(rng.integers(0, 129, (experts, rows * parts, groups), dtype=np.uint8)),
    )
    in_order = jax.jit(layout.prepare, static_argnums=1)(packed, parts)
    assert in_order.shape == packed.shape
    jax.tree.map(np.testing.assert_array_equal, jax.jit(layout.released)(in_order), packed)
    jax.tree.map(np.testing.assert_array_equal, in_order[experts - 1], packed[experts - 1])


@pytest.mark.parametrize("layout", [gpu_layout, tpu_layout], ids=["gpu", "tpu"])
def test_layouts_refuse_scales_that_overflow(layout: ModuleType) -> None:
    scales = jnp.full((1, 2, 1), layout.LARGEST_SCALE + 1, jnp.uint8)
    with pytest.raises(ValueError, match="scale"):
        layout.prepare(MXFP4Tensor(jnp.zeros((1, 2, 1, 16), jnp.uint8), scales), 1)


@pytest.mark.parametrize("float4", [False, True])
def test_tpu_kernels_unpack_every_byte_exactly(float4: bool) -> None:
    packed = np.arange(32 * 256, dtype=np.uint32).astype(np.uint8).reshape(32, 256)
    scales = np.random.default_rng(0).integers(90, 200, (2, 256), dtype=np.uint8)
    unpacking = mosaic_tpu.Unpacking(float4, by_bits=True)
    kernel = lambda x, s, out: out.__setitem__(  # noqa: E731
        ..., mosaic_tpu._unpack(x[...], mosaic_tpu._factors(s[...], unpacking), unpacking)
    )
    got = pl.pallas_call(kernel, jax.ShapeDtypeStruct((64, 256), jnp.bfloat16), interpret=True)(packed, scales)
    # The kernel's columns are rows of a released tensor.
    released = MXFP4Tensor(jnp.asarray(packed.T.reshape(256, 2, 16)), jnp.asarray(scales.T))
    np.testing.assert_array_equal(np.asarray(got, np.float32), dequantize(released).T)


def backends_and_cases() -> Iterator[Any]:
    """Each backend with each shape; long are all but a few where others show the same, or interpreting is slow."""
    cases = [(1, 5, 2, 96, 32), (3, 4, 2, 64, 96), (9, 9, 4, 160, 64), (40, 3, 2, 288, 160), (130, 2, 1, 64, 32)]
    few = {"reference": cases[:2], "triton_vector": cases[1:2], "mosaic_gpu": cases[:1]}
    for backend, shapes in itertools.product(DTYPES, cases):
        slow = shapes not in few.get(backend, cases)
        yield pytest.param(backend, *shapes, marks=pytest.mark.long if slow else ())


@pytest.mark.parametrize(("backend", "tokens", "experts", "k", "hidden", "inner"), list(backends_and_cases()))
def test_backends_equal_a_dense_computation(
    backend: str, tokens: int, experts: int, k: int, hidden: int, inner: int
) -> None:
    agrees(backend, case(tokens, tokens, experts, k, hidden, inner), absent=1)


@pytest.mark.parametrize(
    ("backend", "tokens"),
    [
        pytest.param("triton_vector", 3, marks=pytest.mark.slow),
        pytest.param("triton", 3, marks=pytest.mark.slow),
        ("triton", 40),
        pytest.param("mosaic_tpu", 3, marks=pytest.mark.slow),
        ("mosaic_tpu", 130),
        ("reference", 9),
    ],
)
def test_a_result_of_another_dtype_is_not_rounded_before(backend: str, tokens: int) -> None:
    arguments = prepared(case(tokens, tokens, 4, 2), backend)
    arguments = {n: a.astype(jnp.bfloat16) if n.startswith("x") else a for n, a in arguments.items()}
    arguments |= {"residual_TD": arguments["x_TD"]}
    whole, rounded = (computed(arguments, backend=backend, out_dtype=dtype) for dtype in (jnp.float32, None))
    assert (whole.dtype, rounded.dtype) == (jnp.float32, jnp.bfloat16)
    np.testing.assert_array_equal(whole.astype(jnp.bfloat16), rounded)
    assert bool(jnp.any(whole != rounded.astype(jnp.float32)))


@pytest.mark.parametrize(
    ("backend", "examples"),
    [
        ("reference", 6),
        ("triton", 2),
        ("triton_vector", 2),
        ("mosaic_tpu", 2),
        *(pytest.param(backend, 8, marks=pytest.mark.long) for backend in DTYPES),
    ],
)
def test_any_routing_equals_a_dense_computation(backend: str, examples: int) -> None:
    @settings(max_examples=examples)
    @given(
        st.integers(0, 2**32),
        st.integers(1, 70),
        st.integers(1, 9),
        st.integers(1, 4),
        st.integers(1, 5),
        st.integers(1, 5),
        st.integers(0, 9),
    )
    def check(seed: int, tokens: int, experts: int, k: int, hidden: int, inner: int, absent: int) -> None:
        agrees(backend, case(seed, tokens, experts, min(k, experts), 32 * hidden, 32 * inner), absent)

    check()


@pytest.mark.slow
@settings(max_examples=3)
@given(
    st.integers(0, 2**32),
    st.integers(1, 100),
    st.integers(1, 12),
    st.integers(1, 4),
    st.sampled_from([32, 96, 320]),
    st.sampled_from([32, 224, 288]),
    st.sampled_from([0, 64]),
)
def test_both_tpu_variants_on_any_routing(
    seed: int, tokens: int, experts: int, k: int, hidden: int, inner: int, most: int
) -> None:
    arguments = case(seed, tokens, experts, min(k, experts), hidden, inner)
    ids = arguments["expert_ids_Tk"]
    arguments |= {"expert_ids_Tk": jnp.where(ids == seed % 5, experts, ids)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mosaic_tpu, "MAX_TOKENS", most)
        got = computed(prepared(arguments, "mosaic_tpu"), backend="mosaic_tpu")
    np.testing.assert_allclose(got, expected(arguments), rtol=1e-4, atol=5e-3)


@pytest.mark.slow
def test_tpu_kernels_on_shards_that_devices_prepare() -> None:
    """Two experts a device, and of the intermediate dimension 96, which the layout pads."""
    arguments = case(3, 9, 4, 2, 96, 192)
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("expert", "tensor"))

    def part(x, ids, weights, gate_up, gate_up_bias, down, down_bias):
        expert, tensor = jax.lax.axis_index("expert"), jax.lax.axis_index("tensor")
        local = jnp.where(ids // 2 == expert, ids % 2, 2)
        down_bias = jnp.where(tensor == 0, down_bias, 0)
        gate_up, down = tpu_layout.prepare(gate_up, 2), tpu_layout.prepare(down, 1)
        rest = (gate_up, gate_up_bias, down, down_bias)
        y = expert_mlp(x, local, weights, *rest, swiglu_limit=LIMIT, backend="mosaic_tpu")
        return jax.lax.psum(y, ("expert", "tensor"))

    rows, columns = P("expert", "tensor"), P("expert", None, "tensor")
    specs = (P(), P(), P(), rows, rows, columns, P("expert"))
    mapped = jax.jit(jax.shard_map(part, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=False))
    np.testing.assert_allclose(mapped(*arguments.values()), expected(arguments), rtol=1e-4, atol=5e-3)


@pytest.mark.parametrize(("tokens", "cores"), [pytest.param(3, 1, marks=pytest.mark.slow), (3, 2), (70, 1)])
def test_tpu_kernels_do_not_race(tokens: int, cores: int) -> None:
    """Several blocks and chunks of both products, on the TPU interpreter, whose unwritten memory is NaN."""
    arguments = case(tokens, tokens, 3, 2, 96, 1088)
    got = mosaic_tpu.expert_mlp(
        **prepared(arguments, "mosaic_tpu"),
        swiglu_limit=LIMIT,
        residual_TD=None,
        out_dtype=None,
        interpret=pltpu.InterpretParams(detect_races=True, num_cores_or_threads=cores),
        chip=Chip(cores=cores),
    )
    np.testing.assert_allclose(got, expected(arguments), rtol=1e-4, atol=1e-2)
    assert not interpret_pallas_call.races.races_found


@pytest.mark.parametrize("backend", ["triton", "triton_vector", "mosaic_gpu", "mosaic_tpu"])
@pytest.mark.parametrize(
    ("tokens", "experts", "k", "hidden", "inner"),
    [(1, 5, 4, 96, 32), pytest.param(2, 6, 3, 576, 64, marks=pytest.mark.slow), (1, 3, 1, 64, 1952)],
)
def test_bfloat16_is_no_worse_than_the_reference(
    backend: str, tokens: int, experts: int, k: int, hidden: int, inner: int
) -> None:
    arguments, want, plain = case_in_bfloat16(tokens, experts, k, hidden, inner)
    got = computed(prepared(arguments, backend), backend=backend)
    assert relative_error(got, want) < 1.1 * plain


@cache
def case_in_bfloat16(tokens: int, experts: int, k: int, hidden: int, inner: int) -> tuple[dict, np.ndarray, float]:
    """Arguments, their result in float64, and how far off the reference is."""
    arguments = case(hidden, tokens, experts, k, hidden, inner)
    ids = arguments["expert_ids_Tk"]
    residual = jnp.asarray(np.random.default_rng(0).standard_normal((tokens, hidden)), jnp.bfloat16)
    arguments |= {
        "x_TD": arguments["x_TD"].astype(jnp.bfloat16),
        "expert_ids_Tk": jnp.where(ids == 1, experts, ids) if k > 1 else ids,
    }
    want = expected(arguments) + np.asarray(residual, np.float64)
    arguments |= {"residual_TD": residual}
    return arguments, want, relative_error(computed(arguments, backend="reference"), want)


@pytest.mark.parametrize("backend", ["triton", "mosaic_tpu"])
@pytest.mark.parametrize("ids", [0, 3, 4])
def test_kernels_with_all_tokens_on_one_expert_or_on_none(backend: str, ids: int) -> None:
    # More tokens than the few-token TPU kernel supports; the last tile is not full.
    arguments = case(0, 70, 4, 1) | {"expert_ids_Tk": jnp.full((70, 1), ids, jnp.int32)}
    got = computed(prepared(arguments, backend), backend=backend)
    np.testing.assert_allclose(got, expected(arguments), rtol=1e-4, atol=2e-3)


@pytest.mark.parametrize(
    ("ids", "hidden", "inner"),
    [
        # A full tile, one of more than half and one of less; outputs of several steps, and of one that is not full.
        ([0] * 130 + [2] * 70, 64, 224),
        # Contracting sizes that end or begin an iteration of blocks, with half a block or a whole one.
        pytest.param([1, 2], 3 * 128 + 64, 4 * 128, marks=pytest.mark.slow),
        ([3, 3], 64, 64),
    ],
)
def test_the_hopper_kernel_does_not_race(ids: list[int], hidden: int, inner: int) -> None:
    """On the GPU interpreter, whose unwritten memory is NaN and whose barriers must all be waited for."""
    arguments = case(0, len(ids), 3, 1, hidden, inner)
    arguments["x_TD"] = arguments["x_TD"].astype(jnp.bfloat16)
    arguments["expert_ids_Tk"] = jnp.asarray(ids, jnp.int32)[:, None]
    got = mosaic_gpu.expert_mlp(
        **prepared(arguments, "mosaic_gpu"),
        swiglu_limit=LIMIT,
        residual_TD=None,
        out_dtype=None,
        interpret=plgpu.InterpretGPUParams(detect_races=True),
    )
    assert not gpu_interpreter.get_races().races_found
    want = expected(arguments)
    if set(ids) == {3}:
        assert not np.any(np.asarray(got, np.float32))
    else:
        plain = computed(arguments, backend="reference")
        assert relative_error(got, want) < 1.1 * relative_error(plain, want)


def test_the_hopper_kernel_s_bits_are_those_of_the_layout() -> None:
    words = np.arange(1 << 16, dtype=np.uint32)
    two = words | words[::-1] << 16
    for j, (shift, mask, multiplier) in enumerate(mosaic_gpu.NIBBLES):
        bits = (two >> shift & mask) * np.uint32(multiplier) & mosaic_gpu.VALUE_BITS
        for half, own in ((bits & 0xFFFF, words), (bits >> 16, words[::-1])):
            nibble = own >> 4 * j & 15
            np.testing.assert_array_equal(half, (nibble & 7) << 6 | (nibble >> 3) << 15)


@pytest.mark.parametrize(
    ("kind", "cores"),
    [
        ("NVIDIA H100 80GB HBM3", 132),
        ("NVIDIA H100 PCIe", 114),
        ("NVIDIA GH200 480GB", 132),
        ("NVIDIA H200", 132),
        ("NVIDIA A100-SXM4-80GB", None),
        ("NVIDIA L40S", None),
        ("NVIDIA B200", None),
        ("NVIDIA GB200", None),
    ],
)
def test_only_hopper_gpus_run_the_hopper_kernel(kind: str, cores: int | None) -> None:
    device = AbstractDevice(device_kind=kind, num_cores=cores or 148, platform="gpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device)):
        if cores:
            assert mosaic_gpu.multiprocessors() == cores
        else:
            with pytest.raises(NotImplementedError, match="Hopper"):
                mosaic_gpu.multiprocessors()
    with pytest.raises(NotImplementedError, match="Hopper"):
        mosaic_gpu.multiprocessors()


@settings(max_examples=8)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=300))
def test_slots_of_tiles_hold_each_row_once(ids: list[int]) -> None:
    ids_R = jnp.asarray(ids, jnp.int32)
    cut = tiles.tiles_by_expert(ids_R, 5, mosaic_gpu.TILE_ROWS)
    row_S = np.asarray(mosaic_gpu.rows_of_slots(cut))
    assert len(set(row_S.tolist())) == len(row_S)
    held = row_S < len(ids)
    assert sorted(row_S[held]) == [row for row, expert in enumerate(ids) if expert < 5]
    expert_S = np.repeat(np.asarray(cut.expert_M), mosaic_gpu.TILE_ROWS)
    np.testing.assert_array_equal(expert_S[held], np.asarray(ids)[row_S[held]])


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


def test_the_kernels_name_what_they_do_not_support() -> None:
    arguments = case(0, 3, 4, 2)
    for backend in ("triton", "mosaic_gpu", "mosaic_tpu"):
        with pytest.raises(NotImplementedError, match="layout"):
            expert_mlp(**arguments, swiglu_limit=LIMIT, backend=backend)
        half = prepared(arguments, backend) | {"x_TD": arguments["x_TD"].astype(jnp.float16)}
        with pytest.raises(NotImplementedError, match="float16"):
            expert_mlp(**half, swiglu_limit=LIMIT, backend=backend)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("rows", [32, 96, 256, 1024, 4096, 32768])
def test_configs_cut_the_released_shapes_evenly(rows: int, dtype: DTypeLike) -> None:
    for config in triton.choose(rows, 32, dtype):
        assert config.weight_rows <= 128
        assert 8 <= config.tile_rows <= 128
