"""Arrays of several processes: in from every host's memory, and back out to it."""

from __future__ import annotations

from functools import cache
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def put(x: jax.typing.ArrayLike, sharding: jax.sharding.Sharding | None) -> jax.Array:
    """An array that every process holds whole, laid out over the devices of all of them."""
    if sharding is None or sharding.is_fully_addressable:
        return jax.device_put(x, sharding)
    # jax.device_put would first send the whole array around to compare it.
    host = np.asarray(x)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def replicate_to_host(tree: Any) -> Any:
    """The arrays of a pytree as numpy arrays, wherever they lie; every process must ask for the same."""

    def whole(x: Any) -> Any:
        if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
            return x
        assert isinstance(x.sharding, NamedSharding)
        return _replicate(x.sharding.mesh)(x)

    return jax.device_get(jax.tree.map(whole, tree))


@cache
def _replicate(mesh: Mesh) -> Any:
    return jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, PartitionSpec()))
