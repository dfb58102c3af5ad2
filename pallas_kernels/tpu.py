"""What the TPU kernels of all ops ask of a chip."""

from __future__ import annotations

import dataclasses

from jax.experimental.pallas import tpu as pltpu

LANES = 128
"""Lanes of a vector register."""

VMEM_LIMIT = 48 << 20
"""What a kernel may take of a core's vector memory, 64 MiB on the chips that have least."""

Interpret = bool | pltpu.InterpretParams
"""Whether a kernel is interpreted; by `InterpretParams` with the memories and copies of a TPU, races looked for."""


@dataclasses.dataclass(frozen=True)
class Chip:
    """Whether it converts float4 itself, as a TPU7x does, and the cores that share a program, two on a v5p."""

    float4: bool = False
    cores: int = 1

    @classmethod
    def current(cls) -> Chip:
        """The chip that is traced for, by the mesh in context or the device; where there is none, the plainest."""
        try:
            info = pltpu.get_tpu_info()
        except ValueError:
            return cls()
        return cls(info.generation >= 7, info.num_cores if info.is_megacore else 1)
