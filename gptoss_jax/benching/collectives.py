"""How long a program's collectives take by themselves."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gptoss_jax.benching.ceilings import median_seconds
from gptoss_jax.engine.compiling import compiler_options
from sharding.compiled.program import Collectives

Operation = Callable[[jax.Array, tuple[str, ...], int], jax.Array]


def alone_seconds(
    mesh: Mesh,
    collectives: Sequence[Collectives],
    shared: Callable[[], AbstractContextManager[None]] = nullcontext,
    alone: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> float:
    """Seconds of these collectives one after the other, with as many bytes over the same devices, and nothing else.

    Each waits for the one before, as those of a model's layers do. A program that does all the rest of what the timed
    one does is subtracted: what is left is the links' and the library's. Those of a branch that may not be taken are
    left out, as in `sharding.compiled.bounds`. Several processes are not for this. What compiles is within `shared`,
    and what is timed within `alone`.
    """
    taken = [c for c in collectives if c.axes and not c.conditional]
    if not taken:
        return 0.0
    everywhere = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    with shared():
        arrays = [jnp.ones(_elements(c, mesh) * mesh.size, jnp.float32, device=everywhere) for c in taken]

        def compiled(talking: bool) -> jax.stages.Compiled:
            return _program(mesh, taken, talking).lower(*arrays).compile(compiler_options=compiler_options(mesh))

        with ThreadPoolExecutor() as pool:
            programs = list(pool.map(compiled, (True, False)))
    with alone():
        talking, silent = (median_seconds(partial(program, *arrays)) for program in programs)
    return max(0.0, talking - silent)


def _elements(collective: Collectives, mesh: Mesh) -> int:
    """Float32 numbers of one of them on a device, in whole parts for each device of its group."""
    parts = _size(collective.axes, mesh)
    return parts * max(1, round(collective.num_bytes / collective.count / 4 / parts))


def _size(axes: tuple[str, ...], mesh: Mesh) -> int:
    return math.prod(mesh.shape[axis] for axis in axes)


def _program(mesh: Mesh, collectives: Sequence[Collectives], talking: bool) -> jax.stages.Wrapped:
    def chain(*arrays: jax.Array) -> jax.Array:
        last = jnp.zeros((), jnp.float32)
        for collective, array in zip(collectives, arrays, strict=True):
            parts = _size(collective.axes, mesh)
            y = array + last
            for _ in range(collective.count):
                moved = OPERATIONS[collective.op](y, collective.axes, parts) if talking else y
                # What is added differs between devices: of equal numbers the compiler knows the sum.
                y = moved / parts + array
            last = y[0]
        return last[None]

    spec = PartitionSpec(mesh.axis_names)
    # Each operation gives as many numbers as it takes, so that one can follow the other.
    return jax.jit(jax.shard_map(chain, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))


def _all_reduce(x: jax.Array, axes: tuple[str, ...], parts: int) -> jax.Array:
    return lax.psum(x, axes)


def _all_gather(x: jax.Array, axes: tuple[str, ...], parts: int) -> jax.Array:
    return lax.all_gather(x[: x.size // parts], axes, tiled=True)


def _reduce_scatter(x: jax.Array, axes: tuple[str, ...], parts: int) -> jax.Array:
    return jnp.tile(lax.psum_scatter(x, axes, tiled=True), parts)


def _all_to_all(x: jax.Array, axes: tuple[str, ...], parts: int) -> jax.Array:
    return lax.all_to_all(x.reshape(parts, -1), axes, 0, 0, tiled=True).reshape(-1)


def _ragged_all_to_all(x: jax.Array, axes: tuple[str, ...], parts: int) -> jax.Array:
    """With as many numbers for each device."""
    share = x.size // parts
    starts, sizes = jnp.arange(parts, dtype=jnp.int32) * share, jnp.full((parts,), share, jnp.int32)
    mine = jnp.full((parts,), lax.axis_index(axes) * share, jnp.int32)
    return lax.ragged_all_to_all(x, jnp.zeros_like(x), starts, sizes, mine, sizes, axis_name=axes)


def _permute(x: jax.Array, axes: tuple[str, ...], parts: int) -> jax.Array:
    return lax.ppermute(x, axes, [(i, (i + 1) % parts) for i in range(parts)])


OPERATIONS: dict[str, Operation] = {
    "all-reduce": _all_reduce,
    "all-gather": _all_gather,
    "reduce-scatter": _reduce_scatter,
    "all-to-all": _all_to_all,
    "ragged-all-to-all": _ragged_all_to_all,
    "collective-permute": _permute,
    "collective-broadcast": _permute,
}
"""What does as one of `sharding.compiled.program.OPS` does, by its name."""
