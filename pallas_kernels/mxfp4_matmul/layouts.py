"""Layouts of packed experts, one per family of kernels, into which weights are converted when they are loaded.

A layout is a pytree class with the `shape`, `__getitem__` and `axes` of an MXFP4Tensor, a function that makes it from
released blocks and scales, and its entry in `LAYOUTS`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from pallas_kernels.backend import current_platform, forced_backend
from pallas_kernels.mxfp4_matmul import gpu_layout, tpu_layout
from pallas_kernels.mxfp4_matmul.format import MXFP4Tensor
from pallas_kernels.mxfp4_matmul.gpu_layout import GpuExperts
from pallas_kernels.mxfp4_matmul.tpu_layout import TpuExperts

PackedExperts = MXFP4Tensor | GpuExperts | TpuExperts


@dataclasses.dataclass(frozen=True)
class Layout:
    """A layout, the backends that read it, and their platforms.

    `prepare` converts an MXFP4Tensor [E, P N, K] whose rows alternate between P parts (two for gate_up, one for down).
    It is lossless, and works on any slice of the experts. The kernels cannot represent scale bytes above
    `largest_scale`.
    """

    backends: frozenset[str]
    platforms: frozenset[str]
    prepare: Callable[[MXFP4Tensor, int], PackedExperts]
    largest_scale: int


LAYOUTS = (
    Layout(
        frozenset({"triton", "triton_vector", "mosaic_gpu"}),
        frozenset({"cuda"}),
        gpu_layout.prepare,
        gpu_layout.LARGEST_SCALE,
    ),
    Layout(frozenset({"mosaic_tpu"}), frozenset({"tpu"}), tpu_layout.prepare, tpu_layout.LARGEST_SCALE),
)


def current_layout() -> Layout | None:
    """The layout of the forced backend, else of the platform; None if the released layout is used."""
    forced, platform = forced_backend(), current_platform()
    if forced == "reference":
        return None
    of_backend = [layout for layout in LAYOUTS if forced in layout.backends]
    of_platform = [layout for layout in LAYOUTS if platform in layout.platforms]
    return next(iter(of_backend + of_platform), None)
