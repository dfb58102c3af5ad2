"""Global arrays of several processes, made from host memory and read back to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def put(x: jax.typing.ArrayLike, sharding: jax.sharding.Sharding | None) -> jax.Array:
    """Shard a host array that every process holds whole over the devices of all processes."""
    if sharding is None or sharding.is_fully_addressable:
        return jax.device_put(x, sharding)
    # jax.device_put would first send the whole array between processes to compare the copies.
    host = np.asarray(x)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def zeros(
    shape: tuple[int, ...], dtype: jax.typing.DTypeLike, sharding: jax.sharding.Sharding | None
) -> jax.Array:
    """An array of zeros, filled on each device; `jnp.zeros` would copy the first device's zeros to the others."""
    return _zeros(shape, jnp.dtype(dtype), sharding)()


@cache
def _zeros(
    shape: tuple[int, ...], dtype: jnp.dtype, sharding: jax.sharding.Sharding | None
) -> Callable[[], jax.Array]:
    return jax.jit(partial(jnp.zeros, shape, dtype), out_shardings=sharding)


def replicate(tree: Any, compiler_options: Mapping[str, str | bool] | None = None) -> Any:
    """Replicate the arrays of a pytree, so that every process can read them; all processes must make the same call.

    `compiler_options` are XLA options for the programs that replicate.
    """
    options = tuple((compiler_options or {}).items())

    def whole(x: Any) -> Any:
        if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
            return x
        assert isinstance(x.sharding, NamedSharding)
        return _replicate(x.sharding.mesh, options)(x)

    return jax.tree.map(whole, tree)


def least(value: int) -> int:
    """The minimum over all processes of a value below 2 ** 31."""
    if jax.process_count() == 1:
        return value
    from jax.experimental.multihost_utils import process_allgather

    return int(np.min(process_allgather(np.int32(value))))


@cache
def _replicate(mesh: Mesh, options: tuple[tuple[str, str | bool], ...]) -> Any:
    whole = NamedSharding(mesh, PartitionSpec())
    return jax.jit(lambda x: x, out_shardings=whole, compiler_options=dict(options) or None)
