"""How fast a program could be at best on a device, and what stands in its way."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Literal

from sharding.program import Collectives
from sharding.topologies import Topology

Resource = Literal["compute", "memory", "links"]


@dataclasses.dataclass(frozen=True)
class Bound:
    """The least seconds that each resource of a device is busy; they may all overlap, so the largest is the bound."""

    compute: float
    memory: float
    links: float

    @property
    def seconds(self) -> float:
        """No call of the program takes less."""
        return max(self.compute, self.memory, self.links)

    @property
    def by(self) -> Resource:
        """The resource that sets it."""
        times: dict[Resource, float] = {"compute": self.compute, "memory": self.memory, "links": self.links}
        return max(times, key=lambda resource: times[resource])


def lower_bound(topology: Topology, flops: float, num_bytes: float, collectives: Iterable[Collectives]) -> Bound:
    """The bound of a program that does `flops` bf16 operations and moves `num_bytes` of memory on each device.

    Collectives under a branch that may not be taken are left out.
    """
    facts = topology.facts
    links = sum(topology.seconds(c.op, c.num_bytes, c.group) for c in collectives if not c.conditional)
    return Bound(flops / facts.bf16_flops, num_bytes / facts.memory_bandwidth, links)
