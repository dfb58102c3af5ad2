"""XLA options for all programs on NVIDIA GPUs."""

from __future__ import annotations

import jax
from jax.extend.core import get_opaque_trace_state
from jax.sharding import AbstractMesh, Mesh

from pallas_kernels import current_platform


def in_order(mesh: Mesh | AbstractMesh | None) -> dict[str, str | bool] | None:
    """XLA options that disable programmatic dependent launch on NVIDIA GPUs; None for other platforms.

    If `mesh` is None, the platform is that of the mesh in context, else of the default device.

    With programmatic dependent launch, a kernel starts before its predecessor has finished and waits before it reads.
    XLA declares all kernel arguments constant, so ptxas may move reads of them ahead of that wait, and the kernel
    reads stale data. This was observed as wrong random weights on some of four GPUs shared by several processes
    (benchmarks/RESULTS.md).
    """
    return {"xla_gpu_enable_pdl": False} if current_platform(mesh) == "cuda" else None


def may_have_options() -> bool:
    """Whether a function jitted here may have compiler options: not while JAX traces or differentiates.

    JAX rejects compiler options in a nested jit.
    """
    with jax.core.eval_context():
        untraced = get_opaque_trace_state()
    return get_opaque_trace_state() == untraced
