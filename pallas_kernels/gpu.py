"""What the Triton kernels of all ops ask of an NVIDIA GPU."""

from __future__ import annotations

import jax.numpy as jnp
from jax.experimental.pallas import triton as plt
from jax.typing import DTypeLike

FLOAT8_CAPABILITY = 89
"""The least compute capability, Ada's, whose GPUs convert float8_e4m3fn; Triton does it on no other."""


def capability() -> int | None:
    """The compute capability, 80 for 8.0, of the GPU that is traced for, by the mesh in context or the device.

    None where none is known.
    """
    try:
        return plt.get_gpu_info().compute_capability
    except ValueError:
        return None


def check_converts(dtype: DTypeLike) -> None:
    """Raise NotImplementedError where kernels on the GPU that is traced for cannot convert a dtype.

    Triton itself says so only once the kernel is lowered, when it is too late to fall back to the reference.
    """
    have = capability()
    if jnp.dtype(dtype) == jnp.float8_e4m3fn and have is not None and have < FLOAT8_CAPABILITY:
        raise NotImplementedError(f"compute capability {have / 10} converts no {jnp.dtype(dtype)}")
