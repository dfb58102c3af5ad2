"""The routing op on NVIDIA GPUs for few tokens: norm, router and top k in one program a token."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.linear.triton import pieces

MOST_TOKENS = 64
"""Above, each token reading the router for itself costs more than a matrix product."""

MOST_ELEMENTS = 65536
"""Router weights that a program holds in registers at a time."""


def route(
    x_TD: jax.Array,
    norm_D: jax.Array,
    weight_ED: jax.Array,
    bias_E: jax.Array,
    *,
    k: int,
    eps: float,
    interpret: bool,
    num_warps: int = 16,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See `pallas_kernels.routing.route`."""
    tokens, hidden = x_TD.shape
    if tokens > MOST_TOKENS:
        raise NotImplementedError(f"more than {MOST_TOKENS} tokens")
    if hidden % 16:
        raise NotImplementedError(f"{hidden} columns are not a multiple of 16")
    slots = pl.next_power_of_2(k)
    normed_TD, ids, weights = pl.pallas_call(
        functools.partial(_kernel, k=k, eps=eps),
        grid=(tokens,),
        out_shape=[
            jax.ShapeDtypeStruct(x_TD.shape, x_TD.dtype),
            jax.ShapeDtypeStruct((tokens, slots), jnp.int32),
            jax.ShapeDtypeStruct((tokens, slots), jnp.float32),
        ],
        compiler_params=plt.CompilerParams(num_warps=num_warps, num_stages=1),
        interpret=interpret,
        name="route",
    )(x_TD, norm_D, weight_ED, bias_E)
    return normed_TD, ids[:, :k], weights[:, :k]


def _kernel(
    x_ref: Any,
    norm_ref: Any,
    weight_ref: Any,
    bias_ref: Any,
    normed_ref: Any,
    ids_ref: Any,
    weights_ref: Any,
    *,
    k: int,
    eps: float,
) -> None:
    token = pl.program_id(0)
    experts, hidden = weight_ref.shape
    padded = pl.next_power_of_2(experts)
    expert = jnp.arange(padded)
    here = expert < experts
    squares = jnp.float32(0)
    cut = list(pieces(hidden, max(16, min(2048, MOST_ELEMENTS // padded))))
    for start, size in cut:
        x_C = x_ref[token, pl.ds(start, size)].astype(jnp.float32)
        squares += jnp.sum(x_C * x_C)
    scale = lax.rsqrt(squares / hidden + eps)
    logits_E = plt.load(bias_ref.at[expert], mask=here, other=0.0).astype(jnp.float32)
    for start, size in cut:
        at = pl.ds(start, size)
        x_C = x_ref[token, at].astype(jnp.float32) * scale * norm_ref[at].astype(jnp.float32)
        normed_C = x_C.astype(normed_ref.dtype)
        normed_ref[token, at] = normed_C
        weight_EC = plt.load(
            weight_ref.at[pl.ds(0, padded), at], mask=jnp.broadcast_to(here[:, None], (padded, size)), other=0.0
        )
        logits_E += jnp.sum(weight_EC.astype(jnp.float32) * normed_C.astype(jnp.float32)[None, :], axis=1)
    _top_k(jnp.where(here, logits_E, -jnp.inf), token, ids_ref, weights_ref, k)


def _top_k(logits_E: jax.Array, token: jax.Array, ids_ref: Any, weights_ref: Any, k: int) -> None:
    """Write the k largest, one after the other, and their softmax."""
    expert = jnp.arange(logits_E.shape[0])
    slot = jnp.arange(ids_ref.shape[1])
    ids = jnp.zeros(slot.shape, jnp.int32)
    weights = jnp.zeros(slot.shape, jnp.float32)
    largest = jnp.max(logits_E)
    for i in range(k):
        top = jnp.max(logits_E)
        best = jnp.min(jnp.where(logits_E == top, expert, logits_E.shape[0]))
        ids = jnp.where(slot == i, best, ids)
        weights = jnp.where(slot == i, jnp.exp(top - largest), weights)
        logits_E = jnp.where(expert == best, -jnp.inf, logits_E)
    weights_ref[token, :] = weights / jnp.sum(weights)
    ids_ref[token, :] = ids
