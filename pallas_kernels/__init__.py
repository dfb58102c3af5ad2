"""Ops with a plain-JAX reference as their meaning, and one file for each faster backend."""

from pallas_kernels.backend import (
    backend_names,
    backend_platforms,
    current_platform,
    dispatch_settings,
    platform,
    use_backend,
)

__all__ = [
    "backend_names",
    "backend_platforms",
    "current_platform",
    "dispatch_settings",
    "platform",
    "use_backend",
]
