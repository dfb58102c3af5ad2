"""What XLA is told of programs for NVIDIA GPUs, whatever they do."""

from __future__ import annotations

import jax
from jax.extend.core import get_opaque_trace_state
from jax.sharding import AbstractMesh, Mesh

from pallas_kernels import current_platform


def in_order(mesh: Mesh | AbstractMesh | None) -> dict[str, str | bool] | None:
    """Options for NVIDIA GPUs with which no kernel starts before the one before it has ended; None for others.

    Without a mesh they are those of the mesh in context, else of the default device.

    XLA lets kernels start early and wait before they read (programmatic dependent launch). But ptxas moves reads of
    what it takes to be constant, as XLA says all arguments are, to before the wait: kernels then read what was there
    before. Seen as random weights that were wrong on some of four GPUs which several processes shared
    (benchmarks/RESULTS.md).
    """
    return {"xla_gpu_enable_pdl": False} if current_platform(mesh) == "cuda" else None


def may_have_options() -> bool:
    """Whether a program called here may have compiler options: not while something is traced or differentiated.

    JAX refuses them in a program that is part of another.
    """
    with jax.core.eval_context():
        untraced = get_opaque_trace_state()
    return get_opaque_trace_state() == untraced
