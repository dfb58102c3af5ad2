"""How large a cache may be, worked out before the first allocation."""

from __future__ import annotations

import os

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from gptoss_jax.errors import UsageError, expect
from gptoss_jax.model.config import ModelConfig
from gptoss_jax.model.kv_cache import CacheShape, page_bytes, ring_bytes
from sharding import Partition, least

SHARE_OF_FREE = 0.85
"""Of an accelerator's free memory, the rest being for a step's temporaries.

And for the counts of tokens that there are once a request has penalties: 5 bytes a token of the vocabulary and slot.
"""

CPU_BYTES = 1 << 30
"""Most that a cache takes of a CPU's memory unless told otherwise."""

KV_DTYPES = {"bfloat16": jnp.bfloat16, "float32": jnp.float32, "float8": jnp.float8_e4m3fn}


def kv_dtype(name: str) -> DTypeLike:
    """The dtype of `--kv-cache-dtype`. Raises UsageError."""
    expect(name in list(KV_DTYPES), "kv_cache_dtype", ", ".join(KV_DTYPES), name)
    return KV_DTYPES[name]


def cache_budget(device: jax.Device, memory: int | None, utilization: float | None) -> int:
    """Bytes that a cache may take of a device: as many as `memory`, or what weights leave of a share of its memory.

    With neither it is a share of the free memory, or a bounded part of a CPU's. Of several processes, which must build
    the same cache, the one with the least decides. Raises UsageError for a utilization that cannot be kept to.
    """
    if memory is not None:
        return memory
    stats = device.memory_stats() if device.platform != "cpu" else None
    if stats is not None and "bytes_limit" not in stats:
        stats = None
    if utilization is not None and stats is None:
        raise UsageError(
            f"gpu_memory_utilization: expected a device that reports its memory, found {device.device_kind}: "
            f"kv_cache_memory sets the cache's size"
        )
    budget = least(_free_bytes(stats, utilization) >> 20) << 20
    expect(budget > 0, "gpu_memory_utilization", "a share larger than what the weights take", utilization)
    return budget


def _free_bytes(stats: dict[str, int] | None, utilization: float | None) -> int:
    if stats is not None:
        limit, used = stats["bytes_limit"], stats["bytes_in_use"]
        return (
            int(SHARE_OF_FREE * (limit - used)) if utilization is None else max(0, int(utilization * limit) - used)
        )
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(CPU_BYTES, free // 4)


def cache_shape(
    config: ModelConfig,
    partition: Partition,
    budget: int,
    *,
    slots: int,
    max_model_len: int,
    page_size: int,
    dtype: DTypeLike,
    enable_prefix_caching: bool = True,
    ring_slack: int = 0,
) -> CacheShape:
    """The cache of each part of the batch whose share on one device takes at most `budget` bytes.

    Raises UsageError, with the numbers, if not even one page would be left.
    """
    heads = len(partition.heads.kv_sources) // partition.degree("kv_heads")
    page = page_bytes(config, page_size, dtype, heads)
    ring = ring_bytes(config, config.sliding_window + ring_slack, dtype, heads)
    snapshots = 0
    if enable_prefix_caching:
        snapshots = max(2, min(8 * slots, budget // 8 // ring if ring else 64))
    left = budget - (slots + snapshots) * ring
    # Twice what all slots could use, so that prefixes have room beside running sequences.
    most = 2 * slots * (-(-max_model_len // page_size) + 1)
    pages = min(most, left // page if page else most)
    if pages < 2:
        raise UsageError(
            f"kv_cache_memory: {budget} bytes do not hold rings of {ring} bytes for {slots} sequences and {snapshots} "
            f"prefixes and 2 pages of {page} bytes: expected at least {(slots + snapshots) * ring + 2 * page}"
        )
    return CacheShape(pages, page_size, slots, snapshots, ring_slack)
