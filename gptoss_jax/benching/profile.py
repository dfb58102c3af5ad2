"""How busy a device was and what the host started, from jax's profiler, where the platform reports its kernels."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax


@dataclasses.dataclass
class DeviceTime:
    """Of one device while it was traced; zeros where the platform does not tell.

    `span` are the seconds from the first kernel's start to the last one's end, `busy` those in which one ran, and
    `kernels` their number. The host launched `graphs` device graphs, and `lone_kernels` kernels outside of them.
    """

    span: float = 0.0
    busy: float = 0.0
    kernels: int = 0
    graphs: int = 0
    lone_kernels: int = 0


@contextlib.contextmanager
def traced() -> Iterator[DeviceTime]:
    """Trace the block; the result is filled in at its end."""
    found = DeviceTime()
    with tempfile.TemporaryDirectory() as folder:
        jax.profiler.start_trace(folder)
        try:
            yield found
        finally:
            jax.profiler.stop_trace()
        for file in Path(folder).rglob("*.xplane.pb"):
            _read(file, found)


def _read(file: Path, into: DeviceTime) -> None:
    for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
        if plane.name.startswith("/host"):
            calls = [event.name for line in plane.lines for event in line.events]
            into.graphs += sum(name.startswith("cuGraphLaunch") for name in calls)
            into.lone_kernels += sum(name.startswith("cuLaunchKernel") for name in calls)
        if plane.name != "/device:GPU:0":
            continue
        events = [
            (event.start_ns, event.start_ns + event.duration_ns)
            for line in plane.lines
            if line.name.startswith("Stream")
            for event in line.events
        ]
        if events:
            into.kernels = len(events)
            into.span = (max(end for _, end in events) - min(start for start, _ in events)) / 1e9
            into.busy = _covered(events) / 1e9


def _covered(intervals: list[tuple[float, float]]) -> float:
    """The length of the union."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
