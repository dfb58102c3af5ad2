"""Arrays of several processes: in from every host's memory, and back out to it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def put(x: jax.typing.ArrayLike, sharding: jax.sharding.Sharding | None) -> jax.Array:
    """An array that every process holds whole, laid out over the devices of all of them."""
    if sharding is None or sharding.is_fully_addressable:
        return jax.device_put(x, sharding)
    # jax.device_put would first send the whole array around to compare it.
    host = np.asarray(x)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def zeros(
    shape: tuple[int, ...], dtype: jax.typing.DTypeLike, sharding: jax.sharding.Sharding | None
) -> jax.Array:
    """Zeros that each device makes for itself; `jnp.zeros` would copy the first device's to the others."""
    return jax.jit(partial(jnp.zeros, shape, dtype), out_shardings=sharding)()


def replicate(tree: Any, compiler_options: Mapping[str, str | bool] | None = None) -> Any:
    """The arrays of a pytree, so laid out that every process can read them; every process must ask for the same.

    `compiler_options` are XLA's, for the programs that do it.
    """
    options = tuple((compiler_options or {}).items())

    def whole(x: Any) -> Any:
        if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
            return x
        assert isinstance(x.sharding, NamedSharding)
        return _replicate(x.sharding.mesh, options)(x)

    return jax.tree.map(whole, tree)


def least(value: int) -> int:
    """The least of the values that the processes give; below 2 ** 31."""
    if jax.process_count() == 1:
        return value
    from jax.experimental.multihost_utils import process_allgather

    return int(np.min(process_allgather(np.int32(value))))


@cache
def _replicate(mesh: Mesh, options: tuple[tuple[str, str | bool], ...]) -> Any:
    whole = NamedSharding(mesh, PartitionSpec())
    return jax.jit(lambda x: x, out_shardings=whole, compiler_options=dict(options) or None)
