"""Device meshes, sharding rules from logical axes to mesh axes, and functions over shards; independent of any model."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sharding.arrays import least, put, replicate, zeros
    from sharding.errors import ClusterError, ShardingError
    from sharding.experts import run_experts
    from sharding.mesh import AXES, make_mesh, parse_mesh
    from sharding.partition import Partition, constrain, current, on_shards, sum_over_shards
    from sharding.rules import BATCH_OVER_EXPERTS, ShardingRules
    from sharding.vocabulary import lookup

_HOMES = {
    "put": "arrays",
    "least": "arrays",
    "replicate": "arrays",
    "zeros": "arrays",
    "ClusterError": "errors",
    "ShardingError": "errors",
    "run_experts": "experts",
    "AXES": "mesh",
    "make_mesh": "mesh",
    "parse_mesh": "mesh",
    "Partition": "partition",
    "constrain": "partition",
    "current": "partition",
    "on_shards": "partition",
    "sum_over_shards": "partition",
    "BATCH_OVER_EXPERTS": "rules",
    "ShardingRules": "rules",
    "lookup": "vocabulary",
}

__all__ = [
    "AXES",
    "BATCH_OVER_EXPERTS",
    "ClusterError",
    "Partition",
    "ShardingError",
    "ShardingRules",
    "constrain",
    "current",
    "least",
    "lookup",
    "make_mesh",
    "on_shards",
    "parse_mesh",
    "put",
    "replicate",
    "run_experts",
    "sum_over_shards",
    "zeros",
]


def __getattr__(name: str) -> Any:
    # Lazy imports: parsing a command's flags must not import jax.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"sharding.{_HOMES[name]}"), name)
