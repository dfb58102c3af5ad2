"""Time that each sampling mode adds to a step."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptoss_jax.benching.batch import REPLAYED_STEPS, Workload, decoding
from gptoss_jax.benching.ceilings import median_seconds
from gptoss_jax.engine.engine import Engine
from gptoss_jax.engine.sampling import SamplingState, sample
from gptoss_jax.errors import UsageError
from gptoss_jax.types import SamplingParams, Scope, StructuredOutputsParams

GREEDY_CALLS = 16
REPLAYS = 5
"""Number of replays, whose median is reported."""

SAMPLING_MODES: dict[str, dict[str, Any]] = {
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


def sampling_modes(text: str) -> tuple[str, ...]:
    """The names of `SAMPLING_MODES` in a flag's value; "all" means every one. Raises UsageError."""
    names = tuple(SAMPLING_MODES) if text == "all" else tuple(text.split(","))
    for name in names:
        if name not in SAMPLING_MODES:
            raise UsageError(f"expected some of {','.join(SAMPLING_MODES)}, found {name!r:.60}", "--sampling")
    return names


class HalfVocabulary:
    """A constraint that always allows every other token of the vocabulary."""

    unrestricted = False

    def fill(self, bitmask: np.ndarray) -> None:
        """Set the bits of the allowed tokens."""
        bitmask[:] = 0x55555555

    def accept(self, token: int) -> None:
        """Ignore the token: the constraint has no state."""


def half_vocabulary(params: StructuredOutputsParams | None, scope: Scope) -> HalfVocabulary:
    """Return the same constraint for every grammar."""
    return HalfVocabulary()


def sampling_seconds(
    engine: Engine, workload: Workload, rng: np.random.Generator, modes: Iterable[str]
) -> dict[str, float]:
    """Seconds that each of `modes`, and greedy sampling, take in a step.

    Greedy sampling is timed alone; the other modes add the difference between their step and the greedy one. Each
    result is printed to standard error as soon as it is known, because compiling all modes takes minutes.
    """
    greedy = greedy_seconds(workload.batch, engine.config.vocab_size)
    steps: dict[str, float] = {}
    found = {}
    for name in dict.fromkeys(("greedy", *modes)):
        with decoding(engine, SamplingParams(**SAMPLING_MODES[name]), workload, rng):
            steps[name] = statistics.median(engine.replay(REPLAYED_STEPS) for _ in range(REPLAYS))
        found[name] = max(0.0, steps[name] - steps["greedy"]) + greedy
        print(
            f"  {name}: {1e6 * found[name]:.0f} us, {found[name] / steps['greedy']:.1%} of a step", file=sys.stderr
        )
    return found


def greedy_seconds(rows: int, vocab: int) -> float:
    """Seconds of sampling from float32 logits [rows, vocab] without cuts, for greedy rows as for random ones."""
    logits_RV = jax.random.normal(jax.random.key(0), (rows, vocab), jnp.float32)
    zeros_R = jnp.zeros(rows, jnp.float32)
    state = SamplingState(zeros_R, zeros_R, zeros_R.astype(jnp.int32), zeros_R, jnp.zeros((rows, 2), jnp.uint32))

    @jax.jit
    def program(logits_RV: jax.Array, state: SamplingState) -> jax.Array:
        def body(_: jax.Array, tokens_R: jax.Array) -> jax.Array:
            # Without the barrier, XLA would hoist the sampling out of the loop.
            own_RV, tokens_R = jax.lax.optimization_barrier((logits_RV, tokens_R))
            return sample(own_RV, state, tokens_R, cuts=False)

        return jax.lax.fori_loop(0, GREEDY_CALLS, body, jnp.zeros(rows, jnp.int32))

    return median_seconds(lambda: program(logits_RV, state), 3) / GREEDY_CALLS
