"""The kernels compiled ahead of time for GPUs; skipped without jax-cuda13-plugin and jax-cuda13-pjrt."""

import dataclasses
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from gptoss_jax.engine.step import Structure
from gptoss_jax.model.config import ModelConfig
from gptoss_jax.model.placement import partition_for
from gptoss_jax.planner.steps import abstract_model, decode_step
from gptoss_jax.planner.work import held_bytes
from pallas_kernels import backend
from pallas_kernels.attention import RaggedBatch, attention, ragged_paged_attention
from pallas_kernels.linear import linear
from pallas_kernels.mxfp4_matmul import expert_mlp
from pallas_kernels.mxfp4_matmul.gpu_layout import BLOCK, WORDS, GpuExperts
from pallas_kernels.rotary import rotate_and_store
from pallas_kernels.routing import route
from sharding.compiled.topologies import parse_topology

pytestmark = pytest.mark.skipif(
    find_spec("jax_cuda13_plugin") is None, reason="jax-cuda13-plugin is not installed"
)
HIDDEN, HEADS, KV_HEADS, WIDTH = 2880, 64, 8, 64
ROOT = Path(__file__).parents[2]


KERNELS = ('custom_call_target="__gpu$xla.gpu.triton"', 'custom_call_target="mosaic_gpu_v2"')
SLOW = pytest.mark.slow
CARDS = [
    "h100",
    pytest.param("a100", marks=SLOW),
    *(pytest.param(card, marks=pytest.mark.long) for card in ("l40", "b200")),
]


@pytest.fixture(scope="module", params=CARDS)
def card(request: pytest.FixtureRequest) -> Iterator[Mesh]:
    mesh = Mesh(np.array(parse_topology(f"{request.param}:1x1x1").devices()), ("x",))
    with jax.set_mesh(mesh):
        yield mesh


def compiled(function: Callable[..., Any], mesh: Mesh, *shapes: Any) -> str:
    """The program compiled for the target."""
    everywhere = NamedSharding(mesh, PartitionSpec())
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), shapes)
    return jax.jit(function).lower(*shapes).compile().as_text() or ""


def kernels_in(function: Callable[..., Any], mesh: Mesh, *shapes: Any) -> int:
    """How many Pallas kernels the program compiled for the target has."""
    text = compiled(function, mesh, *shapes)
    return sum(text.count(name) for name in KERNELS)


def bfloat16(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16)


