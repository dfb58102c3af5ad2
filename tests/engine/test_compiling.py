"""XLA options for GPUs, which no test can run on, and Python's garbage collector during compilation."""

import dataclasses
import gc
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from gptoss_jax.checkpoints.loading import random_model
from gptoss_jax.engine import compiling, runner
from gptoss_jax.engine.compiling import collected_once, compiler_options, graphs_collectives
from gptoss_jax.engine.engine import Engine
from gptoss_jax.engine.options import EngineOptions
from gptoss_jax.engine.pace import Pace
from gptoss_jax.engine.runner import program_options
from gptoss_jax.engine.step import StepShape
from gptoss_jax.model.placement import _preparation
from gptoss_jax.runtime import xla_options
from gptoss_jax.runtime.xla_options import in_order
from gptoss_jax.types import SamplingParams
from pallas_kernels import current_platform, platform, use_backend
from pallas_kernels.backend import forced_backend
from pallas_kernels.mxfp4_matmul import current_layout
from sharding import arrays, make_mesh
from tests.engine.schedules import TINY


def graphed(*, collectives: bool) -> set[str]:
    with platform("cuda"):
        options = compiler_options(None, collectives=collectives)
    assert options
    found = options["xla_gpu_enable_command_buffer"]
    assert isinstance(found, str)
    return set(found.split(","))


def test_graphs_have_loops_or_collectives() -> None:
    alone, talking = graphed(collectives=False), graphed(collectives=True)
    assert alone - talking == {"WHILE"}
    assert talking - alone == {"COLLECTIVES"}
    assert compiler_options(None, collectives=True) is None, "a CPU has no graphs"


@pytest.mark.parametrize("collectives", [False, True])
def test_no_kernel_of_a_step_starts_early(collectives: bool) -> None:
    with platform("cuda"):
        options = compiler_options(None, collectives=collectives)
    assert options
    assert options["xla_gpu_enable_pdl"] is False


def test_options_are_those_of_the_mesh_and_not_of_the_default_device() -> None:
    device = AbstractDevice("NVIDIA H100 80GB HBM3", num_cores=None, platform="gpu")
    gpus = AbstractMesh((2,), ("tensor",), abstract_device=device)
    assert in_order(None) is None
    assert in_order(gpus) == {"xla_gpu_enable_pdl": False}
    options = compiler_options(gpus, collectives=True)
    assert options
    assert options["xla_gpu_experimental_use_collective_kernels"] == ""


def test_collectives_are_in_graphs_of_several_nvidia_gpus() -> None:
    mesh = make_mesh("tensor=2")
    assert not graphs_collectives(mesh)
    with platform("cuda"):
        assert graphs_collectives(mesh)
        assert not graphs_collectives(make_mesh("data=1"))
        assert not graphs_collectives(None)


@pytest.mark.parametrize(
    ("shape", "graphed"),
    [
        (StepShape(4, 4, steps=4), True),
        (StepShape(0, 16), True),
        (StepShape(64, 0), True),
        (StepShape(2048, 0), False),
        (StepShape(4, 4, steps=4, features="cuts"), False),
        (StepShape(0, 16, features="all"), False),
    ],
)
def test_collectives_are_in_graphs_of_programs_without_loops_that_repeat(shape: StepShape, graphed: bool) -> None:
    with platform("cuda"):
        options = program_options(make_mesh("tensor=2"), shape)
        alone = program_options(None, shape)
    assert options is not None
    assert ("COLLECTIVES" in str(options["xla_gpu_enable_command_buffer"])) == graphed
    assert ("WHILE" in str(options["xla_gpu_enable_command_buffer"])) != graphed
    assert alone is not None
    assert "WHILE" in str(alone["xla_gpu_enable_command_buffer"])


@pytest.mark.parametrize(
    ("platform_name", "max_num_seqs", "tokens", "most"),
    [
        ("gpu", 256, None, 24),
        ("tpu", 256, None, 24),
        ("cpu", 8, None, 6),
        ("cpu", 1, None, 6),
    ],
)
def test_a_deployment_needs_few_programs(
    platform_name: str, max_num_seqs: int, tokens: int | None, most: int
) -> None:
    pace = Pace.of(platform_name, None, tokens, None, max_num_seqs)
    # One program updates page tables; rows are sampled with top-k and top-p or without.
    count = 1 + len(pace.token_sizes) + (1 + pace.plain) * (len(pace.row_sizes) + len(pace.decode_sizes))
    assert count <= most
    assert pace.token_sizes[-1] >= max(tokens or 0, max_num_seqs)
    assert pace.row_sizes[-1] >= max_num_seqs


