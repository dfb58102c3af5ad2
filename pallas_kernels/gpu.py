"""NVIDIA GPU properties that the Triton kernels of all ops depend on."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plt
from jax.typing import DTypeLike

FLOAT8_CAPABILITY = 89
"""Minimum compute capability, that of Ada, for which Triton converts float8_e4m3fn."""


def capability() -> int | None:
    """Compute capability of the GPU that is traced for (the mesh's in context, or the device's), such as 80 for 8.0.

    Returns None if it is unknown.
    """
    try:
        return plt.get_gpu_info().compute_capability
    except ValueError:
        return None


def check_converts(dtype: DTypeLike) -> None:
    """Raise NotImplementedError if kernels on the GPU that is traced for cannot convert a dtype.

    Triton reports this only when the kernel is lowered, which is too late to fall back to the reference.
    """
    have = capability()
    if jnp.dtype(dtype) == jnp.float8_e4m3fn and have is not None and have < FLOAT8_CAPABILITY:
        raise NotImplementedError(f"compute capability {have / 10} does not convert {jnp.dtype(dtype)}")


def check_indexes(x: jax.Array) -> None:
    """Raise NotImplementedError if the indexes of an array's elements overflow in kernels.

    Pallas computes them with 32 bits, signed, if the array has no more than 4 GiB.
    """
    if x.dtype.itemsize == 1 and 1 << 31 < x.size <= 1 << 32:
        raise NotImplementedError(f"{x.dtype} arrays of 2 to 4 GiB, whose indexes overflow: {x.size} bytes")
