"""A mesh with sharding rules: shardings of arrays, and functions over their shards."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextvars import ContextVar
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sharding.errors import ShardingError
from sharding.heads import HeadLayout
from sharding.rules import ShardingRules

LogicalAxes = tuple[str | None, ...]

SEQUENCES = ("batch", "samples")
"""The logical axes of sequences."""


@dataclasses.dataclass(frozen=True)
class Partition:
    """A mesh and its sharding rules; without a mesh, everything is on one device.

    `num_heads` and `num_kv_heads` are attention's. `granularity` gives the smallest shard of each axis that may be
    padded (32 for a dimension packed in groups of 32).
    """

    mesh: Mesh | None = None
    rules: ShardingRules = dataclasses.field(default_factory=ShardingRules)
    num_heads: int = 1
    num_kv_heads: int = 1
    granularity: tuple[tuple[str, int], ...] = ()

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Make this the partition that `constrain`, `on_shards` and `sharding.experts` use; entered while tracing.

        It replaces any mesh set with `jax.set_mesh`, since JAX rejects a `shard_map` over another mesh.
        """
        token = _CURRENT.set(self)
        try:
            with self.on_its_devices():
                yield
        finally:
            _CURRENT.reset(token)

    def degree(self, logical: str | None) -> int:
        """The number of shards of a logical axis."""
        if self.mesh is None:
            return 1
        return math.prod(self.mesh.shape[axis] for axis in self.rules.mesh_axes(logical))

    def on_its_devices(self) -> contextlib.AbstractContextManager[Any]:
        """A context in which the current platform is that of the mesh's devices."""
        return jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh) if self.mesh else contextlib.nullcontext()

    def reduce(self, x: jax.Array, *logical: str) -> jax.Array:
        """Inside a function on shards: the sum of `x` over the devices that these logical axes are split over."""
        axes = [a for name in logical for a in self.rules.mesh_axes(name) if self.mesh and self.mesh.shape[a] > 1]
        return jax.lax.psum(x, axes) if axes else x

    def index(self, logical: str) -> jax.Array | int:
        """Inside a function on shards: the index of the device's shard along the axis."""
        axes = self.rules.mesh_axes(logical)
        return jax.lax.axis_index(axes) if self.mesh is not None and axes else 0

    def shard_of(self, x: Any, axes: LogicalAxes) -> jax.ShapeDtypeStruct:
        """The shape and dtype of one device's shard of an array."""
        shape = tuple(n // self.degree(axis) for n, axis in zip(x.shape, axes, strict=True))
        return jax.ShapeDtypeStruct(shape, x.dtype)

    @cached_property
    def heads(self) -> HeadLayout:
        """The layout of attention heads on this mesh."""
        return HeadLayout.of(self.num_heads, self.num_kv_heads, self.degree("heads"))

    def padded_size(self, logical: str | None, size: int, name: str = "array") -> int:
        """The size of an axis after padding to divide evenly; only axes with a granularity are padded.

        Raises ShardingError for other axes that do not divide evenly.
        """
        degree, pieces = self.degree(logical), dict(self.granularity)
        if degree == 1 or (size % degree == 0 and logical not in pieces):
            return size
        if logical not in pieces:
            axes = " x ".join(f"{a}={self.mesh.shape[a]}" for a in self.rules.mesh_axes(logical) if self.mesh)
            raise ShardingError(f"{name}: {logical} of {size} does not divide over {axes}")
        multiple = pieces[logical] * degree
        return -(-size // multiple) * multiple

    def sharding(self, axes: LogicalAxes, name: str = "array") -> NamedSharding | None:
        """The sharding of an array with these logical axes; None without a mesh."""
        return None if self.mesh is None else NamedSharding(self.mesh, self.rules.spec(axes, name))

    def spec(self, axes: LogicalAxes, shape: tuple[int, ...]) -> PartitionSpec:
        """The spec of an activation; a dimension that does not divide evenly is not split."""
        kept = [axis if size % self.degree(axis) == 0 else None for axis, size in zip(axes, shape, strict=False)]
        return self.rules.spec(tuple(kept))


_UNSPLIT = Partition()
_CURRENT: ContextVar[Partition | None] = ContextVar("partition", default=None)


def current() -> Partition:
    """The active partition."""
    return _CURRENT.get() or _UNSPLIT


def constrain(x: jax.Array, axes: LogicalAxes) -> jax.Array:
    """Constrain an activation's sharding by its logical axes; a dimension that does not divide evenly is not split."""
    partition = current()
    if partition.mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(partition.mesh, partition.spec(axes, x.shape)))


def on_shards(
    function: Callable[..., Any],
    args: Mapping[str, tuple[Any, Any]],
    out_axes: Any,
    batch: int,
) -> Any:
    """Call `function(**args)` on every device with its shard of each argument, without communication.

    `args` maps names to (value, logical axes), and `out_axes` gives the result's logical axes: a tuple for an array,
    a pytree of tuples for a pytree. If `batch` sequences do not divide evenly over the mesh's batch axes, every device
    gets all of them.
    """
    partition = current()
    values = {name: value for name, (value, _) in args.items()}
    if partition.mesh is None:
        return function(**values)
    whole = [axis for axis in SEQUENCES if batch % partition.degree(axis)]

    def spec(axes: LogicalAxes) -> PartitionSpec:
        return partition.rules.spec(tuple(None if axis in whole else axis for axis in axes))

    in_specs = {name: jax.tree.map(spec, axes, is_leaf=is_axes) for name, (_, axes) in args.items()}
    out_specs = jax.tree.map(spec, out_axes, is_leaf=is_axes)
    mapped = jax.shard_map(
        lambda kwargs: function(**kwargs),
        mesh=partition.mesh,
        in_specs=(in_specs,),
        out_specs=out_specs,
        check_vma=False,
    )
    return mapped(values)


def sum_over_shards(
    function: Callable[..., jax.Array],
    args: Mapping[str, tuple[Any, Any]],
    out_axes: LogicalAxes,
    batch: int,
    *,
    over: str,
    once: Collection[str],
    residual: str,
) -> jax.Array:
    """`on_shards`, followed by a sum of the results over the devices that the axis `over` is split over.

    The argument named `residual` is added once, by `function` if there is a single term and to the sum otherwise; the
    result has its dtype. `function` also receives the `out_dtype` of its result: the residual's dtype for a single
    term, float32 otherwise. Arguments named in `once` contribute to the sum once: all devices but the first get zeros.
    """
    partition = current()
    terms = partition.degree(over)

    def term(**own: Any) -> jax.Array:
        if terms == 1:
            return function(**own, out_dtype=own[residual].dtype)
        rest = own.pop(residual)
        own |= {name: jnp.where(partition.index(over) == 0, own[name], 0) for name in once}
        y = function(**own, out_dtype=jnp.float32)
        return add_residual(partition.reduce(y.reshape(-1, y.shape[-1]), over), rest)

    return on_shards(term, args, out_axes, batch)


def add_residual(y_ND: jax.Array, residual: jax.Array) -> jax.Array:
    """The sum of [N, D] and a residual of N rows [..., D], in the residual's shape and dtype.

    The sum is float32, rounded once. XLA omits the rounding between fused operations, but not across a reshape, so the
    sum is computed on rows: the residual stream is then as exact as on one device, where the op that computes `y` adds
    the residual.
    """
    sum_ND = y_ND.astype(jnp.float32) + residual.reshape(y_ND.shape).astype(jnp.float32)
    return sum_ND.astype(residual.dtype).reshape(residual.shape)


def is_axes(value: Any) -> bool:
    """Whether a node of a pytree is the logical axes of an array, that is, a leaf."""
    return isinstance(value, tuple) and all(axis is None or isinstance(axis, str) for axis in value)
