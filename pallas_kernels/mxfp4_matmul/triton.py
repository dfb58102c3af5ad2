"""The expert op on NVIDIA GPUs, as Pallas kernels lowered through Triton.

Both matmuls have the weights on the left: a tile of weight rows is unpacked in registers to bfloat16, which represents
every released value exactly, and multiplied on the tensor cores with the activation rows of its expert. With few
tokens each row is a tile of its own, without sorting; otherwise rows are sorted by expert, and a tile of them shares
each read of the weights.

Shapes are named by suffix: T tokens, k experts of a token, R = T k rows, M tiles, D hidden, I intermediate.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jax.typing import DTypeLike

from pallas_kernels.mxfp4_matmul.gpu_layout import BLOCK, WORDS, GpuExperts, group_factor, unpack
from pallas_kernels.mxfp4_matmul.reference import SWIGLU_ALPHA, ExpertWeight
from pallas_kernels.mxfp4_matmul.tiles import Tiles, tiles_by_expert, tiles_of_one

UNSORTED_ROWS = 8
"""Up to this many rows a tile has one row: sorting costs more than reading an expert twice through the cache."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Tile shape of a kernel: weight rows, activation rows, and Triton's warps and pipeline stages."""

    weight_rows: int
    tile_rows: int
    num_warps: int
    num_stages: int


def choose(rows: int, num_experts: int, dtype: DTypeLike) -> tuple[Config, Config]:
    """Configs of the gate_up and the down kernel; `dtype` is the tokens'."""
    if rows <= UNSORTED_ROWS:
        return Config(32, 8, 2, 5), Config(32, 8, 2, 5)
    share = rows / num_experts
    if share <= 12:
        return Config(128, 16, 4, 3), Config(128, 16, 4, 3)
    if share <= 24:
        return Config(64, 32, 4, 4), Config(64, 32, 4, 4)
    # Larger float32 tiles exceed the shared memory of Ada GPUs.
    if share <= 64 or jnp.dtype(dtype) == jnp.float32:
        return Config(64, 64, 4, 3), Config(64, 64, 4, 3)
    return Config(64, 128, 4, 3), Config(128, 128, 4, 3)


def expert_mlp(
    x_TD: jax.Array,
    expert_ids_Tk: jax.Array,
    expert_weights_Tk: jax.Array,
    gate_up_EFD: ExpertWeight,
    gate_up_bias_EF: jax.Array,
    down_EDI: ExpertWeight,
    down_bias_ED: jax.Array,
    *,
    swiglu_limit: float,
    residual_TD: jax.Array | None,
    out_dtype: DTypeLike | None,
    interpret: bool,
    configs: tuple[Config, Config] | None = None,
) -> jax.Array:
    """See `pallas_kernels.mxfp4_matmul.expert_mlp`; experts in the layout of `gpu_layout.prepare`."""
    if not isinstance(gate_up_EFD, GpuExperts) or not isinstance(down_EDI, GpuExperts):
        raise NotImplementedError("the experts are not in the GPU layout: see gpu_layout.prepare")
    if gate_up_EFD.words.shape[1] != 2 or down_EDI.words.shape[1] != 1:
        raise NotImplementedError("gate_up must be prepared in two parts and down in one")
    if x_TD.dtype not in (jnp.bfloat16, jnp.float32):
        raise NotImplementedError(f"tokens of {x_TD.dtype}")
    num_tokens, k = expert_ids_Tk.shape
    num_experts = gate_up_EFD.shape[0]
    ids_R = expert_ids_Tk.reshape(num_tokens * k)
    up_config, down_config = configs or choose(ids_R.shape[0], num_experts, x_TD.dtype)
    if ids_R.shape[0] <= UNSORTED_ROWS:
        tiles = tiles_of_one(ids_R, num_experts)
    else:
        tiles = tiles_by_expert(ids_R, num_experts, up_config.tile_rows)
    hidden_RI = _matmul(
        tiles,
        x_TD,
        k,
        gate_up_EFD,
        gate_up_bias_EF,
        None,
        up_config,
        swiglu_limit=swiglu_limit,
        interpret=interpret,
    )
    weights_R = expert_weights_Tk.reshape(num_tokens * k).astype(jnp.float32)
    out_RD = _matmul(tiles, hidden_RI, 1, down_EDI, down_bias_ED, weights_R, down_config, interpret=interpret)
    out_TkD = out_RD.reshape(num_tokens, k, -1)
    here_Tk1 = (expert_ids_Tk < num_experts)[..., None]
    out_TD = jnp.sum(jnp.where(here_Tk1, out_TkD, 0), axis=1)
    if residual_TD is not None:
        out_TD += residual_TD.astype(jnp.float32)
    return out_TD.astype(out_dtype or x_TD.dtype)


