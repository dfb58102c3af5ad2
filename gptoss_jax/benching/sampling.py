"""How long choosing a batch's tokens from their logits takes, in each way that requests can ask for."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp

from gptoss_jax.benching.ceilings import median_seconds
from gptoss_jax.engine.adjusting import Adjustments, Penalties, adjust
from gptoss_jax.engine.compiling import compiler_options
from gptoss_jax.engine.sampling import Means, SamplingState, sample

BIASES = 64


@dataclasses.dataclass(frozen=True)
class Way:
    """Settings that all rows share; `adjusted` ones have biases too, and penalties or a mask."""

    means: Means
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    penalised: bool = False
    masked: bool = False


WAYS = {
    "greedy": Way("greedy", 0.0),
    "temperature": Way("draw"),
    "top_p": Way("cut", top_p=0.95),
    "top_k_top_p": Way("cut", top_p=0.95, top_k=50),
    "top_k_200": Way("cut", top_k=200),
    "greedy_penalties": Way("greedy", 0.0, penalised=True),
    "greedy_mask": Way("greedy", 0.0, masked=True),
}


def sampling_seconds(rows: int, vocab: int, rounds: int = 16) -> dict[str, float]:
    """Time of choosing `rows` tokens from float32 logits, in each way."""
    logits_RV = 3 * jax.random.normal(jax.random.key(0), (rows, vocab), jnp.float32)
    return {name: _seconds(way, logits_RV, rounds) for name, way in WAYS.items()}


def _seconds(way: Way, logits_RV: jax.Array, rounds: int) -> float:
    rows = len(logits_RV)
    state = SamplingState(
        jnp.full(rows, way.temperature, jnp.float32),
        jnp.full(rows, way.top_p, jnp.float32),
        jnp.full(rows, way.top_k, jnp.int32),
        jnp.zeros(rows, jnp.float32),
        jnp.arange(2 * rows, dtype=jnp.uint32).reshape(rows, 2),
    )
    adjustments = _adjustments(way, *logits_RV.shape)

    @partial(jax.jit, compiler_options=compiler_options())
    def program(logits_RV: jax.Array, state: SamplingState, adjustments: Adjustments | None) -> jax.Array:
        def body(i: jax.Array, tokens_R: jax.Array) -> jax.Array:
            # Else what depends on these alone would be done once, before the loop.
            own_RV, by, tokens_R = jax.lax.optimization_barrier((logits_RV, adjustments, tokens_R))
            own_RV = own_RV if by is None else adjust(own_RV, by)
            return sample(own_RV, state, i + tokens_R % 2, way.means)

        return jax.lax.fori_loop(0, rounds, body, jnp.zeros(rows, jnp.int32))

    return median_seconds(lambda: program(logits_RV, state, adjustments), 3) / rounds


def _adjustments(way: Way, rows: int, vocab: int) -> Adjustments | None:
    """Of a sequence whose prompt has every fourth token and whose output every eighth; every other one is allowed."""
    if not (way.penalised or way.masked):
        return None
    tokens_RV = jnp.broadcast_to(jnp.arange(vocab), (rows, vocab))
    factor_R = jnp.ones(rows, jnp.float32)
    counts_RV = (tokens_RV % 8 == 0).astype(jnp.int32)
    penalties = Penalties(1.1 * factor_R, 0.1 * factor_R, 0.1 * factor_R, counts_RV, tokens_RV % 4 == 0)
    return Adjustments(
        jnp.broadcast_to(jnp.arange(BIASES), (rows, BIASES)),
        jnp.ones((rows, BIASES), jnp.float32),
        penalties if way.penalised else None,
        jnp.full((rows, -(-vocab // 32)), 0x55555555, jnp.uint32) if way.masked else None,
    )
