"""The layout of packed experts for GPU kernels, a reordering of the released bits, and its inverse.

A block is 128 values of one row along the contracting dimension, as 32 words of 16 bits. Nibble j of word i is value
32 j + i of the block. Nibble j of all words is therefore one group with one scale, and is multiplied with 32
consecutive activations. Shapes are named by suffix: E experts, P parts (two for gate and up, or one), B blocks,
N rows of a part, K contracting dimension, G groups.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.mxfp4_matmul.format import GROUP, MXFP4Tensor, exp2

BLOCK = 128
"""Values of a row in a block; the last block of a row is padded with zeros."""

WORDS = 32
"""16-bit words in a block."""

LARGEST_SCALE = 128
"""The kernels multiply by 2^(s-1) in bfloat16, whose largest power is 2^127; released scales are far below."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GpuExperts:
    """A packed tensor [E, P N, K] in blocks.

    `words` is uint16 [E, P, B, N, 32] and `scales` uint32 [E, P, B, N], whose byte j is the scale of group j of
    the block. With two parts, the even rows of the tensor are in part 0 and the odd ones in part 1.

    On a mesh every device prepares its own shard of the tensor, so each shard is padded to whole blocks, and
    `contracting` is one shard's size of K.
    """

    words: jax.Array
    scales: jax.Array
    contracting: int = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the unpacked tensor."""
        experts, parts, _, rows = self.scales.shape
        return (experts, parts * rows, self.contracting)

    def __getitem__(self, index: int | jax.Array) -> MXFP4Tensor:
        """One expert in the released layout."""
        one = GpuExperts(self.words[index][None], self.scales[index][None], self.contracting)
        return jax.tree.map(lambda x: x[0], released(one))

    def axes(self, logical: tuple[str | None, ...]) -> GpuExperts:
        """The names of the words' and the scales' dimensions, from those of the unpacked tensor's three."""
        experts, rows, contracting = logical
        blocks = (experts, None, contracting, rows)
        return GpuExperts((*blocks, None), blocks, self.contracting)  # type: ignore[arg-type]


def prepare(packed: MXFP4Tensor, parts: int) -> GpuExperts:
    """Convert a released tensor [E, P N, K] with P parts: two for gate_up, one for down.

    Works on any slice of the first dimension, so a loader can convert one expert at a time. Raises ValueError for
    concrete scales that the kernels cannot represent.
    """
    experts, rows, groups = packed.scales.shape
    if not isinstance(packed.scales, jax.core.Tracer) and int(jnp.max(packed.scales)) > LARGEST_SCALE:
        raise ValueError(f"a scale above 2^{LARGEST_SCALE - 127} does not fit the GPU kernels")
    blocks = -(-groups // 4)
    padding = ((0, 0), (0, 0), (0, 4 * blocks - groups))
    scales_EFG = jnp.pad(packed.scales, padding)
    bytes_EFG16 = jnp.pad(packed.blocks, (*padding, (0, 0)))
    nibbles_EFGK = jnp.stack([bytes_EFG16 & 0xF, bytes_EFG16 >> 4], axis=-1).reshape(*scales_EFG.shape, GROUP)
    nibbles = nibbles_EFGK.reshape(experts, rows, blocks, 4, WORDS).astype(jnp.uint16)
    words_EFBW = nibbles[..., 0, :] | nibbles[..., 1, :] << 4 | nibbles[..., 2, :] << 8 | nibbles[..., 3, :] << 12
    scale_bytes = scales_EFG.reshape(experts, rows, blocks, 4)
    scales_EFB = jax.lax.bitcast_convert_type(scale_bytes, jnp.uint32)
    words = words_EFBW.reshape(experts, rows // parts, parts, blocks, WORDS).transpose(0, 2, 3, 1, 4)
    scales = scales_EFB.reshape(experts, rows // parts, parts, blocks).transpose(0, 2, 3, 1)
    return GpuExperts(words, scales, groups * GROUP)


def released(experts: GpuExperts) -> MXFP4Tensor:
    """The inverse of `prepare`."""
    count, parts, blocks, rows, _ = experts.words.shape
    groups = experts.contracting // GROUP
    words_EFBW = experts.words.transpose(0, 3, 1, 2, 4).reshape(count, rows * parts, blocks, 1, WORDS)
    shifts = jnp.arange(0, 16, 4, dtype=jnp.uint16)[:, None]
    nibbles = ((words_EFBW >> shifts) & 0xF).astype(jnp.uint8).reshape(count, rows * parts, 4 * blocks, 16, 2)
    bytes_EFG16 = nibbles[..., 0] | nibbles[..., 1] << 4
    scales_EFB = experts.scales.transpose(0, 3, 1, 2).reshape(count, rows * parts, blocks)
    scales_EFG = jax.lax.bitcast_convert_type(scales_EFB, jnp.uint8).reshape(count, rows * parts, 4 * blocks)
    return MXFP4Tensor(bytes_EFG16[:, :, :groups], scales_EFG[:, :, :groups])


def unpack(words: jax.Array, scale: jax.Array, j: int) -> jax.Array:
    """The float32 value of nibble j of each word, times 2^(scale - 127).

    The kernels compute it by bit operations: the nibble's exponent and mantissa become the low exponent bits and the
    top mantissa bit of a bfloat16, and its sign the sign. The result is the value times 2^-126, subnormal where the
    nibble is, and a multiplication by `group_factor` scales it.
    """
    nibble = (words.astype(jnp.int32) >> (4 * j)) & 15
    exponent, mantissa = (nibble >> 1) & 3, nibble & 1
    doubled = jnp.where(exponent == 0, mantissa, (2 + mantissa) << jnp.maximum(exponent - 1, 0))
    value = jnp.where(nibble >= 8, -doubled, doubled).astype(jnp.float32)
    half = (scale - 128) >> 1
    return value * exp2(half) * exp2(scale - 128 - half)


def group_factor(scale: jax.Array) -> jax.Array:
    """2^(scale - 1) in bfloat16, from its bits."""
    return jax.lax.bitcast_convert_type(((scale + 126) << 7).astype(jnp.uint16), jnp.bfloat16)