def _matmul(
    tiles: Tiles,
    x_XK: jax.Array,
    rows_of_x: int,
    experts: GpuExperts,
    bias_EF: jax.Array,
    weights_R: jax.Array | None,
    config: Config,
    *,
    swiglu_limit: float | None = None,
    interpret: bool,
) -> jax.Array:
    """Multiply each row with its expert and add the bias; row r of the result is from x[r // rows_of_x].

    With two parts, the clamped SwiGLU is applied, and the result has x's dtype. With `weights_R`, each row is
    multiplied by its weight, and the result is float32. Rows of absent experts are not written.
    """
    outputs = experts.words.shape[3]
    kernel = functools.partial(
        _matmul_kernel,
        config=config,
        contracting=experts.contracting,
        rows_of_x=rows_of_x,
        swiglu_limit=swiglu_limit,
        unpack_words=_unpack if interpret else _unpack_ptx,
    )
    out_type = jax.ShapeDtypeStruct(
        (tiles.rows_R.shape[0], outputs), x_XK.dtype if weights_R is None else jnp.float32
    )
    weights_R = jnp.zeros(1, jnp.float32) if weights_R is None else weights_R
    return pl.pallas_call(
        kernel,
        grid=(tiles.expert_M.shape[0], pl.cdiv(outputs, config.weight_rows)),
        out_shape=out_type,
        compiler_params=plt.CompilerParams(num_warps=config.num_warps, num_stages=config.num_stages),
        interpret=interpret,
        name="mxfp4_gate_up" if swiglu_limit is not None else "mxfp4_down",
    )(
        tiles.rows_R,
        tiles.expert_M,
        tiles.start_M,
        tiles.count_M,
        x_XK,
        experts.words.reshape(experts.words.shape[0], -1, outputs, WORDS),
        lax.bitcast_convert_type(experts.scales, jnp.int32).reshape(experts.words.shape[0], -1, outputs),
        bias_EF,
        weights_R,
    )


def _matmul_kernel(
    rows_ref: Any,
    expert_ref: Any,
    start_ref: Any,
    count_ref: Any,
    x_ref: Any,
    words_ref: Any,
    scales_ref: Any,
    bias_ref: Any,
    weights_ref: Any,
    out_ref: Any,
    *,
    config: Config,
    contracting: int,
    rows_of_x: int,
    swiglu_limit: float | None,
    unpack_words: Any,
) -> None:
    tile, first = pl.program_id(0), pl.program_id(1) * config.weight_rows
    count = count_ref[tile]

    @pl.when(count > 0)
    def _() -> None:
        expert, start = expert_ref[tile], start_ref[tile]
        slot = jnp.arange(config.tile_rows)
        # Empty slots get a row past the end: the interpreter drops out-of-bounds stores.
        row = plt.load(rows_ref.at[start + slot], mask=slot < count, other=out_ref.shape[0])
        accumulators = _contract(
            x_ref,
            row // rows_of_x,
            slot < count,
            words_ref,
            scales_ref,
            expert,
            first,
            config,
            contracting,
            unpack_words,
        )
        output = first + jnp.arange(config.weight_rows)
        inside = output < out_ref.shape[1]

        def biased(part: int, parts: int) -> jax.Array:
            bias = plt.load(bias_ref.at[expert, output * parts + part], mask=inside, other=0.0)
            return accumulators[part] + bias.astype(jnp.float32)[:, None]

        if swiglu_limit is not None:
            gate = jnp.minimum(biased(0, 2), swiglu_limit)
            up = jnp.clip(biased(1, 2), -swiglu_limit, swiglu_limit)
            result = gate / (1 + jnp.exp(-SWIGLU_ALPHA * gate)) * (up + 1)
        else:
            weight = plt.load(weights_ref.at[row], mask=slot < count, other=0.0)
            result = biased(0, 1) * weight[None, :]
        plt.store(
            out_ref.at[row[:, None], output[None, :]],
            result.T.astype(out_ref.dtype),
            mask=(slot < count)[:, None] & inside[None, :],
        )


