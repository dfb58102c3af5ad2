"""Computes the size of the KV cache, before anything of it is allocated."""

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
"""The default fraction of an accelerator's free memory for the cache.

The rest is for a step's temporaries and, once a request has penalties, for token counts: 5 bytes per slot and token of
the vocabulary.
"""

CPU_BYTES = 1 << 30
"""The maximum default size of the cache on CPUs."""

KV_DTYPES = {"bfloat16": jnp.bfloat16, "float32": jnp.float32, "float8": jnp.float8_e4m3fn}


def kv_dtype(name: str) -> DTypeLike:
    """The dtype of `--kv-cache-dtype`. Raises UsageError."""
    expect(name in list(KV_DTYPES), "kv_cache_dtype", ", ".join(KV_DTYPES), name)
    return KV_DTYPES[name]


def cache_budget(device: jax.Device, memory: int | None, utilization: float | None) -> int:
    """The size of the cache on each device in bytes: `memory`, or what the weights leave of the `utilization`.

    With neither it is a fraction of the free memory, with an upper bound on CPUs. Several processes use the minimum of
    their sizes. Raises UsageError if the device does not report its memory, or if the weights exceed the utilization.
    """
    if memory is not None:
        return memory
    stats = device.memory_stats() if device.platform != "cpu" else None
    if stats is not None and "bytes_limit" not in stats:
        stats = None
    if utilization is not None and stats is None:
        raise UsageError(
            f"expected a device that reports its memory, found {device.device_kind}: "
            "set kv_cache_memory (--kv-cache-memory) instead",
            "gpu_memory_utilization",
        )
    budget = least(_free_bytes(stats, utilization) >> 20) << 20
    fits = utilization is None or budget > 0
    expect(fits, "gpu_memory_utilization", "a fraction larger than the weights take", utilization)
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
    """The largest cache of each data-parallel rank that takes at most `budget` bytes on each device.

    Raises UsageError, with the numbers, if the budget leaves fewer than two pages.
    """
    heads = len(partition.heads.kv_sources) // partition.degree("kv_heads")
    page = page_bytes(config, page_size, dtype, heads)
    ring = ring_bytes(config, config.sliding_window + ring_slack, dtype, heads)
    snapshots = 0
    if enable_prefix_caching:
        snapshots = max(2, min(8 * slots, budget // 8 // ring if ring else 64))
    left = budget - (slots + snapshots) * ring
    # Twice what all slots can use, which leaves pages for cached prefixes besides running sequences.
    most = 2 * slots * (-(-max_model_len // page_size) + 1)
    pages = min(most, left // page if page else most)
    if pages < 2:
        raise UsageError(
            f"{budget} bytes do not hold {slots + snapshots} rings of {ring} bytes, for {slots} "
            f"sequences and {snapshots} cached prefixes, and 2 pages of {page} bytes: "
            f"expected at least {(slots + snapshots) * ring + 2 * page}",
            "kv_cache_memory",
        )
    return CacheShape(pages, page_size, slots, snapshots, ring_slack)
