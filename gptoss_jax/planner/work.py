"""The minimum work of a step on each device, independent of the program: bytes read, and operations."""

from __future__ import annotations

import dataclasses
import math
import statistics

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from gptoss_jax.model.config import ModelConfig
from gptoss_jax.model.gpt_oss import weight_specs
from gptoss_jax.model.mxfp4 import GROUP
from gptoss_jax.model.placement import place
from gptoss_jax.model.weights import WeightSpec
from sharding import Partition
from sharding.compiled.program import Collectives


@dataclasses.dataclass(frozen=True)
class Load:
    """One call's load over all devices: `tokens` tokens of each of `sequences` sequences, the last at `context`."""

    sequences: int
    tokens: int
    context: int


@dataclasses.dataclass(frozen=True)
class Work:
    """Work per device: bf16 operations, bytes of weights read, and bytes of keys and values read.

    Of the experts, `weight_bytes` includes as many as uniform routing touches. `uneven_bytes` is the expected excess of
    the device with the most touched experts, for which all others wait. `grouped` is whether several tokens share the
    experts, so that the tokens are grouped by expert.
    """

    flops: float
    weight_bytes: float
    cache_bytes: float
    uneven_bytes: float
    grouped: bool

    @property
    def num_bytes(self) -> float:
        """All bytes read; activations are negligible in comparison."""
        return self.weight_bytes + self.cache_bytes

    @property
    def busiest_bytes(self) -> float:
        """Bytes read by the device with the most touched experts."""
        return self.num_bytes + self.uneven_bytes


def touched_experts(experts: int, chosen: int, tokens: float) -> float:
    """Expected number of distinct experts if each token chooses `chosen` of `experts` uniformly."""
    return experts * (1 - (1 - chosen / experts) ** tokens)


def uneven_share(experts: int, devices: int, touched: float) -> float:
    """Expected excess of the device with the most touched experts over the mean, as a fraction of the mean.

    `touched` is the touched fraction of all experts. The count on each device is approximated as normal, and the
    expected maximum over `devices` by Blom's formula.
    """
    if devices == 1 or not touched:
        return 0.0
    largest = statistics.NormalDist().inv_cdf((devices - 0.375) / (devices + 0.25))
    return min(largest * math.sqrt((1 - touched) * devices / (touched * experts)), 1 / touched - 1)


def work_of(config: ModelConfig, partition: Partition, load: Load, dtype: DTypeLike = jnp.bfloat16) -> Work:
    """The work of one call on the busiest device."""
    sequences = _share(load.sequences, partition, "batch")
    rows = _share(load.sequences, partition, "samples")
    tokens = sequences * load.tokens
    routed = expert_tokens(partition, load)
    itemsize = jnp.dtype(dtype).itemsize
    touched = touched_experts(config.num_local_experts, config.num_experts_per_tok, routed)
    touched /= config.num_local_experts
    uneven = uneven_share(config.num_local_experts, partition.degree("experts"), touched)
    flops = weight_bytes = uneven_bytes = 0.0
    for spec in weight_specs(config):
        held, size = local_size(place(spec, partition), partition), 0.0
        packed = held / 2 + held / GROUP
        if spec.name.startswith("model.embed_tokens"):
            weight_bytes += tokens * config.hidden_size * itemsize
            continue
        size = packed if spec.packed else held * itemsize
        if spec.axes[0] == "experts":
            size *= touched
            uneven_bytes += uneven * size
            per_token = routed * config.num_experts_per_tok / config.num_local_experts
        else:
            per_token = rows if spec.name.startswith("lm_head") else tokens
        weight_bytes += size
        flops += 2 * held * per_token if len(spec.shape) > 1 else 0
    scores, cache_bytes = _attention(config, partition, load, sequences, itemsize)
    return Work(flops + scores, weight_bytes, cache_bytes, uneven_bytes, routed > 1)


def local_size(spec: WeightSpec, partition: Partition) -> float:
    """Elements of a placed weight on one device."""
    return math.prod(n / partition.degree(axis) for n, axis in zip(spec.shape, spec.axes, strict=True))


def held_bytes(tree: object) -> int:
    """Bytes on one device of abstract arrays; an array without a sharding counts in full."""

    def one(x: jax.ShapeDtypeStruct) -> int:
        shape = x.shape if x.sharding is None else x.sharding.shard_shape(x.shape)
        return math.prod(shape) * x.dtype.itemsize

    return sum(one(x) for x in jax.tree.leaves(tree))


def expert_tokens(partition: Partition, load: Load) -> float:
    """Number of tokens that may be routed to the experts of one device."""
    if partition.mesh is None:
        return load.sequences * load.tokens
    rules = partition.rules
    others = [axis for axis in rules.batch if axis not in rules.experts]
    return load.sequences * load.tokens / math.prod(partition.mesh.shape[axis] for axis in others)


def expected_collectives(
    config: ModelConfig, partition: Partition, load: Load, dtype: DTypeLike = jnp.bfloat16
) -> list[Collectives]:
    """The two all-reduces of each layer, for ranking meshes before they are compiled."""
    if partition.mesh is None:
        return []
    rules, shape = partition.rules, partition.mesh.shape
    tokens = _share(load.sequences, partition, "batch") * load.tokens
    row = config.hidden_size * jnp.dtype(dtype).itemsize
    attention = int(tokens * 2 * row), rules.heads
    experts = int(expert_tokens(partition, load) * row), (*rules.experts, *rules.expert_intermediate)
    found = []
    for num_bytes, axes in (attention, experts):
        group = _group(shape, axes)
        layers = config.num_hidden_layers
        found.append(Collectives("all-reduce", axes, group, False, layers, layers * num_bytes))
    return found


def _group(shape: dict[str, int], axes: tuple[str, ...]) -> tuple[int, ...]:
    """The devices with coordinate 0 on every axis except `axes`."""
    group, stride = [0], 1
    for name, size in reversed(shape.items()):
        if name in axes:
            group = [base + i * stride for i in range(size) for base in group]
        stride *= size
    return tuple(sorted(group))


def _share(sequences: int, partition: Partition, axis: str) -> int:
    """Sequences per shard of `axis`, rounded up: shards with fewer are padded."""
    return -(-sequences // partition.degree(axis))


def _attention(
    config: ModelConfig, partition: Partition, load: Load, sequences: float, itemsize: int
) -> tuple[float, float]:
    """Operations of scores and weighted sums, and bytes of keys and values, each read once per call."""
    heads = partition.heads
    queries = len(heads.q_sources) / partition.degree("heads")
    keys = len(heads.kv_sources) / partition.degree("kv_heads")
    flops = num_bytes = 0.0
    for layer in range(config.num_hidden_layers):
        window = config.window(layer) or load.context
        read = min(load.context, window + load.tokens - 1)
        seen = min(window, load.context - (load.tokens - 1) / 2)
        num_bytes += sequences * read * keys * 2 * config.head_dim * itemsize
        flops += 4 * sequences * load.tokens * seen * queries * config.head_dim
    return flops, num_bytes