def _contract(
    x_ref: Any,
    x_row: jax.Array,
    x_here: jax.Array,
    words_ref: Any,
    scales_ref: Any,
    expert: jax.Array,
    first: jax.Array,
    config: Config,
    contracting: int,
    unpack_words: Any,
) -> list[jax.Array]:
    """For each part, the weight rows from `first` on times the rows of x: float32 [weight_rows, tile_rows]."""
    outputs = words_ref.shape[2]
    blocks = pl.cdiv(contracting, BLOCK)
    parts = words_ref.shape[1] // blocks
    weight_rows = config.weight_rows
    ragged = outputs % weight_rows != 0
    inside = first + jnp.arange(weight_rows) < outputs
    column = jnp.arange(WORDS)
    zeros = jnp.zeros((weight_rows, config.tile_rows), jnp.float32)

    def block(b: jax.Array, accumulators: list[jax.Array]) -> list[jax.Array]:
        xs = []
        for j in range(BLOCK // WORDS):
            at = b * BLOCK + j * WORDS + column
            mask = x_here[:, None] & (at < contracting)[None, :]
            xs.append(plt.load(x_ref.at[x_row[:, None], at[None, :]], mask=mask, other=0.0))
        results = []
        for part in range(parts):
            own = words_ref.at[expert, part * blocks + b, pl.ds(first, weight_rows)]
            here = jnp.broadcast_to(inside[:, None], (weight_rows, WORDS)) if ragged else None
            words = plt.load(own, mask=here, other=0 if ragged else None)
            scales = plt.load(
                scales_ref.at[expert, part * blocks + b, pl.ds(first, weight_rows)],
                mask=inside if ragged else None,
                other=0 if ragged else None,
            )
            accumulator = accumulators[part]
            for j, x in enumerate(xs):
                weight = unpack_words(words, (scales >> (8 * j)) & 255, j, x.dtype)
                accumulator += lax.dot_general(
                    weight,
                    x,
                    (((1,), (1,)), ((), ())),
                    precision=lax.Precision.HIGHEST if x.dtype == jnp.float32 else None,
                    preferred_element_type=jnp.float32,
                )
            results.append(accumulator)
        return results

    return lax.fori_loop(0, blocks, block, [zeros] * parts)


def _unpack_ptx(words: jax.Array, scale: jax.Array, j: int, dtype: DTypeLike) -> jax.Array:
    """`_unpack` in PTX, two words at a time; see `gpu_layout.unpack` for the bit operations."""
    magnitude = ("shl.b32 a, $1, 6;", "shl.b32 a, $1, 2;", "shr.u32 a, $1, 2;", "shr.u32 a, $1, 6;")[j]
    [weight] = plt.elementwise_inline_asm(
        "{ .reg .b32 a, b, c;"
        + magnitude
        + f"shl.b32 b, $1, {12 - 4 * j}; and.b32 b, b, 0x80008000; lop3.b32 a, a, 0x01C001C0, b, 0xEA;"
        + "mov.b32 c, 0x80008000; fma.rn.bf16x2 $0, a, $2, c; }",
        args=[words, jnp.broadcast_to(group_factor(scale)[:, None], words.shape)],
        constraints="=r,r,r",
        pack=2,
        result_shape_dtypes=[jax.ShapeDtypeStruct(words.shape, jnp.bfloat16)],
    )
    return weight.astype(dtype)


def _unpack(words: jax.Array, scale: jax.Array, j: int, dtype: DTypeLike) -> jax.Array:
    """The values [N, 32] of nibble j of each word, times 2^(scale - 127) of its row."""
    return unpack(words, scale[:, None], j).astype(dtype)
