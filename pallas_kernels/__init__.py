"""Ops defined by a plain-JAX reference, with faster Pallas backends, each in a file of its own."""

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
