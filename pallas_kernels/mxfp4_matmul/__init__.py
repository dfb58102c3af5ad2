"""The expert op: a mixture-of-experts MLP straight from packed MXFP4 weights."""

from __future__ import annotations

from typing import Any

import jax
from jax.typing import DTypeLike

from pallas_kernels.backend import Backend, dispatch
from pallas_kernels.mxfp4_matmul import mosaic_tpu, reference, triton, triton_vector
from pallas_kernels.mxfp4_matmul.layouts import Layout, PackedExperts, current_layout
from pallas_kernels.mxfp4_matmul.reference import ExpertWeight

__all__ = ["ExpertWeight", "Layout", "PackedExperts", "current_layout", "expert_mlp"]


def _mosaic_gpu(*args: Any, **kwargs: Any) -> jax.Array:
    # Loading Mosaic's dialects takes half a second, which only NVIDIA GPUs need to spend.
    from pallas_kernels.mxfp4_matmul import mosaic_gpu

    return mosaic_gpu.expert_mlp(*args, **kwargs)


_BACKENDS = (
    Backend("triton_vector", frozenset({"cuda"}), triton_vector.expert_mlp),
    Backend("mosaic_gpu", frozenset({"cuda"}), _mosaic_gpu),
    Backend("triton", frozenset({"cuda"}), triton.expert_mlp),
    Backend("mosaic_tpu", frozenset({"tpu"}), mosaic_tpu.expert_mlp),
)


def expert_mlp(
    x_TD: jax.Array,
    expert_ids_Tk: jax.Array,
    expert_weights_Tk: jax.Array,
    gate_up_EFD: ExpertWeight,
    gate_up_bias_EF: jax.Array,
    down_EDI: ExpertWeight,
    down_bias_ED: jax.Array,
    *,
    swiglu_limit: float,
    residual_TD: jax.Array | None = None,
    out_dtype: DTypeLike | None = None,
    backend: str | None = None,
) -> jax.Array:
    """Each token through its k experts, weighted and summed.

    Args:
      x_TD: tokens, bfloat16 or float32.
      expert_ids_Tk: int32, the experts of each token; an id of E or more means an expert that is not here and
        adds nothing.
      expert_weights_Tk: float32, the router's weight of each.
      gate_up_EFD: [E, F = 2I, D] with the gate in even and the up projection in odd rows; MXFP4Tensor,
        floats, or in the layout that the backend reads (see `layouts`); the reference takes any.
      gate_up_bias_EF: added before the clamped SwiGLU.
      down_EDI: [E, D, I].
      down_bias_ED: added before the router's weight.
      swiglu_limit: the clamp of gate and up.
      residual_TD: if given, added to the sum.
      out_dtype: the result's; None for x's.
      backend: a name to force; see `pallas_kernels.use_backend`.

    Returns:
      [T, D]; products are summed in float32.
    """
    return dispatch(
        "expert_mlp",
        _BACKENDS,
        reference.expert_mlp,
        x_TD,
        expert_ids_Tk,
        expert_weights_Tk,
        gate_up_EFD,
        gate_up_bias_EF,
        down_EDI,
        down_bias_ED,
        swiglu_limit=swiglu_limit,
        residual_TD=residual_TD,
        out_dtype=out_dtype,
        backend=backend,
    )
