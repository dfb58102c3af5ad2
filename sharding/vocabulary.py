"""Embedding lookup in a table whose rows are sharded, without gathering the table."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from sharding.partition import current


def lookup(table_VD: jax.Array, ids_BT: jax.Array) -> jax.Array:
    """Rows [B, T, D] of a table [V, D]; on a mesh each device looks up its own rows, and one all-reduce sums them."""
    partition = current()
    axes = partition.rules.vocab
    if partition.mesh is None:
        return table_VD[ids_BT]

    def own(table_VD: jax.Array, ids_BT: jax.Array) -> jax.Array:
        local_BT = ids_BT - lax.axis_index(axes) * table_VD.shape[0] if axes else ids_BT
        here_BT = (local_BT >= 0) & (local_BT < table_VD.shape[0])
        rows_BTD = table_VD[jnp.where(here_BT, local_BT, 0)]
        return partition.reduce(jnp.where(here_BT[..., None], rows_BTD, 0), "vocab")

    batch = partition.spec(("samples", None), ids_BT.shape)
    mapped = jax.shard_map(
        own,
        mesh=partition.mesh,
        in_specs=(partition.rules.spec(("vocab", "hidden")), batch),
        out_specs=PartitionSpec(*batch, None),
        check_vma=False,
    )
    return mapped(table_VD, ids_BT)
