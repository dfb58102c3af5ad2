"""The kernels compiled for GPUs that are not here; needs jax-cuda13-plugin and -pjrt, and skips without them."""

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gptoss_jax.config import ModelConfig
from gptoss_jax.placement import partition_for
from gptoss_jax.planner.steps import decode_step
from gptoss_jax.planner.work import held_bytes
from pallas_kernels.attention import attention, paged_attention
from pallas_kernels.linear import linear
from pallas_kernels.mxfp4_matmul import expert_mlp
from pallas_kernels.mxfp4_matmul.gpu_layout import BLOCK, WORDS, GpuExperts
from pallas_kernels.rotary import rotate_and_keep
from pallas_kernels.routing import route
from sharding.topologies import parse_topology

pytestmark = pytest.mark.skipif(
    find_spec("jax_cuda13_plugin") is None, reason="jax-cuda13-plugin is not installed"
)
HIDDEN, HEADS, KV_HEADS, WIDTH = 2880, 64, 8, 64


KERNELS = ('custom_call_target="__gpu$xla.gpu.triton"', 'custom_call_target="mosaic_gpu_v2"')
CARDS = ["h100", *(pytest.param(card, marks=pytest.mark.slow) for card in ("a100", "l40", "b200"))]


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


@pytest.mark.parametrize("count", [32, 128])
@pytest.mark.parametrize("tokens", [1, 8, 64, 256, 8192])
def test_experts(card: Mesh, count: int, tokens: int) -> None:
    weights = (experts(count, 2), bfloat16(count, 2 * HIDDEN), experts(count, 1), bfloat16(count, HIDDEN))
    routing = int32(tokens, 4), jax.ShapeDtypeStruct((tokens, 4), jnp.float32)
    assert (
        kernels_in(partial(expert_mlp, swiglu_limit=7.0), card, bfloat16(tokens, HIDDEN), *routing, *weights) >= 2
    )


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


@pytest.mark.parametrize(
    ("batch", "length", "keys", "window"),
    [(1, 1, 128, 128), (1, 1, 131072, None), (256, 1, 1024, None), (1, 512, 640, 128), (1, 8192, 8192, None)],
)
def test_attention(card: Mesh, batch: int, length: int, keys: int, window: int | None) -> None:
    q, kv = bfloat16(batch, length, HEADS, WIDTH), bfloat16(batch, keys, KV_HEADS, 2 * WIDTH)
    function = partial(attention, window=window, sm_scale=0.125)
    assert kernels_in(function, card, q, kv, bfloat16(HEADS), int32(batch, length), int32(batch, keys)) >= 1


@pytest.mark.parametrize(
    ("batch", "length", "page_size", "pages"), [(1, 1, 16, 8192), (64, 1, 64, 32), (4, 512, 64, 128)]
)
def test_paged_attention(card: Mesh, batch: int, length: int, page_size: int, pages: int) -> None:
    q, kv = bfloat16(batch, length, HEADS, WIDTH), bfloat16(9000, page_size, KV_HEADS, 2 * WIDTH)
    shapes = (q, kv, int32(batch, pages), bfloat16(HEADS), int32(batch, length))
    assert kernels_in(partial(paged_attention, sm_scale=0.125), card, *shapes) >= 1


def test_a_token_s_small_ops(card: Mesh) -> None:
    rows = [HEADS * WIDTH, KV_HEADS * WIDTH, KV_HEADS * WIDTH]
    weights = [bfloat16(r, HIDDEN) for r in rows]
    biases = [bfloat16(r) for r in rows]
    normed = lambda x, ws, bs, norm: linear(x, ws, bs, norm_I=norm)  # noqa: E731
    assert kernels_in(normed, card, bfloat16(1, HIDDEN), weights, biases, bfloat16(HIDDEN)) == 1
    router = (bfloat16(1, HIDDEN), bfloat16(HIDDEN), bfloat16(128, HIDDEN), bfloat16(128))
    assert kernels_in(partial(route, k=4, eps=1e-5), card, *router) == 2
    turned = (*(bfloat16(2, 1, n, WIDTH) for n in (HEADS, KV_HEADS, KV_HEADS)), int32(2, 1))
    cache = (bfloat16(100, 64, KV_HEADS, 2 * WIDTH), int32(2, 1), int32(2, 1))
    frequencies = jax.ShapeDtypeStruct((WIDTH // 2,), jnp.float32)
    function = partial(rotate_and_keep, concentration=1.3, out_dtype=jnp.bfloat16)
    assert kernels_in(function, card, *turned, frequencies, *cache) == 1


def test_the_engine_s_decode_step(card: Mesh) -> None:
    """A sliding layer is 8 kernels and a full one 9, with the unembedding; nothing else touches the cache."""
    config = dataclasses.replace(
        ModelConfig(), num_hidden_layers=2, layer_types=("sliding_attention", "full_attention")
    )
    partition = partition_for(config, "data=1", None, card.devices.flat)
    assert partition.mesh is not None
    with jax.set_mesh(partition.mesh):
        step = decode_step(config, partition, 1, 1024)
        experts = step.structure.model(step.weights).layers[0].mlp.down_proj.get_value()
        assert isinstance(experts, GpuExperts)
        compiled = dataclasses.replace(step, kind=dataclasses.replace(step.kind, rounds=4)).lower().compile()
    assert (compiled.as_text() or "").count("__gpu$xla.gpu.triton") == 8 + 9 + 1
    # No room for a copy of the paged layer's keys and values.
    assert compiled.memory_analysis().temp_size_in_bytes < max(map(held_bytes, step.state.cache.stores))
