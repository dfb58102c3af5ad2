"""Peak rates of a device, measured in the same run as the numbers that are compared with them."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """Peak rates of one device.

    `copy_bytes` is bytes per second of a large copy, read plus written; `matmul_flops` is operations per second of a
    large matrix product.
    """

    copy_bytes: float
    matmul_flops: float


def median_seconds(run: Callable[[], Any], repeats: int = 5) -> float:
    """Median seconds of `run`, which returns the arrays to block on, after one warm-up call."""
    times = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def measure_ceilings(dtype: str) -> Ceilings:
    """Measure the default device, with matrix products in `dtype`."""
    cpu = jax.default_backend() == "cpu"
    size, width, calls = (1 << 25, 1024, 2) if cpu else (1 << 28, 8192, 8)
    x = jnp.arange(size, dtype=jnp.uint32)
    flip = jax.jit(lambda x: ~x)

    def copies() -> jax.Array:
        y = x
        for _ in range(calls):
            y = flip(y)
        return y

    a = jax.random.normal(jax.random.key(0), (width, width), jnp.float32).astype(dtype)
    product = jax.jit(lambda a, b: a @ b)

    def products() -> jax.Array:
        b = a
        for _ in range(calls):
            b = product(a, b)
        return b

    copy_bytes = 2 * x.nbytes * calls / median_seconds(copies)
    return Ceilings(copy_bytes, 2 * width**3 * calls / median_seconds(products))
