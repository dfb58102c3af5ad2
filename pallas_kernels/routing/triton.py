"""The routing op on NVIDIA GPUs for few tokens: one warp per expert and token, then a top-k in registers."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.linear.triton import LARGEST_PIECE, pieces
from pallas_kernels.routing import reference

MAX_TOKENS = 64
"""Above this, reading the router once per token costs more than XLA's matrix product and sort."""


def route(
    x_TD: jax.Array,
    norm_D: jax.Array,
    weight_ED: jax.Array,
    bias_E: jax.Array,
    *,
    k: int,
    eps: float,
    interpret: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See `pallas_kernels.routing.route`."""
    tokens, hidden = x_TD.shape
    experts = weight_ED.shape[0]
    if tokens > MAX_TOKENS:
        return reference.route(x_TD, norm_D, weight_ED, bias_E, k=k, eps=eps)
    if hidden % 16:
        raise NotImplementedError(f"{hidden} columns are not a multiple of 16")
    call = functools.partial(pl.pallas_call, interpret=interpret)
    one_warp = plt.CompilerParams(num_warps=1, num_stages=1)
    normed_TD, logits_TE = call(
        functools.partial(_logits_kernel, eps=eps),
        grid=(experts, tokens),
        out_shape=[
            jax.ShapeDtypeStruct(x_TD.shape, x_TD.dtype),
            jax.ShapeDtypeStruct((tokens, experts), jnp.float32),
        ],
        compiler_params=one_warp,
        name="router_logits",
    )(x_TD, norm_D, weight_ED, bias_E)
    slots = pl.next_power_of_2(k)
    ids, weights = call(
        functools.partial(_top_k_kernel, k=k),
        grid=(tokens,),
        out_shape=[
            jax.ShapeDtypeStruct((tokens, slots), jnp.int32),
            jax.ShapeDtypeStruct((tokens, slots), jnp.float32),
        ],
        compiler_params=one_warp,
        name="router_top_k",
    )(logits_TE)
    return normed_TD, ids[:, :k], weights[:, :k]


def _logits_kernel(
    x_ref: Any, norm_ref: Any, weight_ref: Any, bias_ref: Any, normed_ref: Any, logits_ref: Any, *, eps: float
) -> None:
    expert, token = pl.program_id(0), pl.program_id(1)
    hidden = weight_ref.shape[1]
    cut = [pl.ds(start, size) for start, size in pieces(hidden, LARGEST_PIECE)]
    xs = [x_ref[token, at].astype(jnp.float32) for at in cut]
    weights = [weight_ref[expert, at].astype(jnp.float32) for at in cut]
    scale = lax.rsqrt(sum(jnp.sum(x * x) for x in xs) / hidden + eps)
    normed = [
        (x * scale * norm_ref[at].astype(jnp.float32)).astype(normed_ref.dtype)
        for at, x in zip(cut, xs, strict=True)
    ]
    logit = sum(jnp.sum(w * x.astype(jnp.float32)) for w, x in zip(weights, normed, strict=True))
    logits_ref[token, expert] = logit + bias_ref[expert].astype(jnp.float32)

    @pl.when(expert == 0)
    def _() -> None:
        for at, x in zip(cut, normed, strict=True):
            normed_ref[token, at] = x


def _top_k_kernel(logits_ref: Any, ids_ref: Any, weights_ref: Any, *, k: int) -> None:
    """Selects the k largest logits one after the other, and computes their softmax."""
    token = pl.program_id(0)
    experts = logits_ref.shape[1]
    expert = jnp.arange(pl.next_power_of_2(experts))
    slot = jnp.arange(ids_ref.shape[1])
    logits_E = plt.load(logits_ref.at[token, expert], mask=expert < experts, other=-jnp.inf)
    ids = jnp.zeros(slot.shape, jnp.int32)
    weights = jnp.zeros(slot.shape, jnp.float32)
    largest = jnp.max(logits_E)
    for i in range(k):
        top = jnp.max(logits_E)
        best = jnp.min(jnp.where(logits_E == top, expert, expert.shape[0]))
        ids = jnp.where(slot == i, best, ids)
        weights = jnp.where(slot == i, jnp.exp(top - largest), weights)
        logits_E = jnp.where(expert == best, -jnp.inf, logits_E)
    weights_ref[token, :] = weights / jnp.sum(weights)
    ids_ref[token, :] = ids
