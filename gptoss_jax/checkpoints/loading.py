"""Builds models from checkpoints or with random weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp

from gptoss_jax.checkpoints.hub import resolve
from gptoss_jax.checkpoints.reader import open_checkpoint
from gptoss_jax.errors import UsageError
from gptoss_jax.model.config import ModelConfig
from gptoss_jax.model.gpt_oss import GptOss, weight_specs
from gptoss_jax.model.placement import partition_for, place, place_heads, preparer
from gptoss_jax.model.weights import Creator, Weight, WeightSpec, random_creator
from sharding import Partition, ShardingRules

EMBEDDED = Path(__file__).parents[1] / "embedded"
"""The small trained model that ships with the project."""

DTYPES = ("bfloat16", "float32")


def load_model(
    path: str | Path = EMBEDDED,
    mesh: str | jax.sharding.Mesh | None = None,
    dtype: str = "bfloat16",
    *,
    rules: ShardingRules | None = None,
    progress: bool | None = None,
) -> GptOss:
    """Load a checkpoint: a local directory, or a Hub name that is downloaded first.

    `dtype` is that of plain weights and of the computation; experts that the checkpoint stores in MXFP4 stay packed.
    `mesh` is a description such as `expert=4,tensor=2`, the name of a preset or a `jax.sharding.Mesh`, over which
    `rules` shard the weights; None is one device. `progress` shows a progress bar on stderr; None shows it if stderr is
    a terminal. Raises CheckpointError or ShardingError before anything is computed.
    """
    with open_checkpoint(resolve(path)) as checkpoint:
        checkpoint.validate(weight_specs(checkpoint.config))
        partition = partition_for(checkpoint.config, mesh, rules)
        create = partial(checkpoint.creator, check_dtype(dtype), progress=progress)
        return _build(checkpoint.config, create, partition)


def random_model(
    config: ModelConfig,
    mesh: str | jax.sharding.Mesh | None = None,
    dtype: str = "bfloat16",
    *,
    rules: ShardingRules | None = None,
    seed: int = 0,
) -> GptOss:
    """A model of any shape with random weights, for tests and benchmarks; packed experts are drawn in MXFP4.

    `mesh` and `rules` are as for `load_model`. Raises CheckpointError for an invalid config.
    """
    # Checks a config made in Python like one that is read from a file.
    config = ModelConfig.from_dict(config.to_dict())
    # Uses the hardware generator, because threefry takes minutes on a CPU for the released sizes.
    create = partial(random_creator, jax.random.key(seed, impl="rbg"), check_dtype(dtype))
    return _build(config, create, partition_for(config, mesh, rules))


def _build(config: ModelConfig, creator: Callable[..., Creator], partition: Partition) -> GptOss:
    """The model on its mesh.

    Each weight is created directly on its shards, except attention weights whose heads the mesh rearranges. Packed
    experts are prepared for the kernels one by one, in the order of `largest_first`.
    """
    specs = weight_specs(config)
    create = _on_device(creator, partition) if partition.mesh is None else _on_mesh(specs, creator, partition)
    weights = {spec.name: create(spec) for spec in largest_first(specs)}
    return GptOss(config, lambda spec: weights.pop(spec.name), partition)


def largest_first(specs: Iterable[WeightSpec]) -> list[WeightSpec]:
    """The order in which weights are created: by descending size, and weights of one kind layer by layer.

    Preparing a packed weight needs temporary memory. JAX's GPU allocator splits a free block only if at least half of
    it or 128 MiB remain; otherwise a smaller weight gets the whole block and wastes the rest for its lifetime. Creating
    weights layer by layer would waste up to a sixth of their size. In this order the next weight of a kind fits a freed
    block exactly, and smaller weights use freed blocks only after the last weight of a kind.
    """
    return sorted(specs, key=lambda spec: math.prod(spec.shape), reverse=True)


def _on_device(creator: Callable[..., Creator], partition: Partition) -> Creator:
    prepare, create = preparer(partition), creator(sharding=None)
    return lambda spec: prepare(create(spec), spec)


def _on_mesh(specs: Iterable[WeightSpec], creator: Callable[..., Creator], partition: Partition) -> Creator:
    # All weights are placed before the first is read, so that an impossible mesh raises at once.
    placed = {spec.name: place(spec, partition) for spec in specs}
    rearranged = {name for name, spec in placed.items() if any(spec.sources)}

    def sharding(spec: WeightSpec) -> jax.sharding.Sharding | None:
        return None if spec.name in rearranged else partition.sharding(spec.axes, spec.name)

    prepare, create = preparer(partition), creator(sharding=sharding)

    def create_placed(spec: WeightSpec) -> Weight:
        goal = placed[spec.name]
        if spec.name not in rearranged:
            return prepare(create(goal), goal)
        whole = create(spec)
        assert isinstance(whole, jax.Array), "only attention's weights have heads, and these are not packed"
        return place_heads(whole, goal, partition)

    return create_placed


def check_dtype(dtype: str) -> jnp.dtype:
    """The dtype named `dtype`. Raises UsageError."""
    if dtype not in DTYPES:
        raise UsageError(f"expected {' or '.join(DTYPES)}, found {dtype!r}", "dtype")
    return jnp.dtype(dtype)
