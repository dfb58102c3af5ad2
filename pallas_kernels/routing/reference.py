"""The reference of the routing op, in plain JAX."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.linear.reference import rms_norm


def route(
    x_TD: jax.Array, norm_D: jax.Array, weight_ED: jax.Array, bias_E: jax.Array, *, k: int, eps: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Defines `pallas_kernels.routing.route`; see there."""
    normed_TD = rms_norm(x_TD, norm_D, eps)
    logits_TE = jnp.einsum(
        "td,ed->te",
        normed_TD.astype(jnp.float32),
        weight_ED.astype(jnp.float32),
        precision=lax.Precision.HIGHEST,
    )
    top_Tk, ids_Tk = lax.top_k(logits_TE + bias_E.astype(jnp.float32), k)
    return normed_TD, ids_Tk, jax.nn.softmax(top_Tk, axis=-1)
