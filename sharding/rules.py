"""Sharding rules: a typed mapping from logical axes to mesh axes."""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

from jax.sharding import PartitionSpec

from sharding.errors import ShardingError
from sharding.mesh import AXES

MeshAxes = tuple[str, ...]
Dispatch = Literal["auto", "replicated", "all_to_all"]


@dataclasses.dataclass(frozen=True)
class ShardingRules:
    """The mesh axes that each logical axis is split over; () does not split it.

    The axes of weights are `hidden`, `heads`, `kv_heads`, `experts`, `expert_gate_up`, `expert_intermediate` and
    `vocab`. Those of activations and the cache are `batch` (sequences) and `samples` (the sequences of embeddings and
    logits, which are split over the vocabulary too). `dispatch` is the expert-parallel strategy: see
    `sharding.experts`. Raises ShardingError for invalid values.
    """

    batch: MeshAxes = ("data",)
    samples: MeshAxes = ("data",)
    hidden: MeshAxes = ()
    heads: MeshAxes = ("tensor",)
    kv_heads: MeshAxes = ("tensor",)
    experts: MeshAxes = ("expert",)
    expert_gate_up: MeshAxes = ("tensor",)
    expert_intermediate: MeshAxes = ("tensor",)
    vocab: MeshAxes = ("expert", "tensor")
    dispatch: Dispatch = "auto"

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name == "dispatch":
                if value not in get_args(Dispatch):
                    raise ShardingError(
                        f"rules: dispatch: expected {', '.join(get_args(Dispatch))}, found {value!r}"
                    )
            elif not isinstance(value, tuple) or not set(value) <= set(AXES):
                raise ShardingError(f"rules: {field.name}: expected a tuple of {', '.join(AXES)}, found {value!r}")
        for pair in (("heads", "kv_heads"), ("expert_gate_up", "expert_intermediate")):
            first, second = (getattr(self, name) for name in pair)
            if first != second:
                raise ShardingError(
                    f"rules: {pair[0]} and {pair[1]}: expected the same mesh axes, found {first} and {second}"
                )

    def mesh_axes(self, logical: str | None) -> MeshAxes:
        """The mesh axes of one logical axis. Raises ShardingError for an unknown name."""
        if logical is None:
            return ()
        if logical == "dispatch" or logical not in {field.name for field in dataclasses.fields(self)}:
            raise ShardingError(f"rules: no logical axis {logical!r}")
        return getattr(self, logical)

    def spec(self, axes: tuple[str | None, ...], name: str = "array") -> PartitionSpec:
        """The spec of an array with these logical axes. Raises ShardingError if two of them use the same mesh axis."""
        owners: dict[str, str | None] = {}
        for logical in axes:
            for axis in self.mesh_axes(logical):
                if axis in owners:
                    raise ShardingError(
                        f"rules: {name}: {owners[axis]} and {logical} are both split over mesh axis {axis!r}"
                    )
                owners[axis] = logical
        return PartitionSpec(*(self.mesh_axes(logical) or None for logical in axes))


BATCH_OVER_EXPERTS = ShardingRules(batch=("data", "expert"), dispatch="all_to_all")
"""Rules for large batches: attention's sequences are also split over `expert`, and tokens are sent to their experts."""