@pytest.fixture
def nvidia_mesh(jit_options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """`jit_options` as if the devices of meshes were NVIDIA GPUs, also for the programs that fetch outputs."""

    def send(tree: Any, options: Any) -> Any:
        jit_options["outputs"] = options
        return tree

    monkeypatch.setattr(runner, "replicate", send)
    for module in (xla_options, compiling):
        monkeypatch.setattr(module, "current_platform", lambda mesh=None: "cuda" if mesh else "cpu")
    return jit_options


def test_all_programs_of_a_mesh_are_compiled_for_its_devices(nvidia_mesh: dict[str, Any]) -> None:
    jit_options = nvidia_mesh
    mesh, order = make_mesh("tensor=2"), {"xla_gpu_enable_pdl": False}
    engine = Engine(
        random_model(TINY, mesh), EngineOptions(max_num_seqs=2, kv_cache_memory=1 << 22, num_decode_steps=1)
    )
    engine.add("a", [1, 2, 3], SamplingParams(max_tokens=4, temperature=0))
    while engine.unfinished:
        engine.step()
    in_order = {name for name, options in jit_options.items() if options == order}
    assert in_order == {"_draw", "_set_counts", "outputs"}
    assert jit_options["traced"] == compiling.compiler_options(mesh, collectives=True)
    assert jit_options["traced"] != compiling.compiler_options(None, collectives=True)
    with platform("cuda"):
        layout = current_layout()
    assert layout is not None
    _preparation(engine._runner._partition, layout, 2, ("experts", "hidden", "expert_intermediate"))
    assert jit_options["run"] == order
    arrays._replicate(mesh, tuple(order.items()))
    assert jit_options["<lambda>"] == order


def test_engines_share_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines with the same model config, mesh and options do; a program is freed with the last of them."""
    monkeypatch.setattr(runner, "_PROGRAMS", weakref.WeakValueDictionary())
    traced: list[StepShape] = []

    def counted(structure: Any, shape: StepShape, *args: Any) -> Any:
        traced.append(shape)
        return step(structure, shape, *args)

    def tokens(engine: Engine) -> list[int]:
        engine.add("a", [1, 2, 3], SamplingParams(max_tokens=4, temperature=0))
        return [event.token_id for _ in range(9) for event in engine.step()]

    step = runner.run_forward
    monkeypatch.setattr(runner, "run_forward", counted)
    options = EngineOptions(max_num_seqs=2, kv_cache_memory=1 << 20)
    first, twin = (Engine(random_model(TINY, seed=seed), options) for seed in (0, 1))
    found, count = tokens(first), len(traced)
    assert count > 0
    assert tokens(twin) != found
    assert len(traced) == count
    assert tokens(Engine(random_model(TINY, seed=0), dataclasses.replace(options, kernels="reference"))) == found
    assert len(traced) == 2 * count
    del first, twin
    gc.collect()
    assert not runner._PROGRAMS


def test_threads_compile_for_the_platform_of_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    def found(_: object) -> None:
        seen.append((current_platform(), forced_backend(), jax.config.jax_default_device))

    seen: list[tuple[Any, ...]] = []
    engine = Engine(random_model(TINY), EngineOptions(max_num_seqs=2, kv_cache_memory=1 << 22))
    device = jax.devices()[1]
    monkeypatch.setattr(engine._runner, "compile", found)
    with platform("rocm"), use_backend("reference"), jax.default_device(device):
        engine.warm_up(progress=False)
    assert set(seen) == {("rocm", "reference", device)}


class Cycle:
    """A reference cycle, which only the collector frees."""

    def __init__(self) -> None:
        self.itself = self


def test_garbage_is_collected_once_all_is_compiled() -> None:
    cycle = Cycle()
    # An object that has survived one full collection is freed only by another full one.
    gc.collect()
    with collected_once():
        left = weakref.ref(cycle)
        del cycle
        for _ in range(100_000):
            Cycle()
        assert left(), "collected meanwhile"
    assert left() is None
    assert gc.isenabled()


def test_the_collector_is_as_it_was_afterwards() -> None:
    with pytest.raises(KeyError), collected_once():
        raise KeyError
    assert gc.isenabled()
    gc.disable()
    try:
        with collected_once():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_the_collector_waits_for_the_last_of_several_threads() -> None:
    first, second = collected_once(), collected_once()
    with ThreadPoolExecutor(1) as other:
        first.__enter__()
        other.submit(second.__enter__).result()
        first.__exit__(None, None, None)
        assert not gc.isenabled()
        other.submit(second.__exit__, None, None, None).result()
    assert gc.isenabled()


def test_engines_compile_without_the_collector(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, collecting = Engine(random_model(TINY), EngineOptions(max_num_seqs=2, kv_cache_memory=1 << 22)), []
    monkeypatch.setattr(engine._runner, "compile", lambda kind: collecting.append(gc.isenabled()))
    assert engine.warm_up(progress=False) == len(collecting) > 0
    assert not any(collecting)
    assert gc.isenabled()
