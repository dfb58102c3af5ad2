"""What requests change of the logits before a token is chosen: penalties, biases and masks."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Penalties:
    """What the tokens so far change, with `repetition`, `presence` and `frequency` float32 [..., R].

    `counts` int32 and `in_prompt` bool [..., R, V] say how often each token has been generated, and which of them the
    prompt has; the host leaves them out, since they are kept on the device.
    """

    repetition: jax.Array
    presence: jax.Array
    frequency: jax.Array
    counts: jax.Array | None = None
    in_prompt: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adjustments:
    """What changes the logits of each row before sampling.

    Args:
      bias_ids, bias: int32 and float32 [..., R, N], added to single tokens; ids past the vocabulary are ignored.
      penalties: None where no row has any.
      allowed: uint32 [..., R, V / 32 rounded up], a bit a token that may be chosen; None where all may.
    """

    bias_ids: jax.Array
    bias: jax.Array
    penalties: Penalties | None = None
    allowed: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AdjustedRows:
    """Adjustments of K of a step's R rows: `rows` int32 [..., K] says which, R for none."""

    rows: jax.Array
    by: Adjustments


def adjust(logits_RV: jax.Array, by: Adjustments) -> jax.Array:
    """Penalties, then biases, then what is not allowed."""
    if by.penalties is not None:
        logits_RV = _penalise(logits_RV, by.penalties)
    rows = jnp.indices(by.bias_ids.shape, sparse=True)[:-1]
    logits_RV = logits_RV.at[(*rows, by.bias_ids)].add(by.bias, mode="drop")
    if by.allowed is None:
        return logits_RV
    tokens = jnp.arange(logits_RV.shape[-1])
    words_RV = jnp.take(by.allowed, tokens // 32, axis=-1)
    return jnp.where((words_RV >> (tokens % 32).astype(jnp.uint32)) & 1 == 1, logits_RV, -jnp.inf)


def _penalise(logits_RV: jax.Array, by: Penalties) -> jax.Array:
    """As vLLM and the OpenAI API define it.

    The repetition penalty divides positive logits and multiplies negative ones of tokens seen in prompt or output;
    frequency and presence penalties are subtracted for tokens in the output.
    """
    assert by.counts is not None
    assert by.in_prompt is not None
    seen_RV = by.in_prompt | (by.counts > 0)
    factor_R1 = by.repetition[..., None]
    penalised_RV = jnp.where(logits_RV > 0, logits_RV / factor_R1, logits_RV * factor_R1)
    logits_RV = jnp.where(seen_RV, penalised_RV, logits_RV)
    return logits_RV - (by.frequency[..., None] * by.counts + by.presence[..., None] * (by.counts > 0))
