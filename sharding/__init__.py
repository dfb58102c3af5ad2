"""Meshes, logical axes to mesh axes, and functions run over them: knows arrays and functions, not models."""

from sharding.errors import ShardingError
from sharding.experts import run_experts
from sharding.mesh import AXES, make_mesh, parse_mesh
from sharding.partition import Partition, constrain, current, on_shards
from sharding.rules import BATCH_OVER_EXPERTS, ShardingRules
from sharding.vocab import lookup

__all__ = [
    "AXES",
    "BATCH_OVER_EXPERTS",
    "Partition",
    "ShardingError",
    "ShardingRules",
    "constrain",
    "current",
    "lookup",
    "make_mesh",
    "on_shards",
    "parse_mesh",
    "run_experts",
]
