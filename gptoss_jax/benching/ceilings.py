"""What a device can do at most, measured in the run whose numbers are held against it."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gptoss_jax.engine.sampling import Means, SamplingState, sample

MEANS: dict[str, tuple[Means, dict[str, float]]] = {
    "greedy": ("greedy", {"temperature": 0.0}),
    "temperature": ("draw", {"temperature": 1.0}),
    "top_p": ("cut", {"temperature": 1.0, "top_p": 0.95}),
    "top_k_top_p": ("cut", {"temperature": 1.0, "top_p": 0.95, "top_k": 50}),
    "top_k_200": ("cut", {"temperature": 1.0, "top_k": 200}),
}
"""Ways to sample whose cost is told."""


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


def sampling_seconds(rows: int, vocab: int, rounds: int = 16) -> dict[str, float]:
    """Time of choosing `rows` tokens from float32 logits, in each way."""
    logits_RV = 3 * jax.random.normal(jax.random.key(0), (rows, vocab), jnp.float32)

    def seconds(means: Means, params: dict[str, float]) -> float:
        state = SamplingState(
            jnp.full(rows, params["temperature"], jnp.float32),
            jnp.full(rows, params.get("top_p", 1.0), jnp.float32),
            jnp.full(rows, params.get("top_k", 0), jnp.int32),
            jnp.zeros(rows, jnp.float32),
            jnp.arange(2 * rows, dtype=jnp.uint32).reshape(rows, 2),
        )

        @jax.jit
        def program(logits_RV: jax.Array, state: SamplingState) -> jax.Array:
            def body(i: jax.Array, tokens_R: jax.Array) -> jax.Array:
                # Else what depends on the logits alone would be done once, before the loop.
                own_RV, tokens_R = jax.lax.optimization_barrier((logits_RV, tokens_R))
                return sample(own_RV, state, i + tokens_R % 2, means)

            return jax.lax.fori_loop(0, rounds, body, jnp.zeros(rows, jnp.int32))

        return median_seconds(lambda: program(logits_RV, state), 3) / rounds

    return {name: seconds(*way) for name, way in MEANS.items()}