def int32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def experts(count: int, parts: int) -> GpuExperts:
    shape = (count, parts, -(-HIDDEN // BLOCK), HIDDEN)
    words = jax.ShapeDtypeStruct((*shape, WORDS), jnp.uint16)
    return GpuExperts(words, jax.ShapeDtypeStruct(shape, jnp.uint32), HIDDEN)  # type: ignore[arg-type]


def experts_kernels(card: Mesh, count: int, tokens: int, dtype: DTypeLike) -> int:
    """How many kernels an expert step of tokens of a dtype has."""

    def floats(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    weights = (experts(count, 2), floats(count, 2 * HIDDEN), experts(count, 1), floats(count, HIDDEN))
    routing = int32(tokens, 4), jax.ShapeDtypeStruct((tokens, 4), jnp.float32)
    return kernels_in(partial(expert_mlp, swiglu_limit=7.0), card, floats(tokens, HIDDEN), *routing, *weights)


@pytest.mark.parametrize("count", [32, 128])
@pytest.mark.parametrize("tokens", [1, 8, 64, 256, 8192, *(pytest.param(n, marks=SLOW) for n in (512, 1024))])
def test_experts(card: Mesh, count: int, tokens: int) -> None:
    assert experts_kernels(card, count, tokens, jnp.bfloat16) >= 2


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [1, 64, 256, 1024])
def test_experts_of_float32_tokens(card: Mesh, tokens: int) -> None:
    assert experts_kernels(card, 32, tokens, jnp.float32) == 2


@pytest.mark.parametrize(("tokens", "inner", "many"), [(8192, 2880, True), (2048, 1440, True), (256, 2880, False)])
def test_many_rows_an_expert_run_the_hopper_kernel(card: Mesh, tokens: int, inner: int, many: bool) -> None:
    """On a Hopper GPU alone, also with the half of the intermediate dimension that one of two devices holds."""

    def packed(parts: int, rows: int, contracting: int) -> GpuExperts:
        shape = (32, parts, -(-contracting // BLOCK), rows)
        words = jax.ShapeDtypeStruct((*shape, WORDS), jnp.uint16)
        return GpuExperts(words, jax.ShapeDtypeStruct(shape, jnp.uint32), contracting)  # type: ignore[arg-type]

    weights = (packed(2, inner, HIDDEN), bfloat16(32, 2 * inner), packed(1, HIDDEN, inner), bfloat16(32, HIDDEN))
    routing = int32(tokens, 4), jax.ShapeDtypeStruct((tokens, 4), jnp.float32)
    text = compiled(partial(expert_mlp, swiglu_limit=7.0), card, bfloat16(tokens, HIDDEN), *routing, *weights)
    hopper = "H100" in card.devices.flat[0].device_kind
    assert text.count(KERNELS[1]) == (2 if hopper and many else 0)


def ragged(sequences: int, table: int = 4096) -> RaggedBatch:
    """The shapes of a layout over the engine's page tables."""
    return RaggedBatch(int32(256, table), *(int32(sequences) for _ in range(4)))


@pytest.mark.parametrize("window", [None, 128])
@pytest.mark.parametrize(
    ("sequences", "tokens", "most", "kernels"),
    [
        (1, 1, 1, 2),
        (64, 64, 1, 2),
        (256, 256, 1, 2),
        (64, 256, 4, 2),
        (1, 2048, None, 3),
        (256, 2048, None, 3),
        pytest.param(64, 256, None, 3, marks=SLOW),
        pytest.param(1, 8192, None, 3, marks=SLOW),
    ],
)
def test_attention(
    card: Mesh, sequences: int, tokens: int, most: int | None, kernels: int, window: int | None
) -> None:
    """The kernels for few and for many queries, and one that joins parts of long sequences, which windows are not."""
    shapes = (bfloat16(tokens, HEADS, WIDTH), bfloat16(9000, 32, KV_HEADS, 2 * WIDTH))
    function = partial(ragged_paged_attention, window=window, sm_scale=0.125, max_queries=most)
    found = kernels_in(function, card, *shapes, ragged(sequences), bfloat16(HEADS))
    assert found == kernels - (window is not None)


@pytest.mark.parametrize(("batch", "length"), [(1, 1000), pytest.param(4, 8192, marks=SLOW)])
def test_attention_of_whole_sequences(card: Mesh, batch: int, length: int) -> None:
    shapes = (bfloat16(batch, length, HEADS, WIDTH), bfloat16(batch, length, KV_HEADS, 2 * WIDTH), bfloat16(HEADS))
    assert kernels_in(partial(attention, window=128, sm_scale=0.125), card, *shapes) == 2


@pytest.mark.parametrize(
    ("tokens", "cache", "length"),
    [
        (jnp.bfloat16, jnp.float8_e4m3fn, 1),
        pytest.param(jnp.bfloat16, jnp.float8_e4m3fn, 512, marks=SLOW),
        pytest.param(jnp.bfloat16, jnp.float32, 1, marks=SLOW),
        pytest.param(jnp.bfloat16, jnp.float32, 512, marks=SLOW),
        pytest.param(jnp.float32, jnp.float32, 1, marks=SLOW),
        pytest.param(jnp.float32, jnp.float32, 512, marks=SLOW),
        pytest.param(jnp.float32, jnp.bfloat16, 512, marks=pytest.mark.long),
        pytest.param(jnp.float32, jnp.float8_e4m3fn, 1, marks=SLOW),
    ],
)
def test_caches_of_other_dtypes(
    card: Mesh, tokens: DTypeLike, cache: DTypeLike, length: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Ampere cannot convert float8: its ops fall back to the reference, and each logs a warning."""
    q, k = (jax.ShapeDtypeStruct((2 * length, heads, WIDTH), tokens) for heads in (HEADS, KV_HEADS))
    pages = jax.ShapeDtypeStruct((100, 64, KV_HEADS, 2 * WIDTH), cache)
    sinks, at = jax.ShapeDtypeStruct((HEADS,), tokens), int32(2 * length)
    frequencies = jax.ShapeDtypeStruct((WIDTH // 2,), jnp.float32)
    attend = partial(ragged_paged_attention, window=None, sm_scale=0.125, max_queries=length)
    rotated = partial(rotate_and_store, concentration=1.3, out_dtype=tokens)
    backend._warned.clear()
    found = [
        kernels_in(attend, card, q, pages, ragged(2, 32), sinks),
        kernels_in(rotated, card, q, k, k, at, frequencies, pages, at, at),
    ]
    said = [record.args[0] for record in caplog.records if record.name == backend.__name__]  # type: ignore[index]
    if cache == jnp.float8_e4m3fn and "A100" in card.devices.flat[0].device_kind:
        assert found == [0, 0]
        assert said == ["ragged_paged_attention", "rotate_and_store"]
    else:
        assert found == [2 if length == 1 else 3, 1]
        assert not said


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_a_token_s_small_ops(card: Mesh, dtype: DTypeLike) -> None:
    def floats(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    rows = [HEADS * WIDTH, KV_HEADS * WIDTH, KV_HEADS * WIDTH]
    weights = [floats(r, HIDDEN) for r in rows]
    biases = [floats(r) for r in rows]
    normed = lambda x, ws, bs, norm: linear(x, ws, bs, norm_I=norm)  # noqa: E731
    assert kernels_in(normed, card, floats(1, HIDDEN), weights, biases, floats(HIDDEN)) == 1
    router = (floats(1, HIDDEN), floats(HIDDEN), floats(128, HIDDEN), floats(128))
    assert kernels_in(partial(route, k=4, eps=1e-5), card, *router) == 2
    turned = (*(floats(2, n, WIDTH) for n in (HEADS, KV_HEADS, KV_HEADS)), int32(2))
    cache = (floats(100, 64, KV_HEADS, 2 * WIDTH), int32(2), int32(2))
    frequencies = jax.ShapeDtypeStruct((WIDTH // 2,), jnp.float32)
    function = partial(rotate_and_store, concentration=1.3, out_dtype=dtype)
    assert kernels_in(function, card, *turned, frequencies, *cache) == 1


def test_the_engine_s_decode_step(card: Mesh) -> None:
    """A sliding layer is 8 kernels and a full one 9, with the unembedding; nothing else touches the cache."""
    config = dataclasses.replace(
        ModelConfig(), num_hidden_layers=2, layer_types=("sliding_attention", "full_attention")
    )
    partition = partition_for(config, "data=1", None, card.devices.flat)
    assert partition.mesh is not None
    with jax.set_mesh(partition.mesh):
        [program] = decode_step(config, partition, 1, 1024, 2048).programs
        structure, (weights, state, _) = program.run.args[0], program.held
        assert isinstance(structure.model(weights).layers[0].mlp.down_proj.get_value(), GpuExperts)
        several = partial(program.run.func, structure, dataclasses.replace(program.shape, steps=4))
        compiled = dataclasses.replace(program, run=several).lower().compile()
    assert (compiled.as_text() or "").count("__gpu$xla.gpu.triton") == 8 + 9 + 1
    # No room for a copy of the paged layer's keys and values.
    assert compiled.memory_analysis().temp_size_in_bytes < max(map(held_bytes, state.cache.stores))


def add_in_bfloat16(y_ND: jax.Array, residual: jax.Array) -> jax.Array:
    return y_ND.astype(residual.dtype).reshape(residual.shape) + residual


@pytest.mark.parametrize(
    ("mesh", "rounds"), [("tensor=4", False), ("tensor=4", True), ("expert=2,tensor=2", False)]
)
def test_sums_over_a_mesh_do_not_round_the_residual_stream(
    mesh: str, rounds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On one device XLA keeps it in float32 between ops of many tokens; so it must where they are summed over devices.

    `add_residual` converts to bfloat16 itself, outside of any op, and XLA leaves those conversions out.
    """
    if rounds:
        monkeypatch.setattr("sharding.partition.add_residual", add_in_bfloat16)
        monkeypatch.setattr("sharding.experts.add_residual", add_in_bfloat16)
    layers = ("sliding_attention", "full_attention")
    config = dataclasses.replace(ModelConfig(), num_hidden_layers=len(layers), layer_types=layers)
    partition = partition_for(config, mesh, None, parse_topology("h100:1x1x4").devices())
    assert partition.mesh is not None
    with jax.set_mesh(partition.mesh):
        structure, weights = Structure.of(abstract_model(config, partition, jnp.bfloat16))
        tokens = jax.ShapeDtypeStruct((8, 32), jnp.int32, sharding=NamedSharding(partition.mesh, PartitionSpec()))
        text = jax.jit(lambda weights, x: structure.model(weights)(x)).lower(weights, tokens).compile().as_text()
    outside = rf"= bf16\[\S*,{HIDDEN}\]\S* convert\(.*shard_map/convert_element_type"
    assert bool(re.search(outside, text or "")) == rounds


EARLY_STARTS = """
import sys
from functools import partial
from sharding.compiled.topologies import parse_topology, prepare_environment
prepare_environment()
import jax, jax.numpy as jnp
from gptoss_jax.model.weights import WeightSpec, _draw
from gptoss_jax.runtime.xla_options import in_order
from pallas_kernels import platform
place = jax.sharding.SingleDeviceSharding(parse_topology("h100:1x1x1").devices()[0])
key = jax.eval_shape(partial(jax.random.key, impl="rbg"), 0).dtype
arguments = [jax.ShapeDtypeStruct((), dtype, sharding=place) for dtype in (key, jnp.uint32)]
draw = partial(_draw, spec=WeightSpec("q_proj", (256, 128), (None, None)), dtype=jnp.bfloat16, whole=None)
with platform("cuda"):
    options = in_order(None) if sys.argv[1] == "in order" else None
    jax.jit(draw, compiler_options=options).lower(*arguments).compile()
"""


@pytest.mark.parametrize(("order", "early"), [("in order", False), ("as XLA does", True)])
def test_kernels_that_start_early_wait(order: str, early: bool, tmp_path: Path) -> None:
    """What lets them start early is an instruction to wait; where that is no more, `in_order` can go, too."""
    environment = os.environ | {
        "XLA_FLAGS": f"--xla_dump_to={tmp_path} --xla_dump_emitter_re=.*",
        "JAX_ENABLE_COMPILATION_CACHE": "false",
    }
    command = [sys.executable, "-c", EARLY_STARTS, order]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True, timeout=300)
    kernels = [path.read_text() for path in tmp_path.glob("*.ptx")]
    assert len(kernels) > 2
    assert ["griddepcontrol.wait" in kernel for kernel in kernels] == [early] * len(kernels)
