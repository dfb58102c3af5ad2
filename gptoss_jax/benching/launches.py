"""What the host starts on a GPU, from jax's profiler."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import jax


@dataclasses.dataclass
class Launches:
    """Device graphs that the host launched, and kernels that it launched outside of them."""

    graphs: int = 0
    lone_kernels: int = 0

    def count(self, calls: Iterable[str]) -> None:
        """Add these calls of the driver, by name; others than launches do not count."""
        for name in calls:
            self.graphs += name.startswith("cuGraphLaunch")
            self.lone_kernels += name.startswith("cuLaunchKernel")


@contextlib.contextmanager
def counted() -> Iterator[Launches]:
    """Trace the block; the result is filled in at its end."""
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
