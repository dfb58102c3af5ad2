"""How fast a program could be at best on a device, what stands in its way, and how fast it is expected to be."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Literal

from sharding.compiled.program import Collectives
from sharding.compiled.topologies import Topology

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


def expected_seconds(
    topology: Topology,
    layers: int,
    flops: float,
    num_bytes: float,
    collectives: Iterable[Collectives],
    *,
    grouped: bool,
) -> float | None:
    """What a program of so many layers is expected to take on each device; None if nothing was measured there.

    All parts are added up: kernels run one after the other, each bound by something else. Operations, bytes and
    collectives are those of `lower_bound`, the bytes of the device that has most; `grouped` is whether experts have
    several tokens.
    """
    facts = topology.facts
    reached = facts.reached
    if reached is None:
        return None
    taken = [c for c in collectives if not c.conditional and len(c.group) > 1]
    links = sum(topology.seconds(c.op, c.num_bytes, c.group) for c in taken)
    return (
        layers * (reached.layer_seconds + grouped * reached.grouped_seconds)
        + num_bytes / (facts.memory_bandwidth * reached.memory_share)
        + flops / (facts.bf16_flops * reached.compute_share)
        + sum(c.count for c in taken) * reached.collective_latency
        + links / reached.link_share
    )
