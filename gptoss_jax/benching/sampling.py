"""What each way to choose a batch's tokens adds to a step."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptoss_jax.benching.batch import REPLAYED_STEPS, Case, decoding
from gptoss_jax.benching.ceilings import median_seconds
from gptoss_jax.engine.engine import Engine
from gptoss_jax.engine.sampling import SamplingState, sample
from gptoss_jax.errors import UsageError
from gptoss_jax.types import SamplingParams, Scope, StructuredOutputsParams

ROUNDS = 16
REPLAYS = 5
"""Of which the median counts."""

WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "top_k_top_p": {"temperature": 1.0, "top_p": 0.95, "top_k": 50},
    "top_p": {"temperature": 1.0, "top_p": 0.95},
    "top_k_200": {"temperature": 1.0, "top_k": 200},
    "temperature": {"temperature": 1.0},
    "penalties": {"temperature": 0.0, "repetition_penalty": 1.1, "frequency_penalty": 0.1},
    "bias": {"temperature": 0.0, "logit_bias": {1: 1.0}},
    "logprobs": {"temperature": 0.0, "logprobs": 5},
    "mask": {"temperature": 0.0, "structured_outputs": StructuredOutputsParams(regex=".*")},
}


def ways(text: str) -> tuple[str, ...]:
    """The names of `WAYS` in a flag's text, "all" for every one. Raises UsageError."""
    names = tuple(WAYS) if text == "all" else tuple(text.split(","))
    for name in names:
        if name not in WAYS:
            raise UsageError(f"--sampling: expected some of {','.join(WAYS)}, found {name!r:.60}")
    return names


class EveryOther:
    """A constraint that allows half of the vocabulary."""

    def fill(self, bitmask: np.ndarray) -> None:
        """Set the bits of the tokens that may come next."""
        bitmask[:] = 0x55555555

    def accept(self, token: int) -> None:
        """Nothing follows from it."""


def every_other(params: StructuredOutputsParams, scope: Scope) -> EveryOther:
    """The constraint for any form."""
    return EveryOther()


def sampling_seconds(
    engine: Engine, case: Case, rng: np.random.Generator, ways: Iterable[str]
) -> dict[str, float]:
    """The time of choosing the likeliest tokens, and how much more a step takes in each of `ways` with that.

    Each is told on standard error as soon as it is known, since compiling them takes minutes.
    """
    greedy = greedy_seconds(case.batch, engine.config.vocab_size)
    steps: dict[str, float] = {}
    found = {}
    for name in dict.fromkeys(("greedy", *ways)):
        with decoding(engine, SamplingParams(**WAYS[name]), case, rng):
            steps[name] = statistics.median(engine.replay(REPLAYED_STEPS) for _ in range(REPLAYS))
        found[name] = max(0.0, steps[name] - steps["greedy"]) + greedy
        print(
            f"  {name}: {1e6 * found[name]:.0f} us, {found[name] / steps['greedy']:.1%} of a step", file=sys.stderr
        )
    return found


def greedy_seconds(rows: int, vocab: int) -> float:
    """The time of choosing the likeliest of float32 logits for each row."""
    logits_RV = jax.random.normal(jax.random.key(0), (rows, vocab), jnp.float32)
    zeros_R = jnp.zeros(rows, jnp.float32)
    state = SamplingState(zeros_R, zeros_R, zeros_R.astype(jnp.int32), zeros_R, jnp.zeros((rows, 2), jnp.uint32))

    @jax.jit
    def program(logits_RV: jax.Array, state: SamplingState) -> jax.Array:
        def body(_: jax.Array, tokens_R: jax.Array) -> jax.Array:
            # Else it would be done once, before the loop.
            own_RV, tokens_R = jax.lax.optimization_barrier((logits_RV, tokens_R))
            return sample(own_RV, state, tokens_R, "greedy")

        return jax.lax.fori_loop(0, ROUNDS, body, jnp.zeros(rows, jnp.int32))

    return median_seconds(lambda: program(logits_RV, state), 3) / ROUNDS
