"""Memory and collectives of a compiled program, read from its memory analysis and its HLO text."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

OPS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)


@dataclasses.dataclass(frozen=True)
class ProgramMemory:
    """Memory of a program on one device, in bytes; outputs that reuse a donated argument are counted once."""

    arguments: int
    outputs: int
    reused: int
    temporaries: int
    code: int

    @property
    def total(self) -> int:
        """The memory that must be available at once."""
        return self.arguments + self.outputs - self.reused + self.temporaries + self.code

    @classmethod
    def of(cls, compiled: Any) -> ProgramMemory:
        """From a `jax.stages.Compiled`."""
        found = compiled.memory_analysis()
        return cls(
            found.argument_size_in_bytes,
            found.output_size_in_bytes,
            found.alias_size_in_bytes,
            found.temp_size_in_bytes,
            found.generated_code_size_in_bytes,
        )


@dataclasses.dataclass(frozen=True)
class Collectives:
    """All collectives of one kind over the same mesh axes in a program.

    `count` is the number of executions on a device in a call of the program. `num_bytes` is the total size on one
    device of the full arrays (the result of an all-gather, the operand of a reduce-scatter). `conditional` collectives
    run only if a branch is taken. A loop of unknown length counts as one iteration. `group` is one group of
    communicating devices.
    """

    op: str
    axes: tuple[str, ...]
    group: tuple[int, ...]
    conditional: bool
    count: int
    num_bytes: int


@dataclasses.dataclass
class _Computation:
    collectives: list[tuple[str, int, tuple[int, ...]]] = dataclasses.field(default_factory=list)
    calls: list[tuple[str, int, bool]] = dataclasses.field(default_factory=list)


_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = (.*)$")
_CALLEE = re.compile(r"\b(calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_CALLEES = re.compile(r"\b(branch_computations|called_computations)=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, ?device_ids=\(?\[([^)]*)\)?)? ?\{([^}]*)\}")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_LISTED = re.compile(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{} ]*\})\}")


def read_collectives(text: str, mesh_shape: Mapping[str, int]) -> list[Collectives]:
    """The collectives in the HLO text of compiled programs, summed by kind and sorted by descending bytes.

    `mesh_shape` maps the axes of the mesh that the programs are partitioned over, in order, to their sizes.
    """
    totals: dict[tuple[Any, ...], list[int]] = defaultdict(lambda: [0, 0])
    for module in _modules(text):
        entry, computations = _parse(module, math.prod(mesh_shape.values()))
        for times, conditional, (op, num_bytes, group) in _executed(entry, computations, 1, False):
            total = totals[op, _axes(group, mesh_shape), group, conditional]
            total[0] += times
            total[1] += times * num_bytes
    found = [
        Collectives(op, axes, group, conditional, count, num_bytes)
        for (op, axes, group, conditional), (count, num_bytes) in totals.items()
    ]
    return sorted(found, key=lambda c: (c.conditional, -c.num_bytes))


NO_KERNEL = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "add-dependency"}
NO_KERNEL |= {"partition-id", "replica-id", "opt-barrier", "domain"}
"""HLO instructions that launch no kernel."""


def count_kernels(text: str) -> int:
    """The number of kernels that a call of each compiled program launches, from their HLO text.

    A loop of unknown length counts as one iteration, an asynchronous operation at its start, and a conditional as its
    branch with the most kernels.
    """
    return sum(map(_count_kernels, _modules(text)))


def _modules(text: str) -> list[str]:
    """The text of each program, whose computations have names of its own."""
    return re.split(r"^(?=HloModule )", text, flags=re.MULTILINE)


def _count_kernels(text: str) -> int:
    bodies: dict[str, list[str]] = {}
    entry, lines = "", []
    for line in text.splitlines():
        if header := _HEADER.match(line):
            lines = bodies[header[2]] = []
            entry = header[2] if header[1] else entry
        elif match := _INSTRUCTION.match(line):
            lines.append(match[1])

    def count(name: str) -> int:
        return sum(map(launches, bodies.get(name, [])))

    def launches(instruction: str) -> int:
        _, op = _shape_and_op(instruction)
        if op == "while":
            trips = _TRIPS.search(instruction)
            return (int(trips[1]) if trips else 1) * sum(count(name) for _, name in _CALLEE.findall(instruction))
        if op == "conditional":
            names = [name for _, name in _CALLEE.findall(instruction)]
            for _, group in _CALLEES.findall(instruction):
                names += [name.strip() for name in group.replace("%", "").split(",")]
            return max(map(count, names), default=0)
        if op == "call":
            return sum(count(name) for _, name in _CALLEE.findall(instruction))
        return int(op not in NO_KERNEL and not op.endswith(("-done", "-update")))

    return count(entry)


def array_bytes(shape: str) -> int:
    """Size of an HLO shape in bytes, summed over a tuple; layouts and their padding are ignored."""
    total = 0.0
    for kind, dims in _ARRAY.findall(shape):
        bits = 8 if kind == "pred" else int((re.findall(r"\d+", kind) or ["0"])[0])
        total += bits / 8 * math.prod(int(d) for d in dims.split(",") if d)
    return math.ceil(total)


def _parse(text: str, num_devices: int) -> tuple[str, dict[str, _Computation]]:
    computations: dict[str, _Computation] = {}
    entry, current, name = "", _Computation(), ""
    for line in text.splitlines():
        if header := _HEADER.match(line):
            name = header[2]
            current = computations[name] = _Computation()
            if header[1]:
                entry = name
        elif match := _INSTRUCTION.match(line):
            _read(match[1], current, name, num_devices)
    return entry, computations


def _read(instruction: str, into: _Computation, name: str, num_devices: int) -> None:
    shape, op = _shape_and_op(instruction)
    base = op.removesuffix("-start")
    if base in OPS:
        group = _group(instruction, num_devices)
        if len(group) > 1:
            num_bytes = array_bytes(_result(shape) if op.endswith("-start") else shape)
            if base == "reduce-scatter":
                num_bytes *= len(group)
            # On TPUs, a fused reduce-scatter has this name and a body with an all-reduce and a slice.
            fused = name.startswith("all-reduce-scatter") and base == "all-reduce"
            into.collectives.append(("reduce-scatter" if fused else base, num_bytes, group))
        return
    trips = _TRIPS.search(instruction)
    for kind, callee in _CALLEE.findall(instruction):
        branch = kind in ("true_computation", "false_computation")
        into.calls.append((callee, int(trips[1]) if trips and kind == "body" else 1, branch))
    for kind, callees in _CALLEES.findall(instruction):
        for callee in callees.replace("%", "").split(","):
            into.calls.append((callee.strip(), 1, kind == "branch_computations"))


def _shape_and_op(instruction: str) -> tuple[str, str]:
    depth = 0
    for i, char in enumerate(instruction):
        depth += (char in "([{") - (char in ")]}")
        if char == " " and depth == 0:
            return instruction[:i], instruction[i + 1 :].partition("(")[0]
    return instruction, ""


def _result(shape: str) -> str:
    """The result in the tuple (operand, result, ...) of an asynchronous start; any other shape unchanged."""
    if not shape.startswith("("):
        return shape
    parts, depth, start = [], 0, 1
    for i, char in enumerate(shape):
        depth += (char in "([{") - (char in ")]}")
        if (char == "," and depth == 1) or depth == 0:
            parts.append(shape[start:i])
            start = i + 1
    return parts[1] if len(parts) > 1 else parts[0]


def _group(instruction: str, num_devices: int) -> tuple[int, ...]:
    """The first group of communicating devices; the first pair of a permutation."""
    if match := _MESH.search(instruction):
        return _mesh_group(match[1], match[2], match[3], num_devices)
    if match := _IOTA.search(instruction):
        dims, sizes = ([int(n) for n in part.split(",")] for part in (match[1], match[2]))
        devices = np.arange(math.prod(sizes)).reshape(sizes)
        if match[3]:
            devices = devices.transpose([int(n) for n in match[3].split(",")])
        return tuple(devices.reshape(dims)[0].ravel().tolist())
    if match := _LISTED.search(instruction):
        groups = [tuple(int(n) for n in g.split(",") if n) for g in re.findall(r"\{([\d,]*)\}", match[1])]
        if "source_target_pairs" in instruction:
            return _pair(groups)
        return groups[0]
    return tuple(range(num_devices))


def _pair(pairs: list[tuple[int, ...]]) -> tuple[int, ...]:
    """The first pair of different devices in a permutation; () if each device sends to itself."""
    return next(((a, b) for a, b in pairs if a != b), ())


def _mesh_group(sizes: str, order: str | None, axes: str, num_devices: int) -> tuple[int, ...]:
    """The first group of `mesh['a'=2,'b'=4] {'b'}`; `'b':(2)2` is the part of b after the first 2."""
    shape = {name: int(size) for name, size in re.findall(r"'([^']*)'=(\d+)", sizes)}
    if order is not None:
        return tuple(range(num_devices))
    chosen = {name: (part, size) for name, part, size in re.findall(r"'([^']*)'(?::\((\d+)\)(\d+))?", axes)}
    dims, kept = [], []
    for name, size in shape.items():
        before, part = 1, size if name in chosen else 1
        if name in chosen and chosen[name][0]:
            before, part = int(chosen[name][0]), int(chosen[name][1])
        dims += [before, part, size // before // part]
        kept.append(name in chosen)
    if not any(kept):
        return tuple(range(num_devices))
    devices = np.arange(num_devices).reshape(dims)
    first = tuple(slice(None) if i % 3 == 1 and kept[i // 3] else 0 for i in range(len(dims)))
    return tuple(np.ravel(devices[first]).tolist())


def _axes(group: tuple[int, ...], mesh_shape: Mapping[str, int]) -> tuple[str, ...]:
    """The mesh axes along which the devices of a group differ."""
    positions = np.unravel_index(np.asarray(group), tuple(mesh_shape.values()))
    return tuple(name for name, along in zip(mesh_shape, positions, strict=True) if len(set(along.tolist())) > 1)


def _executed(
    name: str, computations: Mapping[str, _Computation], times: int, conditional: bool
) -> Iterator[tuple[int, bool, tuple[str, int, tuple[int, ...]]]]:
    computation = computations.get(name)
    if computation is None:
        return
    for collective in computation.collectives:
        yield times, conditional, collective
    for callee, trips, branch in computation.calls:
        yield from _executed(callee, computations, times * trips, conditional or branch)
