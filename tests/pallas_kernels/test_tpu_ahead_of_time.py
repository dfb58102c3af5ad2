"""The kernels compiled ahead of time for TPUs; skipped without libtpu."""

import re
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks import tpu_kernels as bench
from gptoss_jax.model.mxfp4 import GROUP, MXFP4Tensor
from pallas_kernels.attention import RaggedBatch, ragged_paged_attention
from pallas_kernels.mxfp4_matmul import expert_mlp, tpu_layout
from pallas_kernels.tpu import VMEM_LIMIT
from sharding.compiled.topologies import parse_topology

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("libtpu") is None, reason="libtpu is not installed"),
]
CASES = {case.name: case for case in bench.cases(["20b", "120b"])}
HIDDEN, HEADS, KV_HEADS, WIDTH = bench.HIDDEN, bench.HEADS, bench.KV_HEADS, bench.WIDTH
EXPERTS, TOKENS, PROMPT = 128, 64, 1024
ROWS = 256


@pytest.mark.parametrize("chip", bench.CHIPS)
@pytest.mark.parametrize("name", CASES)
def test_released_shapes(name: str, chip: str) -> None:
    memory = bench.vector_memory(bench.compiled(CASES[name], chip))
    assert len(memory) == (2 if name.endswith("2048 tokens") else 1)
    assert max(memory.values()) < VMEM_LIMIT


@pytest.mark.parametrize(
    "name", [name for name in CASES if re.search(r" (1|8|64) tokens|decode, (64|256|1 of 131072)", name)]
)
def test_decoding_copies_little_more_than_it_must(name: str) -> None:
    (copied,) = bench.copied_bytes(CASES[name]).values()
    assert copied < 1.05 * CASES[name].least_bytes


def sharded(mesh: Mesh, value: jax.ShapeDtypeStruct, spec: P) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=NamedSharding(mesh, spec))


def prepared(mesh: Mesh, rows: int, contracting: int, spec: P, transposed: P, parts: int) -> Any:
    """Weights [E, rows, contracting] of which each device prepares its own shard."""
    groups = contracting // GROUP
    packed = MXFP4Tensor(
        bench.shape(EXPERTS, rows, groups, GROUP // 2, dtype=jnp.uint8),  # type: ignore[arg-type]
        bench.shape(EXPERTS, rows, groups, dtype=jnp.uint8),  # type: ignore[arg-type]
    )
    prepare = jax.shard_map(
        partial(tpu_layout.prepare, parts=parts),
        mesh=mesh,
        in_specs=(spec,),
        out_specs=transposed,
        check_vma=False,
    )
    return jax.tree.map(lambda x: sharded(mesh, x, transposed), jax.eval_shape(prepare, packed))


def experts(mesh: Mesh, tokens: int) -> tuple[Callable[..., jax.Array], list[P], list[Any]]:
    tensor = mesh.shape["tensor"]
    inner = -(-HIDDEN // (GROUP * tensor)) * GROUP * tensor
    by_row, by_column = P("expert", "tensor", None), P("expert", None, "tensor")
    specs = [P("data", None)] * 3 + [by_column, P("expert", "tensor"), by_row, P("expert", None)]
    arrays = [
        bench.shape(tokens, HIDDEN),
        bench.shape(tokens, bench.TOP, dtype=jnp.int32),
        bench.shape(tokens, bench.TOP, dtype=jnp.float32),
        prepared(mesh, 2 * inner, HIDDEN, by_row, by_column, 2),
        bench.shape(EXPERTS, 2 * inner),
        prepared(mesh, HIDDEN, inner, by_column, by_row, 1),
        bench.shape(EXPERTS, HIDDEN),
    ]
    return partial(expert_mlp, swiglu_limit=7.0), specs, arrays


def ragged(mesh: Mesh, tokens: int, sequences: int, page: int, entries: int, **options: Any) -> Any:
    """Each data-parallel rank's own sequences and pages."""
    data, kv_heads = mesh.shape["data"], max(KV_HEADS, mesh.shape["tensor"])
    specs = [P("data", "tensor"), P("data", None, "tensor"), P("data"), *[P("data")] * 4, P("tensor")]
    arrays = [
        bench.shape(data * tokens, HEADS, WIDTH),
        bench.shape(data * 64, page, kv_heads, 2 * WIDTH),
        bench.shape(data * ROWS, entries, dtype=jnp.int32),
        *(bench.shape(data * sequences, dtype=jnp.int32) for _ in range(4)),
        bench.shape(HEADS),
    ]
    return partial(over_pages, sm_scale=0.125, **options), specs, arrays


def over_pages(q: jax.Array, kv: jax.Array, *rest: jax.Array, **options: Any) -> jax.Array:
    return ragged_paged_attention(q, kv, RaggedBatch(*rest[:-1]), rest[-1], **options)


def reduced(op: Callable[..., jax.Array], *arguments: Any) -> jax.Array:
    return jax.lax.psum(op(*arguments), ("expert", "tensor"))


@pytest.mark.parametrize(
    ("topology", "data", "expert", "tensor"),
    [
        pytest.param("v5e:2x2", 1, 1, 4, marks=pytest.mark.long),
        pytest.param("v5e:2x4", 1, 1, 8, marks=pytest.mark.long),
        ("v5e:2x4", 1, 8, 1),
        ("v5e:4x8", 2, 1, 16),
        pytest.param("v6e:2x2", 1, 1, 4, marks=pytest.mark.long),
        ("v6e:4x4", 2, 1, 8),
        pytest.param("v6e:4x4", 1, 1, 16, marks=pytest.mark.long),
        ("v5p:2x2x2", 1, 1, 8),
        ("tpu7x:2x2x1", 1, 1, 8),
        ("tpu7x:2x2x1", 1, 4, 2),
    ],
)
def test_inside_shard_map(topology: str, data: int, expert: int, tensor: int) -> None:
    """Each device's shard of 120b, with the meshes of docs/planner.md's table and of the README."""
    devices = np.array(parse_topology(topology).devices()).reshape(data, expert, tensor)
    mesh = Mesh(devices, ("data", "expert", "tensor"), axis_types=(AxisType.Auto,) * 3)
    for op, specs, arrays in (
        experts(mesh, data * TOKENS),
        experts(mesh, data * PROMPT),
        ragged(mesh, 64, 64, 32, 4096, window=None, max_queries=1),
        ragged(mesh, 64, 64, 32, 70, window=128, max_queries=1),
        ragged(mesh, PROMPT, 64, 32, 4096, window=None),
        ragged(mesh, PROMPT, 64, 128, 18, window=128),
    ):
        out_spec = P("data", "tensor")
        if op.func is expert_mlp:
            op, out_spec = partial(reduced, op), P("data", None)
        mapped = jax.shard_map(op, mesh=mesh, in_specs=tuple(specs), out_specs=out_spec, check_vma=False)
        arguments = [
            jax.tree.map(lambda x, spec=spec: x if x.sharding else sharded(mesh, x, spec), array)
            for spec, array in zip(specs, arrays, strict=True)
        ]
        memory = bench.vector_memory(jax.jit(mapped).lower(*arguments).compile().as_text())
        assert memory
        assert max(memory.values()) < VMEM_LIMIT
