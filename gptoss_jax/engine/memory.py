"""Computes the size of the KV cache, before anything of it is allocated."""

from __future__ import annotations

import os

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from gptoss_jax.errors import UsageError, expect
from gptoss_jax.model.config import ModelConfig
from gptoss_jax.model.kv_cache import CacheShape, page_bytes
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
    step_tokens: int,
    ahead: int = 1,
    enable_prefix_caching: bool = True,
) -> CacheShape:
    """The largest cache of each data-parallel rank that takes at most `budget` bytes on each device.

    `step_tokens` is the number of tokens of a step, and `ahead` of those that a launch can decode of a sequence; two
    launches are in flight. Raises UsageError, with the numbers, if the budget leaves fewer than two pages.
    """
    heads = len(partition.heads.kv_sources) // partition.degree("kv_heads")
    page, sliding_page = (
        page_bytes(config, layers, page_size, dtype, heads) for layers in ("full_attention", "sliding_attention")
    )
    table = -(-max_model_len // page_size)
    # A sequence keeps the window before its last whole page, and the pages from there to what is in flight.
    window = -(-(config.sliding_window - 1) // page_size)
    own = min(window + -(-(page_size - 1 + 2 * ahead) // page_size), table)
    in_flight = min(2 * -(-step_tokens // page_size), slots * (table - own))
    sliding_pages = slots * own + in_flight
    if enable_prefix_caching:
        # As many windows of cached prefixes as a few per slot, within an eighth of the budget.
        affordable = budget // 8 // sliding_page if sliding_page else 8 * slots * own
        sliding_pages += max(2 * own, min(8 * slots * own, affordable))
    least = sliding_pages * sliding_page + 2 * page
    # Twice what all slots can use, which leaves pages for cached prefixes besides running sequences.
    most = 2 * slots * (table + 1)
    pages = min(most, (budget - sliding_pages * sliding_page) // page if page else most)
    if pages < 2:
        raise UsageError(
            f"{budget} bytes do not hold {sliding_pages} pages of {sliding_page} bytes for the sliding layers of "
            f"{slots} sequences, and 2 pages of {page} bytes for the others: expected at least {least}",
            "kv_cache_memory",
        )
    return CacheShape(slots, page_size, pages, sliding_pages, table, min(own + in_flight + 1, table))
