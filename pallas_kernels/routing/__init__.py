"""The routing op: the norm before a mixture of experts, and the selection of each token's experts."""

from __future__ import annotations

import jax

from pallas_kernels.backend import Backend, dispatch
from pallas_kernels.routing import reference, triton

__all__ = ["route"]

_BACKENDS = (Backend("triton", frozenset({"cuda"}), triton.route),)
_PLAIN_ON = frozenset({"rocm", "tpu"})


def route(
    x_TD: jax.Array,
    norm_D: jax.Array,
    weight_ED: jax.Array,
    bias_E: jax.Array,
    *,
    k: int,
    eps: float,
    backend: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Normalise tokens, and select the k experts with the largest router logits.

    Args:
      x_TD: the residual stream, bfloat16 or float32.
      norm_D: the weight of the RMS norm.
      weight_ED: the router's weight; logits and softmax are float32.
      bias_E: added to the logits.
      k: number of experts per token.
      eps: epsilon of the norm.
      backend: name of a backend to force; see `pallas_kernels.use_backend`.

    Returns:
      The normalised tokens [T, D] of x's dtype; int32 [T, k], the experts in descending order of their logits (ties
      by index); and float32 [T, k], the softmax over those k logits.
    """
    return dispatch(
        "route",
        _BACKENDS,
        reference.route,
        x_TD,
        norm_D,
        weight_ED,
        bias_E,
        k=k,
        eps=eps,
        backend=backend,
        plain_on=_PLAIN_ON,
    )
