"""Timing of programs on a device, and its read bandwidth for comparison."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp


def seconds(function: Callable[..., Any], *args: Any, repeats: int = 7, inner: int = 3) -> float:
    """Seconds per call of a jitted function: the minimum over `repeats` of the mean of `inner` consecutive calls."""
    jax.block_until_ready(function(*args))
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(inner):
            out = function(*args)
        jax.block_until_ready(out)
        best = min(best, (time.perf_counter() - start) / inner)
    return best


def chained_seconds(
    step: Callable[..., jax.Array], carry: jax.Array, sets: Sequence[Any], calls: int = 24
) -> float:
    """Seconds per `step(carry, set)`, in one program of `calls` dependent steps that cycle through the sets.

    If the sets together exceed the cache, each step reads memory; a single program makes host overhead negligible.
    """

    @jax.jit
    def program(carry: jax.Array, sets: Sequence[Any]) -> jax.Array:
        for i in range(calls):
            carry = step(carry, sets[i % len(sets)])
        return carry

    return seconds(program, carry, sets) / calls


def read_bandwidth(megabytes: int = 4096) -> float:
    """Bytes per second of a sum over an array far larger than any cache."""
    x = jnp.ones((megabytes * 256, 1024), jnp.float32)
    return x.nbytes / seconds(jax.jit(lambda x: jnp.sum(x, axis=1)), x)
