"""The reference of the linear op, in plain JAX."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, computed in float32 and cast to x's dtype."""
    x32 = x.astype(jnp.float32)
    scale = lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return (x32 * scale * weight.astype(jnp.float32)).astype(x.dtype)


def linear(
    x_TI: jax.Array,
    weights_OI: tuple[jax.Array, ...],
    biases_O: tuple[jax.Array | None, ...],
    *,
    norm_I: jax.Array | None,
    eps: float,
    residual_TO: jax.Array | None,
    out_dtype: DTypeLike,
) -> tuple[jax.Array, ...]:
    """Defines `pallas_kernels.linear.linear`; see there."""
    if norm_I is not None:
        x_TI = rms_norm(x_TI, norm_I, eps)
    precision = lax.Precision.HIGHEST if x_TI.dtype == jnp.float32 else None

    def product(weight_OI: jax.Array, bias_O: jax.Array | None) -> jax.Array:
        y_TO = jnp.einsum("ti,oi->to", x_TI, weight_OI, precision=precision, preferred_element_type=jnp.float32)
        for term in (bias_O, residual_TO):
            if term is not None:
                y_TO = y_TO + term.astype(jnp.float32)
        return y_TO.astype(out_dtype)

    return tuple(product(w, b) for w, b in zip(weights_OI, biases_O, strict=True))
