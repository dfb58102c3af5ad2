"""What a device can do at most, measured in the run whose numbers are held against it."""

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
    """Of one device: bytes a second of a large copy, read plus written, and operations a second of a matrix product."""

    copy_bytes: float
    matmul_flops: float


def median_seconds(run: Callable[[], Any], repeats: int = 5) -> float:
    """The median time of `run`, which returns what to wait for, after one that does not count."""
    times = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def measure_ceilings(dtype: str) -> Ceilings:
    """Both for the default device; matrix products in `dtype`."""
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
