"""Plans: a model's steps compiled for meshes of a topology, with their memory, collectives and times."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import jax

from gptoss_jax.checkpoints.loading import check_dtype
from gptoss_jax.model.config import ModelConfig
from gptoss_jax.model.placement import partition_for
from gptoss_jax.planner.steps import Step, decode_step, prefill_step
from gptoss_jax.planner.work import Load, Work, expected_collectives, held_bytes, work_of
from sharding import AXES, Partition, ShardingError, ShardingRules
from sharding.compiled.bounds import Bound, expected_seconds, lower_bound
from sharding.compiled.program import Collectives, ProgramMemory, read_collectives
from sharding.compiled.topologies import Topology

StepName = Literal["decode", "prefill"]
STEPS: tuple[StepName, ...] = ("decode", "prefill")

PADDING = 1.5
"""Meshes that pad a layer's experts by more than this factor are not considered."""


@dataclasses.dataclass(frozen=True)
class Request:
    """What to plan: `batch` sequences of up to `context` tokens, prefilled in chunks of `chunk` tokens."""

    config: ModelConfig
    topology: Topology
    batch: int
    context: int
    chunk: int
    dtype: str = "bfloat16"
    rules: ShardingRules = dataclasses.field(default_factory=ShardingRules)


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """One step on one mesh; figures are per device.

    `tokens` is the number of tokens that a call processes on all devices. `bound` is the lower bound of the step's
    time by the data sheet. `expected_seconds` is the time by rates measured on such devices, None if none were.
    `memory` is None if the step was not compiled; `collectives` are then estimates. `program_flops` and
    `program_bytes` are the compiler's cost analysis, which counts a loop's body once, and whole arrays where only a
    slice is read.
    """

    tokens: int
    work: Work
    collectives: Sequence[Collectives]
    bound: Bound
    expected_seconds: float | None
    memory: ProgramMemory | None = None
    program_flops: float | None = None
    program_bytes: float | None = None
    compile_seconds: float = 0.0
    error: str | None = None

    @property
    def tokens_per_second(self) -> float:
        """Upper bound of the throughput."""
        return self.tokens / self.bound.seconds

    @property
    def expected_tokens_per_second(self) -> float | None:
        """Expected throughput; None where `expected_seconds` is."""
        return None if self.expected_seconds is None else self.tokens / self.expected_seconds


@dataclasses.dataclass(frozen=True)
class MeshPlan:
    """A mesh, the bytes of weights and KV cache on a device, and its steps."""

    mesh: dict[str, int]
    weight_bytes: int
    cache_bytes: int
    usable_bytes: int
    steps: dict[StepName, StepPlan]

    @property
    def compiled(self) -> bool:
        """Whether every step was compiled."""
        return all(step.memory is not None for step in self.steps.values())

    @property
    def num_bytes(self) -> int:
        """Largest memory of a step on a device; only weights and KV cache if no step was compiled."""
        return max(
            [self.weight_bytes + self.cache_bytes, *(s.memory.total for s in self.steps.values() if s.memory)]
        )

    @property
    def fits(self) -> bool:
        """Whether every step fits in memory; for steps that were not compiled, whether weights and KV cache do."""
        return self.num_bytes <= self.usable_bytes and all(step.error is None for step in self.steps.values())


def partition_of(request: Request, mesh: str | dict[str, int], devices: Sequence[jax.Device]) -> Partition:
    """The partition of the model over a mesh of the topology's devices. Raises ShardingError."""
    text = mesh if isinstance(mesh, str) else ",".join(f"{axis}={size}" for axis, size in mesh.items())
    return partition_for(request.config, text, request.rules, devices)


