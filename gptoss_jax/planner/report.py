"""Plans as tables, as JSON and as a figure."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from gptoss_jax.planner.plans import MeshPlan, Request, StepPlan

GIB = 2**30


def table(request: Request, plans: Sequence[MeshPlan]) -> str:
    """Text tables of the memory, times and collectives of each plan."""
    from gptoss_jax.planner.plans import describe

    facts, config = request.topology.facts, request.config
    lines = [
        f"{config.num_hidden_layers} layers, {config.num_local_experts} experts; batch {request.batch}, context "
        f"{request.context}, prefill chunks of {request.chunk} tokens, {request.dtype}",
        f"{request.topology.text}: {request.topology.num_devices} x {facts.name}"
        f"{' (half a chip)' if facts.devices_per_chip == 2 else ''}, each {facts.usable_bytes / GIB:.2f} GiB usable "
        f"of {facts.memory_bytes / GIB:.2f}, {facts.memory_bandwidth / 1e9:.0f} GB/s, "
        f"{facts.bf16_flops / 1e12:.0f} bf16 TFLOP/s",
        "",
        "Memory per device, GiB",
        *_aligned([_MEMORY, *(row for plan in plans for row in _memory_rows(describe(plan.mesh), plan))]),
        "",
        "Time of a step, ms: the lower bound by the data sheet with perfect overlap, and the expected time",
        *_aligned([_TIME, *(row for plan in plans for row in _time_rows(describe(plan.mesh), plan))]),
    ]
    compiled = [plan for plan in plans if plan.compiled]
    if compiled:
        rows = [row for plan in compiled for row in _collective_rows(describe(plan.mesh), plan)]
        lines += ["", "Collectives in the compiled program, per call and device"]
        lines += _aligned([_COLLECTIVES, *rows]) if rows else ["none"]
    notes = [f"{describe(p.mesh)} {name}: {s.error}" for p in plans for name, s in p.steps.items() if s.error]
    return "\n".join([*lines, *(["", *notes] if notes else [])])


_MEMORY = ["mesh", "step", "weights", "KV cache", "padding", "temporaries", "code, outputs", "total", "fits"]
_TIME = [
    "mesh",
    "step",
    "compute",
    "memory",
    "links",
    "bound",
    "bound by",
    "expected ms",
    "max tok/s",
    "expected tok/s",
    "GFLOP",
    "GB read",
    "compiler GFLOP",
    "compiler GB",
    "compile s",
]
_COLLECTIVES = ["mesh", "step", "op", "axes", "count", "MB", "when"]


def _memory_rows(mesh: str, plan: MeshPlan) -> list[list[str]]:
    rows = []
    for name, step in plan.steps.items():
        memory = step.memory
        held = [_gib(plan.weight_bytes), _gib(plan.cache_bytes)]
        if memory is None:
            fits = "no" if not plan.fits else "not compiled"
            rows.append([mesh, name, *held, "", "", "", f">{_gib(plan.weight_bytes + plan.cache_bytes)}", fits])
            continue
        padding = memory.arguments - plan.weight_bytes - plan.cache_bytes
        other = memory.code + memory.outputs - memory.reused
        parts = [_gib(n) for n in (padding, memory.temporaries, other, memory.total)]
        rows.append([mesh, name, *held, *parts, "yes" if memory.total <= plan.usable_bytes else "no"])
    return rows


def _time_rows(mesh: str, plan: MeshPlan) -> list[list[str]]:
    def known(value: float | None, unit: float, digits: int) -> str:
        return "" if value is None else f"{value / unit:.{digits}f}"

    return [
        [
            mesh,
            name,
            *(f"{1e3 * t:.3f}" for t in (step.bound.compute, step.bound.memory, step.bound.links)),
            f"{1e3 * step.bound.seconds:.3f}",
            step.bound.by,
            known(step.expected_seconds, 1e-3, 3),
            f"{step.tokens_per_second:.0f}",
            known(step.expected_tokens_per_second, 1, 0),
            known(step.work.flops, 1e9, 1),
            known(step.work.num_bytes, 1e9, 1),
            known(step.program_flops, 1e9, 1),
            known(step.program_bytes, 1e9, 1),
            f"{step.compile_seconds:.0f}" if step.memory else "",
        ]
        for name, step in plan.steps.items()
    ]


def _collective_rows(mesh: str, plan: MeshPlan) -> list[list[str]]:
    return [
        [
            mesh,
            name,
            c.op,
            " x ".join(c.axes),
            str(c.count),
            f"{c.num_bytes / 1e6:.2f}",
            "conditional" if c.conditional else "always",
        ]
        for name, step in plan.steps.items()
        for c in step.collectives
    ]


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / GIB:.2f}"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines with aligned columns: text to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    numeric = [any(row[i][:1].isdigit() for row in rows[1:]) for i in range(len(widths))]
    return [
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, numeric, strict=True)
        ).rstrip()
        for row in rows
    ]


def as_json(request: Request, plans: Sequence[MeshPlan]) -> dict[str, Any]:
    """The plans as JSON-serialisable data: bytes, seconds and operations, per device."""
    facts = request.topology.facts
    return {
        "topology": request.topology.text,
        "devices": request.topology.num_devices,
        "device": dataclasses.asdict(facts),
        "batch": request.batch,
        "context": request.context,
        "chunk": request.chunk,
        "dtype": request.dtype,
        "meshes": [_mesh_json(plan) for plan in plans],
    }


def _mesh_json(plan: MeshPlan) -> dict[str, Any]:
    return {
        "mesh": plan.mesh,
        "fits": plan.fits,
        "compiled": plan.compiled,
        "bytes": plan.num_bytes,
        "usable_bytes": plan.usable_bytes,
        "weight_bytes": plan.weight_bytes,
        "cache_bytes": plan.cache_bytes,
        "steps": {name: _step_json(step) for name, step in plan.steps.items()},
    }


def _step_json(step: StepPlan) -> dict[str, Any]:
    fields = dataclasses.asdict(step)
    for collective in fields["collectives"]:
        del collective["group"]
    bound = fields.pop("bound")
    memory = fields.pop("memory")
    return {
        **fields,
        "memory": memory and memory | {"total": step.memory.total if step.memory else None},
        "bound_seconds": bound,
        "least_seconds": step.bound.seconds,
        "bound_by": step.bound.by,
        "max_tokens_per_second": step.tokens_per_second,
        "expected_tokens_per_second": step.expected_tokens_per_second,
    }


def figure(request: Request, plans: Sequence[MeshPlan]) -> Figure:
    """Bar charts of the memory and the decode time of each mesh."""
    from matplotlib.figure import Figure

    from gptoss_jax.planner.plans import describe

    names = [describe(plan.mesh) for plan in plans]
    picture = Figure(figsize=(14, 1.8 + 0.42 * len(plans)))
    memory, times = picture.subplots(1, 2, sharey=True)
    _bars(memory, names, _memory_parts(plans))
    memory.axvline(request.topology.facts.usable_bytes / GIB, color="black", linestyle="--", label="usable")
    memory.set_xlabel("GiB per device, the larger of decode and prefill")
    bounds = [plan.steps["decode"].bound for plan in plans]
    for offset, resource in enumerate(("memory", "links", "compute")):
        values = [1e3 * getattr(bound, resource) for bound in bounds]
        times.barh([i + 0.26 * (offset - 1) for i in range(len(names))], values, height=0.24, label=resource)
    times.set_xlabel("lower bound of a decode step, ms")
    for axes in (memory, times):
        axes.legend(loc="best", fontsize="small")
    memory.invert_yaxis()
    picture.suptitle(f"{request.topology.text}, batch {request.batch}, context {request.context}")
    return picture


def _memory_parts(plans: Sequence[MeshPlan]) -> dict[str, list[float]]:
    parts: dict[str, list[float]] = {
        "weights": [],
        "KV cache": [],
        "temporaries": [],
        "padding, code, outputs": [],
    }
    for plan in plans:
        memories = [step.memory for step in plan.steps.values() if step.memory]
        largest = max(memories, key=lambda m: m.total, default=None)
        held = plan.weight_bytes + plan.cache_bytes
        temporaries = largest.temporaries if largest else 0
        other = largest.total - temporaries - held if largest else 0
        for part, value in zip(parts, (plan.weight_bytes, plan.cache_bytes, temporaries, other), strict=True):
            parts[part].append(value / GIB)
    return parts


def _bars(axes: Any, names: Sequence[str], parts: dict[str, list[float]]) -> None:
    left = [0.0] * len(names)
    for part, values in parts.items():
        axes.barh(range(len(names)), values, left=left, label=part)
        left = [a + b for a, b in zip(left, values, strict=True)]
    axes.set_yticks(range(len(names)), names)
