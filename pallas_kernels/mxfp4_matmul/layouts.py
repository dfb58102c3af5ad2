"""The layouts that packed experts are put in when they are loaded: one for each family of kernels.

A layout is a pytree class with the `shape` and `__getitem__` of an MXFP4Tensor and its method `axes`, a function that
makes it from released blocks and scales, and its line in `LAYOUTS`.
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
    """What the kernels of some backends read, and the platforms that run them.

    `prepare` takes an MXFP4Tensor [E, P N, K] and the number of parts P whose rows alternate in it (two for gate_up,
    one for down), keeps every bit, and works on any slice of the experts. Scale bytes above `largest_scale` are more
    than the kernels can represent.
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
    """The layout for the backend that is forced, else for the platform; None where the released one is read."""
    forced, platform = forced_backend(), current_platform()
    if forced == "reference":
        return None
    of_backend = [layout for layout in LAYOUTS if forced in layout.backends]
    of_platform = [layout for layout in LAYOUTS if platform in layout.platforms]
    return next(iter(of_backend + of_platform), None)
