"""Collectives and memory of real programs on a CPU mesh, and of the HLO syntax of other platforms."""

import json
import os
import subprocess
import sys

import pytest

from sharding.compiled.program import array_bytes, read_collectives

MESH = {"data": 2, "expert": 2, "tensor": 2}

PROGRAMS = """
import json, sys
import jax, jax.numpy as jnp
import numpy as np
from functools import partial
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from sharding.compiled.program import ProgramMemory, read_collectives

mesh = Mesh(np.asarray(jax.devices()).reshape(2, 2, 2), ("data", "expert", "tensor"))

def program(function, shape=(64, 128), spec=P(), out=P(), donate=()):
    mapped = jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=out, check_vma=False)
    x = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
    return jax.jit(mapped, donate_argnums=donate).lower(x).compile()

def loop(x):
    return lax.fori_loop(0, 5, lambda i, x: lax.psum(x * 0.5, "tensor"), x)

def branch(x):
    return lax.cond(x[0, 0] > 0, lambda x: lax.psum(x, "data"), lambda x: x, x)

programs = {
    "all-reduce": program(lambda x: lax.psum(x, "tensor")),
    "two axes": program(lambda x: lax.psum(x, ("expert", "tensor"))),
    "outer axes": program(lambda x: lax.psum(x, ("data", "tensor"))),
    "all-gather": program(lambda x: lax.all_gather(x, "expert", tiled=True), spec=P("expert"), out=P()),
    "reduce-scatter": program(lambda x: lax.psum_scatter(x, "data", tiled=True), out=P("data")),
    "all-to-all": program(
        lambda x: lax.all_to_all(x, "tensor", 1, 0, tiled=True), spec=P("tensor"), out=P(None, "tensor")
    ),
    "permute": program(lambda x: lax.ppermute(x, "tensor", [(0, 1), (1, 0)]), spec=P("tensor"), out=P("tensor")),
    "loop": program(loop),
    "branch": program(branch),
    "nothing": program(lambda x: x + 1, donate=0),
}
result = {}
for name, compiled in programs.items():
    found = read_collectives(compiled.as_text(), mesh.shape)
    memory = ProgramMemory.of(compiled)
    result[name] = {
        "collectives": [[c.op, list(c.axes), list(c.group), c.conditional, c.count, c.num_bytes] for c in found],
        "memory": [memory.arguments, memory.outputs, memory.reused, memory.total],
    }
print(json.dumps(result))
"""

WHOLE = 64 * 128 * 4


@pytest.fixture(scope="module")
def programs() -> dict[str, dict[str, list]]:
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    run = subprocess.run(
        [sys.executable, "-c", PROGRAMS], env=environment, capture_output=True, text=True, check=True
    )
    return json.loads(run.stdout)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("all-reduce", ["all-reduce", ["tensor"], [0, 1], False, 1, WHOLE]),
        ("two axes", ["all-reduce", ["expert", "tensor"], [0, 1, 2, 3], False, 1, WHOLE]),
        ("outer axes", ["all-reduce", ["data", "tensor"], [0, 1, 4, 5], False, 1, WHOLE]),
        ("all-gather", ["all-gather", ["expert"], [0, 2], False, 1, WHOLE]),
        ("reduce-scatter", ["reduce-scatter", ["data"], [0, 4], False, 1, WHOLE]),
        ("all-to-all", ["all-to-all", ["tensor"], [0, 1], False, 1, WHOLE // 2]),
        ("permute", ["collective-permute", ["tensor"], [0, 1], False, 1, WHOLE // 2]),
        ("loop", ["all-reduce", ["tensor"], [0, 1], False, 5, 5 * WHOLE]),
        ("branch", ["all-reduce", ["data"], [0, 4], True, 1, WHOLE]),
    ],
)
def test_real_programs(programs: dict[str, dict[str, list]], name: str, expected: list) -> None:
    assert programs[name]["collectives"] == [expected]


def test_memory_counts_a_donated_argument_once(programs: dict[str, dict[str, list]]) -> None:
    assert programs["nothing"]["collectives"] == []
    arguments, outputs, reused, total = programs["nothing"]["memory"]
    assert (arguments, outputs, reused) == (WHOLE, WHOLE, WHOLE)
    assert WHOLE <= total < 2 * WHOLE


def read(attributes: str, shape: str = "f32[8,4]{1,0}", op: str = "all-reduce") -> list[tuple]:
    text = f"ENTRY %main (a: f32[8,4]) -> f32[8,4] {{\n  ROOT %x = {shape} {op}(%a), {attributes}\n}}\n"
    return [(c.op, c.axes, c.group, c.count, c.num_bytes) for c in read_collectives(text, MESH)]


@pytest.mark.parametrize(
    ("attributes", "axes", "group"),
    [
        ("replica_groups={{0,2},{1,3},{4,6},{5,7}}", ("expert",), (0, 2)),
        ("replica_groups=[4,2]<=[8]", ("tensor",), (0, 1)),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", ("data",), (0, 4)),
        (
            "replica_groups=mesh['data'=2,'expert'=2,'tensor'=2] {'data','tensor'}",
            ("data", "tensor"),
            (0, 1, 4, 5),
        ),
        ("replica_groups=mesh['axis_0'=8] {'axis_0'}", ("data", "expert", "tensor"), tuple(range(8))),
        ("replica_groups=mesh['a'=2,'b'=4] {'b':(2)2}", ("tensor",), (0, 1)),
        ("replica_groups=mesh['a'=2,'b'=4] {'b':(1)2}", ("expert",), (0, 2)),
        ("replica_groups={}", ("data", "expert", "tensor"), tuple(range(8))),
    ],
)
def test_syntaxes_of_groups(attributes: str, axes: tuple, group: tuple) -> None:
    assert read(attributes + ", use_global_device_ids=true") == [("all-reduce", axes, group, 1, 128)]


def test_group_of_one_device_is_not_a_collective() -> None:
    assert read("replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}") == []


def test_asynchronous_starts_count_their_result() -> None:
    shape = "((f32[4,4]{1,0}), f32[8,4]{0,1:T(8,128)S(1)})"
    expected = [("all-gather", ("tensor",), (0, 1), 1, 128)]
    assert read("replica_groups=[4,2]<=[8], dimensions={0}", shape, "all-gather-start") == expected
    assert read("replica_groups=[4,2]<=[8]", shape, "all-gather-done") == []


@pytest.mark.parametrize(
    ("shape", "size"),
    [("f32[3,5]{1,0}", 60), ("bf16[]", 2), ("(pred[7]{0}, u8[2,2])", 11), ("s4[9]{0}", 5), ("f8e4m3fn[16]", 16)],
)
def test_sizes_of_shapes(shape: str, size: int) -> None:
    assert array_bytes(shape) == size
