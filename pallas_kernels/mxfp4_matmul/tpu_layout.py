"""The layout of packed experts for TPU kernels: the released bytes transposed, so that rows lie along the lanes.

A byte holds two consecutive values of a row, as in the released files. The contracting dimension lies along the
sublanes and the rows of the tensor along the lanes. Rows of gate and up alternate in runs of 64, so that one rotation
aligns the two halves of a 128-lane tile, and 2 x 2880 rows fill whole tiles. Shapes are named by suffix: E experts,
K contracting dimension, N lanes, G groups.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.mxfp4_matmul.format import GROUP, MXFP4Tensor
from pallas_kernels.tpu import LANES

RUN = 64
"""Number of consecutive rows of gate, followed by as many of up."""

STEP = 64
"""The contracting dimension is padded with zeros to a multiple of this: 32 bytes, the sublanes of a tile."""

SCALE_ROWS = 32
"""Scales are padded to a multiple of this: the sublanes of a tile of bytes."""

LARGEST_SCALE = 240
"""The kernels multiply by 2^(s-114) in float32; released scales are far below. Values under 2^-126 become 0."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TpuExperts:
    """A packed tensor [E, rows, contracting], transposed.

    `blocks` is uint8 [E, K/2, N] (the low nibble of byte i is value 2i) and `scales` uint8 [E, G, N]. With two
    parts, the even rows of the tensor are in the first 64 lanes of a tile and the odd ones in the second.

    On a mesh every device prepares its own shard of the tensor, so each shard is padded, and `rows` and `contracting`
    are one shard's sizes.
    """

    blocks: jax.Array
    scales: jax.Array
    rows: int = dataclasses.field(metadata={"static": True})
    contracting: int = dataclasses.field(metadata={"static": True})
    parts: int = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the unpacked tensor."""
        return (self.blocks.shape[0], self.rows, self.contracting)

    def __getitem__(self, index: int | jax.Array) -> MXFP4Tensor:
        """One expert in the released layout."""
        one = dataclasses.replace(self, blocks=self.blocks[index][None], scales=self.scales[index][None])
        return jax.tree.map(lambda x: x[0], released(one))

    def axes(self, logical: tuple[str | None, ...]) -> TpuExperts:
        """The names of the blocks' and the scales' dimensions, from those of the unpacked tensor's three."""
        experts, rows, contracting = logical
        own = (experts, contracting, rows)
        return dataclasses.replace(self, blocks=own, scales=own)  # type: ignore[arg-type]


def prepare(packed: MXFP4Tensor, parts: int) -> TpuExperts:
    """Convert a released tensor [E, rows, K]; `parts` is two for gate_up, one for down.

    Works on any slice of the first dimension, so a loader can convert one expert at a time. Raises ValueError for
    concrete scales that the kernels cannot represent.
    """
    experts, rows, groups = packed.scales.shape
    if not isinstance(packed.scales, jax.core.Tracer) and int(jnp.max(packed.scales)) > LARGEST_SCALE:
        raise ValueError(f"a scale above 2^{LARGEST_SCALE - 127} does not fit the TPU kernels")
    bytes_EFK = packed.blocks.reshape(experts, rows, groups * GROUP // 2)
    blocks = to_lanes(pad_to(bytes_EFK, 2, STEP // 2), parts).swapaxes(1, 2)
    scales = to_lanes(pad_to(packed.scales, 2, SCALE_ROWS), parts).swapaxes(1, 2)
    return TpuExperts(blocks, scales, rows, groups * GROUP, parts)


def released(experts: TpuExperts) -> MXFP4Tensor:
    """The inverse of `prepare`."""
    groups = experts.contracting // GROUP
    bytes_EFK, scales = (
        _from_lanes(x.swapaxes(1, 2), experts.rows, experts.parts) for x in (experts.blocks, experts.scales)
    )
    bytes_EFK = bytes_EFK[..., : groups * GROUP // 2]
    return MXFP4Tensor(bytes_EFK.reshape(*bytes_EFK.shape[:2], groups, GROUP // 2), scales[..., :groups])


def to_lanes(x: jax.Array, parts: int) -> jax.Array:
    """Reorder the rows, the second dimension, to the order of the lanes, padded with zeros to whole tiles."""
    if parts == 1:
        return pad_to(x, 1, LANES)
    experts, rows, *rest = x.shape
    pairs = pad_to(x.reshape(experts, rows // 2, 2, *rest), 1, RUN)
    runs = pairs.reshape(experts, -1, RUN, 2, *rest).swapaxes(2, 3)
    return runs.reshape(experts, -1, *rest)


def _from_lanes(x: jax.Array, rows: int, parts: int) -> jax.Array:
    if parts == 1:
        return x[:, :rows]
    experts, _, *rest = x.shape
    pairs = x.reshape(experts, -1, 2, RUN, *rest).swapaxes(2, 3)
    return pairs.reshape(experts, -1, *rest)[:, :rows]


def pad_to(x: jax.Array, axis: int, multiple: int) -> jax.Array:
    """Pad an axis at its end with zeros, to a multiple of `multiple`."""
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, -x.shape[axis] % multiple)
    return jnp.pad(x, padding)
