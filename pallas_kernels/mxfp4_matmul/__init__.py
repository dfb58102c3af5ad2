"""The expert op: a mixture-of-experts MLP directly on packed MXFP4 weights."""

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
    # Importing Mosaic's dialects takes half a second, and is only needed on NVIDIA GPUs.
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
    """The weighted sum, for each token, of the outputs of its k experts.

    Args:
      x_TD: tokens, bfloat16 or float32.
      expert_ids_Tk: int32, the experts of each token; an id of E or more denotes an expert that is not in this
        shard, and contributes 0.
      expert_weights_Tk: float32, the router's weights.
      gate_up_EFD: [E, F = 2I, D] with the gate in even and the up projection in odd rows: an MXFP4Tensor, floats,
        or the layout of the backend (see `layouts`). The reference accepts all of them.
      gate_up_bias_EF: added before the clamped SwiGLU.
      down_EDI: [E, D, I], in the same forms.
      down_bias_ED: added before the multiplication with the router's weight.
      swiglu_limit: clamp of gate and up.
      residual_TD: added to the result, or None.
      out_dtype: dtype of the result; None for x's.
      backend: name of a backend to force; see `pallas_kernels.use_backend`.

    Returns:
      [T, D]; products are accumulated in float32.
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
