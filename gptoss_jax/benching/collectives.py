"""Time of a program's collectives in isolation."""

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


def isolated_seconds(
    mesh: Mesh,
    collectives: Sequence[Collectives],
    shared: Callable[[], AbstractContextManager[None]] = nullcontext,
    exclusive: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> float:
    """Seconds of these collectives run back to back, with the same sizes and device groups and no other work.

    Each collective depends on the previous one, as in a model's layers. The time of the same program without the
    collectives is subtracted, so that the time of the links and of the collective library remains. Collectives in
    conditional branches are left out, as in `sharding.compiled.bounds`. All devices must belong to this process.
    Programs are compiled within the context `shared` and timed within `exclusive`.
    """
    taken = [c for c in collectives if c.axes and not c.conditional]
    if not taken:
        return 0.0
    everywhere = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    with shared():
        arrays = [jnp.ones(_elements(c, mesh) * mesh.size, jnp.float32, device=everywhere) for c in taken]

        def compiled(communicate: bool) -> jax.stages.Compiled:
            program = _program(mesh, taken, communicate).lower(*arrays)
            return program.compile(compiler_options=compiler_options(mesh))

        with ThreadPoolExecutor() as pool:
            programs = list(pool.map(compiled, (True, False)))
    with exclusive():
        with_collectives, without = (median_seconds(partial(program, *arrays)) for program in programs)
    return max(0.0, with_collectives - without)


def _elements(collective: Collectives, mesh: Mesh) -> int:
    """Number of float32 elements of one such collective on a device, a multiple of its group's size."""
    group_size = _size(collective.axes, mesh)
    return group_size * max(1, round(collective.num_bytes / collective.count / 4 / group_size))


def _size(axes: tuple[str, ...], mesh: Mesh) -> int:
    return math.prod(mesh.shape[axis] for axis in axes)


def _program(mesh: Mesh, collectives: Sequence[Collectives], communicate: bool) -> jax.stages.Wrapped:
    """The collectives in sequence, one array for each; without `communicate`, only the arithmetic around them."""

    def chain(*arrays: jax.Array) -> jax.Array:
        last = jnp.zeros((), jnp.float32)
        for collective, array in zip(collectives, arrays, strict=True):
            group_size = _size(collective.axes, mesh)
            y = array + last
            for _ in range(collective.count):
                moved = OPERATIONS[collective.op](y, collective.axes, group_size) if communicate else y
                # The addend differs between devices; a sum of replicated values could be folded by the compiler.
                y = moved / group_size + array
            last = y[0]
        return last[None]

    spec = PartitionSpec(mesh.axis_names)
    # Each operation returns as many elements as it takes, so that they can be chained.
    return jax.jit(jax.shard_map(chain, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))


def _all_reduce(x: jax.Array, axes: tuple[str, ...], group_size: int) -> jax.Array:
    return lax.psum(x, axes)


def _all_gather(x: jax.Array, axes: tuple[str, ...], group_size: int) -> jax.Array:
    return lax.all_gather(x[: x.size // group_size], axes, tiled=True)


def _reduce_scatter(x: jax.Array, axes: tuple[str, ...], group_size: int) -> jax.Array:
    return jnp.tile(lax.psum_scatter(x, axes, tiled=True), group_size)


def _all_to_all(x: jax.Array, axes: tuple[str, ...], group_size: int) -> jax.Array:
    return lax.all_to_all(x.reshape(group_size, -1), axes, 0, 0, tiled=True).reshape(-1)


def _ragged_all_to_all(x: jax.Array, axes: tuple[str, ...], group_size: int) -> jax.Array:
    """Sends the same number of elements to each device."""
    share = x.size // group_size
    starts, sizes = jnp.arange(group_size, dtype=jnp.int32) * share, jnp.full((group_size,), share, jnp.int32)
    mine = jnp.full((group_size,), lax.axis_index(axes) * share, jnp.int32)
    return lax.ragged_all_to_all(x, jnp.zeros_like(x), starts, sizes, mine, sizes, axis_name=axes)


def _permute(x: jax.Array, axes: tuple[str, ...], group_size: int) -> jax.Array:
    return lax.ppermute(x, axes, [(i, (i + 1) % group_size) for i in range(group_size)])


OPERATIONS: dict[str, Operation] = {
    "all-reduce": _all_reduce,
    "all-gather": _all_gather,
    "reduce-scatter": _reduce_scatter,
    "all-to-all": _all_to_all,
    "ragged-all-to-all": _ragged_all_to_all,
    "collective-permute": _permute,
    "collective-broadcast": _permute,
}
"""An equivalent of each collective of `sharding.compiled.program.OPS`, by its name."""