def sensible_meshes(request: Request) -> list[dict[str, int]]:
    """Factorisations of the devices into data x expert x tensor that give every device work of its own."""
    total = request.topology.num_devices
    config = request.config
    found = []
    for tensor in _divisors(total):
        for expert in _divisors(total // tensor):
            data = total // tensor // expert
            if tensor > config.num_attention_heads or expert > config.num_local_experts or request.batch % data:
                continue
            if _padding(config, expert, tensor) <= PADDING:
                found.append(dict(zip(AXES, (data, expert, tensor), strict=True)))
    return found


def estimate(request: Request, partition: Partition) -> MeshPlan:
    """The plan of a mesh without compiling. Raises ShardingError if the model cannot be partitioned over it."""
    mesh = partition.mesh
    assert mesh is not None
    steps = {name: _step(request, partition, name) for name in STEPS}
    plans: dict[StepName, StepPlan] = {}
    for name, step in steps.items():
        load = Load(step.sequences, step.tokens, request.context)
        dtype = check_dtype(request.dtype)
        work = work_of(request.config, partition, load, dtype)
        expected = expected_collectives(request.config, partition, load, dtype)
        plans[name] = StepPlan(step.sequences * step.tokens, work, expected, *_times(request, work, expected))
    return MeshPlan(
        dict(mesh.shape),
        held_bytes(steps["decode"].weights),
        held_bytes(steps["decode"].state),
        request.topology.facts.usable_bytes,
        plans,
    )


def compile_plan(request: Request, partition: Partition, planned: MeshPlan) -> MeshPlan:
    """The plan with its steps compiled, in parallel. A step that runs out of memory in the compiler has an `error`."""
    if not planned.fits:
        return planned
    with ThreadPoolExecutor(len(STEPS)) as pool:
        compiled = pool.map(lambda name: _compile(request, partition, name, planned.steps[name]), STEPS)
        return dataclasses.replace(planned, steps=dict(zip(STEPS, compiled, strict=True)))


def rank(plans: Sequence[MeshPlan]) -> list[MeshPlan]:
    """Sort by: plans that fit first, then the bound of the decode step, then the sum of its three resource times."""

    def key(plan: MeshPlan) -> tuple[Any, ...]:
        bound = plan.steps["decode"].bound
        return not plan.fits, round(bound.seconds, 7), bound.compute + bound.memory + bound.links

    return sorted(plans, key=key)


def search(
    request: Request, devices: Sequence[jax.Device], top: int, progress: Callable[[str], None]
) -> list[MeshPlan]:
    """Plans of all sensible meshes, best first. The `top` ones by their estimates are compiled."""
    partitions: dict[str, Partition] = {}
    estimates = []
    for mesh in sensible_meshes(request):
        try:
            partition = partition_of(request, mesh, devices)
            estimates.append(estimate(request, partition))
        except ShardingError as error:
            progress(str(error))
            continue
        partitions[str(mesh)] = partition
    if not estimates:
        raise ShardingError(f"topology: {request.topology.text}: found no suitable mesh of its devices")
    ranked, done = rank(estimates), []
    for index, plan in enumerate(ranked):
        if index < top and plan.fits:
            progress(f"compiling {index + 1} of {min(top, sum(p.fits for p in ranked))}: {describe(plan.mesh)}")
            plan = compile_plan(request, partitions[str(plan.mesh)], plan)
        done.append(plan)
    return rank([p for p in done if p.compiled]) + [p for p in done if not p.compiled]


def describe(mesh: dict[str, int]) -> str:
    """The mesh in the syntax of `--mesh`, without axes of size 1."""
    return ",".join(f"{axis}={size}" for axis, size in mesh.items() if size > 1) or "data=1"


def _step(request: Request, partition: Partition, name: StepName) -> Step:
    dtype = check_dtype(request.dtype)
    make = decode_step if name == "decode" else prefill_step
    return make(request.config, partition, request.batch, request.context, request.chunk, dtype)


def _compile(request: Request, partition: Partition, name: StepName, planned: StepPlan) -> StepPlan:
    assert partition.mesh is not None
    started = time.perf_counter()
    step = _step(request, partition, name)
    try:
        with ThreadPoolExecutor(len(step.programs)) as pool:
            programs = list(pool.map(lambda program: program.lower().compile(), step.programs))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return dataclasses.replace(planned, error=_out_of_memory(str(error)))
    seconds = time.perf_counter() - started
    text = "\n".join(program.as_text() or "" for program in programs)
    collectives = read_collectives(text, partition.mesh.shape)
    bound, expected = _times(request, planned.work, collectives)
    return dataclasses.replace(
        planned,
        collectives=collectives,
        bound=bound,
        expected_seconds=expected,
        memory=memory_of(step, programs),
        program_flops=_cost(programs, "flops"),
        program_bytes=_cost(programs, "bytes accessed"),
        compile_seconds=seconds,
    )


def _times(request: Request, work: Work, collectives: Sequence[Collectives]) -> tuple[Bound, float | None]:
    """The lower bound and the expected time of a step."""
    topology, layers = request.topology, request.config.num_hidden_layers
    bound = lower_bound(topology, work.flops, work.num_bytes, collectives)
    expected = expected_seconds(
        topology, layers, work.flops, work.busiest_bytes, collectives, grouped=work.grouped
    )
    return bound, expected


def memory_of(step: Step, programs: Sequence[jax.stages.Compiled]) -> ProgramMemory:
    """The memory of a step's compiled programs, which run one after the other."""
    memories = [ProgramMemory.of(program) for program in programs]
    # What a program takes over from the one before is among the state and the outputs of that one.
    taken = sum(held_bytes(program.held[1:]) for program in step.programs[1:])
    return ProgramMemory(
        sum(memory.arguments for memory in memories) - taken,
        sum(memory.outputs for memory in memories),
        sum(memory.reused for memory in memories),
        max(memory.temporaries for memory in memories),
        sum(memory.code for memory in memories),
    )


def _cost(programs: Sequence[jax.stages.Compiled], name: str) -> float | None:
    """A figure of the compiler's cost analysis, summed over the programs; None on platforms without one."""
    costs = [dict(program.cost_analysis() or {}).get(name) for program in programs]
    return None if None in costs else sum(cost for cost in costs if cost is not None)


def _out_of_memory(message: str) -> str:
    """The sentence of a compiler's message that contains the sizes."""
    found = re.search(r"RESOURCE_EXHAUSTED:\s*(.*)", message)
    return (found[1] if found else message).strip()[:300]


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _padding(config: ModelConfig, expert: int, tensor: int) -> float:
    """The factor by which sharding enlarges the experts."""
    groups = config.intermediate_size / 32
    inner = -(-groups // tensor) * tensor / groups if tensor > 1 else 1.0
    outer = -(-config.num_local_experts // expert) * expert / config.num_local_experts
    return inner * outer
