"""Counts of the launches that the host makes on a GPU, from JAX's profiler."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import jax


@dataclasses.dataclass
class Launches:
    """Number of CUDA graphs that the host launched, and of kernels that it launched outside graphs."""

    graphs: int = 0
    kernels_outside_graphs: int = 0

    def count(self, calls: Iterable[str]) -> None:
        """Add the launches among these CUDA driver calls, given by name; other calls are ignored."""
        for name in calls:
            self.graphs += name.startswith("cuGraphLaunch")
            self.kernels_outside_graphs += name.startswith("cuLaunchKernel")


@contextlib.contextmanager
def count_launches() -> Iterator[Launches]:
    """Profile the block; the yielded counts are filled in when the block ends."""
    found = Launches()
    with tempfile.TemporaryDirectory() as folder:
        jax.profiler.start_trace(folder)
        try:
            yield found
        finally:
            jax.profiler.stop_trace()
        for file in Path(folder).rglob("*.xplane.pb"):
            for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
                if plane.name.startswith("/host"):
                    found.count(event.name for line in plane.lines for event in line.events)
