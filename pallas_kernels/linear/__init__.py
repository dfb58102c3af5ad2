"""The linear op: several projections of one input, with an optional norm before and residual after them."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.backend import Backend, dispatch
from pallas_kernels.linear import reference, triton

__all__ = ["linear"]

_BACKENDS = (Backend("triton", frozenset({"cuda"}), triton.linear),)
_PLAIN_ON = frozenset({"rocm", "tpu"})


def linear(
    x_TI: jax.Array,
    weights_OI: Sequence[jax.Array],
    biases_O: Sequence[jax.Array | None],
    *,
    norm_I: jax.Array | None = None,
    eps: float = 1e-5,
    residual_TO: jax.Array | None = None,
    out_dtype: DTypeLike = jnp.float32,
    backend: str | None = None,
) -> tuple[jax.Array, ...]:
    """Multiply one input with several weights, and add a bias to each; one fused kernel for a single token on GPUs.

    Args:
      x_TI: tokens, bfloat16 or float32.
      weights_OI: matrices of x's dtype, each with its own number of rows.
      biases_O: for each weight its bias, or None.
      norm_I: weight of an RMS norm that is applied to x first, or None.
      eps: epsilon of the norm.
      residual_TO: added to each product, or None.
      out_dtype: dtype of the results; sums are float32.
      backend: name of a backend to force; see `pallas_kernels.use_backend`.

    Returns:
      [T, O] for each weight.
    """
    return dispatch(
        "linear",
        _BACKENDS,
        reference.linear,
        x_TI,
        tuple(weights_OI),
        tuple(biases_O),
        norm_I=norm_I,
        eps=eps,
        residual_TO=residual_TO,
        out_dtype=out_dtype,
        backend=backend,
        plain_on=_PLAIN_ON,
    )
