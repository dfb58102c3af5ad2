"""TPU properties that the TPU kernels of all ops depend on."""

from __future__ import annotations

import dataclasses

from jax.experimental.pallas import tpu as pltpu

LANES = 128
"""Lanes of a vector register."""

VMEM_LIMIT = 48 << 20
"""Bytes of a core's VMEM that a kernel may use; chips have at least 64 MiB."""

Interpret = bool | pltpu.InterpretParams
"""Whether a kernel is interpreted. `InterpretParams` simulates TPU memories and DMAs, and detects races."""


@dataclasses.dataclass(frozen=True)
class Chip:
    """A chip's features: `float4` is native float4 conversion, as on TPU7x; `cores` share a program, two on v5p."""

    float4: bool = False
    cores: int = 1

    @classmethod
    def current(cls) -> Chip:
        """The chip that is traced for (the mesh's in context, or the device's); the default one if it is unknown."""
        try:
            info = pltpu.get_tpu_info()
        except ValueError:
            return cls()
        return cls(info.generation >= 7, info.num_cores if info.is_megacore else 1)
