"""Lower bounds (roofline) and estimates of the execution time of a program on a device."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Literal

from sharding.compiled.program import Collectives
from sharding.compiled.topologies import Topology

Resource = Literal["compute", "memory", "links"]


@dataclasses.dataclass(frozen=True)
class Bound:
    """The minimum time in seconds for which each resource is busy. All may overlap, so the bound is the largest."""

    compute: float
    memory: float
    links: float

    @property
    def seconds(self) -> float:
        """The lower bound on the time of a call of the program."""
        return max(self.compute, self.memory, self.links)

    @property
    def by(self) -> Resource:
        """The resource that determines the bound."""
        times: dict[Resource, float] = {"compute": self.compute, "memory": self.memory, "links": self.links}
        return max(times, key=lambda resource: times[resource])


def lower_bound(topology: Topology, flops: float, num_bytes: float, collectives: Iterable[Collectives]) -> Bound:
    """The bound of a program that executes `flops` bf16 operations and moves `num_bytes` of memory on each device.

    Collectives in conditional branches are not counted.
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
    """The estimated time of a program with `layers` layers, or None if the device has not been measured.

    The estimate is the sum over all resources, because kernels run one after the other, each bound by one of them.
    Operations, bytes and collectives are as for `lower_bound`, with the bytes of the device that has the most.
    `grouped` is whether experts have several tokens.
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
