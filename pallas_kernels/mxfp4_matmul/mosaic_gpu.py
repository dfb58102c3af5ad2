"""The expert op on Hopper GPUs for many rows, as Pallas kernels lowered through Mosaic GPU.

Rows are sorted by expert into tiles of one expert each, padded to whole tiles, so that every load and store of
activations is a plain tile of a padded array. A kernel runs one program on each multiprocessor, which goes through
output tiles: a warpgroup fetches blocks of activations and packed weights into a ring of shared memory, and three
others each unpack 64 rows of the weights in registers to bfloat16, which holds every released value exactly, and
multiply them with the shared tile of activations. The unpacking of a half block runs while the tensor cores
multiply the one before.

For gate_up each 16 weight rows of a warp are 8 gate and the 8 up rows of the same outputs, so that both products
meet in one thread for SwiGLU.

Shapes are named by suffix: T tokens, k experts of a token, R = T k rows, M tiles, S slots of padded tiles, D hidden,
I intermediate, K contracting, N outputs, E experts, P parts, B blocks.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm, vector

from pallas_kernels.mxfp4_matmul.gpu_layout import BLOCK, WORDS, GpuExperts
from pallas_kernels.mxfp4_matmul.reference import SWIGLU_ALPHA, ExpertWeight
from pallas_kernels.mxfp4_matmul.tiles import Tiles, tiles_by_expert

TILE_ROWS = 128
"""Activation rows of a tile."""

WARPGROUPS = 3
"""Warpgroups that multiply, each 64 weight rows."""

STAGES = {1: 3, 2: 4}
"""Blocks in the ring of shared memory, by parts."""

STORED_ROWS = {1: 64, 2: 128}
"""Activation rows that a warpgroup stages in shared memory at once on their way out, by parts."""

FULL = plgpu.Layout.WGMMA
HALF = plgpu.Layout.TILED(
    plgpu.Tiling(((32, 8), (8, 8), (2,))), warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1
)
"""Rows g and g + 8 of each 16 in FULL are rows g of two arrays in HALF."""


def tile_outputs(parts: int) -> int:
    """Outputs of a tile: weight rows of each part."""
    return WARPGROUPS * 64 // parts


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
    interpret: bool,
) -> jax.Array:
    """See `pallas_kernels.mxfp4_matmul.expert_mlp`; experts as `gpu_layout.prepare` makes them."""
    if not isinstance(gate_up_EFD, GpuExperts) or not isinstance(down_EDI, GpuExperts):
        raise NotImplementedError("the experts are not in the GPU layout: see gpu_layout.prepare")
    num_tokens, k = expert_ids_Tk.shape
    num_experts = gate_up_EFD.shape[0]
    ids_R = expert_ids_Tk.reshape(num_tokens * k)
    tiles = tiles_by_expert(ids_R, num_experts, TILE_ROWS)
    row_S = _rows_of_slots(tiles)
    x_SD = x_TD[jnp.minimum(row_S, num_tokens * k - 1) // k]
    hidden_SI = _matmul(tiles, x_SD, gate_up_EFD, gate_up_bias_EF, swiglu_limit)
    out_SD = _matmul(tiles, hidden_SI, down_EDI, down_bias_ED, None)
    slot_R = jnp.zeros(num_tokens * k, jnp.int32).at[row_S].set(
        jnp.arange(row_S.shape[0], dtype=jnp.int32), mode="drop", unique_indices=True
    )
    out_TkD = out_SD[slot_R].reshape(num_tokens, k, -1)
    here_Tk1 = (expert_ids_Tk < num_experts)[..., None]
    weights_Tk1 = expert_weights_Tk.astype(jnp.float32)[..., None]
    out_TD = jnp.sum(jnp.where(here_Tk1, out_TkD * weights_Tk1, 0), axis=1)
    return (out_TD if residual_TD is None else out_TD + residual_TD.astype(jnp.float32)).astype(x_TD.dtype)


def _rows_of_slots(tiles: Tiles) -> jax.Array:
    """The row in each slot; R or more, all different, where there is none."""
    rows = tiles.rows_R.shape[0]
    within = jnp.arange(TILE_ROWS, dtype=jnp.int32)
    at_S = (tiles.start_M[:, None] + within).reshape(-1)
    here_S = (within < tiles.count_M[:, None]).reshape(-1)
    slot_S = jnp.arange(at_S.shape[0], dtype=jnp.int32)
    return jnp.where(here_S, tiles.rows_R[jnp.minimum(at_S, rows - 1)], rows + slot_S)


def _matmul(
    tiles: Tiles, x_SK: jax.Array, experts: GpuExperts, bias_EF: jax.Array, swiglu_limit: float | None
) -> jax.Array:
    """Each slot times its tile's expert, plus the bias: [S, N].

    With two parts the clamped SwiGLU follows, and the result is bfloat16; with one it is float32.
    """
    num_experts, parts, blocks, outputs, _ = experts.words.shape
    step_outputs = tile_outputs(parts)
    steps = pl.cdiv(outputs, step_outputs)
    out_type = jax.ShapeDtypeStruct((x_SK.shape[0], outputs), jnp.bfloat16 if parts == 2 else jnp.float32)
    bias_EPN = bias_EF.astype(jnp.float32).reshape(num_experts, outputs, parts).transpose(0, 2, 1)
    bias_EPN = jnp.pad(bias_EPN, ((0, 0), (0, 0), (0, steps * step_outputs - outputs)))
    count_1 = jnp.sum(tiles.count_M > 0, dtype=jnp.int32)[None]
    stages = STAGES[parts]
    stored = (WARPGROUPS, STORED_ROWS[parts], 64 // parts)
    kernel = plgpu.kernel(
        functools.partial(_kernel, contracting=experts.contracting, parts=parts, swiglu_limit=swiglu_limit),
        out_type=out_type,
        scratch_types=dict(
            x_smem=plgpu.SMEM((stages, TILE_ROWS, BLOCK), jnp.bfloat16, transforms=_swizzled(128, 2)),
            words_smem=plgpu.SMEM((stages, parts, step_outputs, WORDS), jnp.int16, transforms=_swizzled(64, 2)),
            scales_smem=plgpu.SMEM((stages, parts, step_outputs), jnp.int32),
            out_smem=plgpu.SMEM(
                stored, out_type.dtype, transforms=_swizzled(64 if parts == 2 else 128, out_type.dtype.itemsize)
            ),
            filled=plgpu.Barrier(num_arrivals=1 + 2 * parts, num_barriers=stages),
            freed=plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=stages),
        ),
        grid=(_num_multiprocessors(),),
        grid_names=("program",),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, unsafe_no_auto_barriers=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
        kernel_name="mxfp4_gate_up_mosaic" if parts == 2 else "mxfp4_down_mosaic",
    )
    return kernel(
        tiles.expert_M,
        count_1,
        x_SK,
        lax.bitcast_convert_type(experts.words, jnp.int16),
        lax.bitcast_convert_type(experts.scales, jnp.int32),
        bias_EPN,
    )


def _num_multiprocessors() -> int:
    return 132


def _swizzled(swizzle: int, itemsize: int) -> tuple[Any, ...]:
    """Transforms of tiles whose rows of `swizzle` bytes are spread over the banks."""
    return plgpu.TilingTransform((8, swizzle // itemsize)), plgpu.SwizzleTransform(swizzle)


def _kernel(
    expert_ref: Any,
    count_ref: Any,
    x_ref: Any,
    words_ref: Any,
    scales_ref: Any,
    bias_ref: Any,
    out_ref: Any,
    *,
    x_smem: Any,
    words_smem: Any,
    scales_smem: Any,
    out_smem: Any,
    filled: Any,
    freed: Any,
    contracting: int,
    parts: int,
    swiglu_limit: float | None,
) -> None:
    warpgroup = lax.axis_index("warpgroup")
    program, programs = lax.axis_index("program"), lax.axis_size("program")
    stages = x_smem.shape[0]
    blocks = words_ref.shape[2]
    step_outputs = tile_outputs(parts)
    steps = pl.cdiv(out_ref.shape[1], step_outputs)
    own_tiles = pl.cdiv(count_ref[0] * steps - program, programs)

    def place(i: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The tile of activations and the step along the outputs of this program's i-th output tile."""
        index = program + i * programs
        return lax.div(index, jnp.int32(steps)), lax.rem(index, jnp.int32(steps))

    @pl.when(warpgroup == WARPGROUPS)
    def _fetch() -> None:
        plgpu.set_max_registers(24, action="decrease")

        @pl.loop(0, own_tiles)
        def _tile(i: jax.Array) -> None:
            tile, step = place(i)
            expert = expert_ref[tile]

            @pl.loop(0, blocks)
            def _block(b: jax.Array) -> None:
                turn = i * blocks + b
                slot = lax.rem(turn, jnp.int32(stages))

                @pl.when(turn >= stages)
                def _() -> None:
                    plgpu.barrier_wait(freed.at[slot])

                rows, columns = pl.ds(tile * TILE_ROWS, TILE_ROWS), pl.ds(b * BLOCK, BLOCK)
                outputs = pl.ds(step * step_outputs, step_outputs)
                ready = filled.at[slot]
                plgpu.copy_gmem_to_smem(x_ref.at[rows, columns], x_smem.at[slot], ready)
                for part in range(parts):
                    plgpu.copy_gmem_to_smem(
                        words_ref.at[expert, part, b, outputs], words_smem.at[slot, part], ready
                    )
                    plgpu.copy_gmem_to_smem(
                        scales_ref.at[expert, part, b, outputs], scales_smem.at[slot, part], ready
                    )

    @pl.when(warpgroup < WARPGROUPS)
    def _multiply() -> None:
        plgpu.set_max_registers(160, action="increase")
        rows = 64 // parts

        @pl.loop(0, own_tiles)
        def _tile(i: jax.Array) -> None:
            tile, step = place(i)
            expert = expert_ref[tile]
            own = pl.ds(warpgroup * rows, rows)

            def contract(acc_ref: Any) -> jax.Array:
                _contract(
                    acc_ref,
                    x_smem,
                    words_smem.at[:, :, own],
                    scales_smem.at[:, :, own],
                    filled,
                    freed,
                    i * blocks,
                    contracting,
                )
                return acc_ref[...]

            product = pl.run_scoped(contract, plgpu.ACC((64, TILE_ROWS), jnp.float32))
            first = step * step_outputs + warpgroup * rows
            biases = [
                plgpu.load(
                    bias_ref.at[expert, part, pl.ds(first, rows)],
                    layout=_layout(parts).reduce(1),
                    optimized=False,
                )
                for part in range(parts)
            ]
            result = _finish(product, biases, swiglu_limit)
            _store(result, out_smem.at[warpgroup], out_ref, tile * TILE_ROWS, first)

        plgpu.wait_smem_to_gmem(0)


def _layout(parts: int) -> Any:
    return HALF if parts == 2 else FULL


def _contract(
    acc_ref: Any,
    x_smem: Any,
    words_smem: Any,
    scales_smem: Any,
    filled: Any,
    freed: Any,
    first_turn: jax.Array,
    contracting: int,
) -> None:
    """Add a warpgroup's weight rows times the tile of activations to the accumulator.

    Each half block is unpacked while the one before is multiplied. The compiler tells registers apart only if no
    multiplication is under way from one round of a loop to the next.
    """
    stages = x_smem.shape[0]
    parts = words_smem.shape[1]
    blocks = pl.cdiv(contracting, BLOCK)

    def slot_of(b: jax.Array | int) -> jax.Array:
        return lax.rem(first_turn + b, jnp.int32(stages))

    def load(b: jax.Array | int) -> tuple[Any, ...]:
        slot = slot_of(b)
        plgpu.barrier_wait(filled.at[slot])
        words = [plgpu.load(words_smem.at[slot, p], layout=_layout(parts)) for p in range(parts)]
        scales = [plgpu.load(scales_smem.at[slot, p], layout=_layout(parts).reduce(1)) for p in range(parts)]
        return words, scales

    def multiply(packed: tuple[Any, ...], b: jax.Array | int, half: int) -> None:
        weights = _unpack(*packed, half)
        x = x_smem.at[slot_of(b), :, pl.ds(64 * half, 64)]
        plgpu.wgmma(acc_ref, weights, x.transpose((1, 0)))

    def block(b: jax.Array, packed: tuple[Any, ...]) -> tuple[Any, ...]:
        multiply(packed, b, 0)
        multiply(packed, b, 1)
        following = load(b + 1)
        plgpu.wgmma_wait(0)
        plgpu.barrier_arrive(freed.at[slot_of(b)])
        return following

    packed = lax.fori_loop(0, blocks - 1, block, load(0))
    multiply(packed, blocks - 1, 0)
    if contracting - (blocks - 1) * BLOCK > 64:
        multiply(packed, blocks - 1, 1)
    plgpu.wgmma_wait(0)
    plgpu.barrier_arrive(freed.at[slot_of(blocks - 1)])


def _finish(product: jax.Array, biases: list[jax.Array], swiglu_limit: float | None) -> jax.Array:
    """The product [64, TILE_ROWS] with its bias; SwiGLU of it with two parts."""
    if swiglu_limit is None:
        return product + _columns(biases[0], FULL)
    gate, up = _gate_and_up(product)
    gate = jnp.minimum(gate + _columns(biases[0], HALF), swiglu_limit)
    up = jnp.minimum(jnp.maximum(up + _columns(biases[1], HALF), -swiglu_limit), swiglu_limit)
    return (gate / (1 + jnp.exp(-SWIGLU_ALPHA * gate)) * (up + 1)).astype(jnp.bfloat16)


def _columns(bias: jax.Array, layout: Any) -> jax.Array:
    """A bias [outputs] for each activation row."""
    return plgpu.layout_cast(lax.broadcast_in_dim(bias, (bias.shape[0], TILE_ROWS), [0]), layout)


def _store(result: jax.Array, out_smem: Any, out_ref: Any, first_row: jax.Array, first_output: jax.Array) -> None:
    """Write a warpgroup's [outputs, TILE_ROWS] transposed to out[first_row:, first_output:]."""
    outputs, rows = result.shape[0], out_smem.shape[0]
    if result.dtype == jnp.float32:
        result = plgpu.layout_cast(result, plgpu.Layout._WGMMA_ACC_32BIT)
    for start in range(0, TILE_ROWS, rows):
        # Shared memory is free again once the last store has read it.
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        _barrier()
        out_smem.transpose((1, 0))[...] = result[:, start : start + rows]
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(
            out_smem, out_ref.at[pl.ds(first_row + start, rows), pl.ds(first_output, outputs)]
        )


def _barrier() -> None:
    @plgpu.inline_mgpu()
    def barrier(_: Any) -> None:
        mgpu.warpgroup_barrier()

    barrier()


def _unpack(words: list[jax.Array], scales: list[jax.Array], half: int) -> jax.Array:
    """Half a block of weights, bfloat16 [64, 64]: the nibbles 2 half and 2 half + 1 of the words."""
    parts = len(words)

    @plgpu.inline_mgpu(
        arg_types=([_layout(parts)] * parts, [_layout(parts).reduce(1)] * parts),
        return_type=plgpu.ShapeDtypeStruct((64, 64), jnp.bfloat16, layout=FULL),
    )
    def unpack(_: Any, words: Any, scales: Any) -> Any:
        layout = mgpu.WGMMA_LAYOUT
        registers = np.empty(layout.registers_shape((64, 64)), dtype=object)
        pairs = ir.VectorType.get((2,), ir.BF16Type.get())
        i32 = ir.IntegerType.get_signless(32)
        for row in range(2):
            # Rows g or g + 8 of each 16: of FULL registers [1, 4 tiles, 1, 1, 2 rows, ...], of HALF one part's.
            own = words[row].registers.reshape(4) if parts == 2 else words[0].registers.reshape(4, 2)[:, row]
            scale = scales[row].registers.reshape(-1)[0] if parts == 2 else scales[0].registers.reshape(2)[row]
            scale = mgpu.utils.bitcast(scale, i32) if scale.type != i32 else scale
            for j in range(2):
                factor = _factor(scale, 2 * half + j)
                for column in range(4):
                    bits = _nibble(mgpu.utils.bitcast(own[column], i32), factor, 2 * half + j)
                    registers.reshape(8, 2)[4 * j + column, row] = mgpu.utils.bitcast(bits, pairs)
        return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

    return unpack(words, scales)


def _asm(code: str, *args: ir.Value) -> ir.Value:
    """A pure function of 32-bit registers: $0 is the result, $1 and on are the arguments."""
    i32 = ir.IntegerType.get_signless(32)
    return llvm.inline_asm(i32, list(args), code, ",".join(["=r"] + ["r"] * len(args)), has_side_effects=False)


def _factor(scales: ir.Value, j: int) -> ir.Value:
    """Twice 2^(scale - 1) in bfloat16 of byte j of the scales; see `gpu_layout.group_factor`."""
    return _asm(
        "{ .reg .b32 a; prmt.b32 a, $1, 0, " + hex(0x4040 + 0x0101 * j) + "; mad.lo.u32 $0, a, 128, 0x3F003F00; }",
        scales,
    )


def _nibble(words: ir.Value, factor: ir.Value, j: int) -> ir.Value:
    """The values of nibble j of two words times the factor; see `gpu_layout.unpack` for the bits.

    A multiplication by 2^6 + 2^12 puts magnitude and sign in their places at once.
    """
    shifted = "shr.u32 a, $1, 8;" if j >= 2 else "mov.b32 a, $1;"
    mask, multiplier = (0x000F000F, 0x1040) if j % 2 == 0 else (0x00F000F0, 0x104)
    return _asm(
        "{ .reg .b32 a, c;"
        + shifted
        + f"and.b32 a, a, {mask:#x}; mul.lo.u32 a, a, {multiplier:#x}; and.b32 a, a, 0x81C081C0;"
        + "mov.b32 c, 0x80008000; fma.rn.bf16x2 $0, a, $2, c; }",
        words,
        factor,
    )


def _gate_and_up(product: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rows 0 to 7 and 8 to 15 of each 16 of a product [64, TILE_ROWS] in FULL, as two arrays in HALF."""
    half = plgpu.ShapeDtypeStruct((32, TILE_ROWS), jnp.float32, layout=HALF)

    @plgpu.inline_mgpu(arg_types=(FULL,), return_type=(half, half))
    def split(_: Any, product: Any) -> Any:
        layout = HALF.to_mgpu()
        shape = layout.registers_shape((32, TILE_ROWS))
        both = product.registers.reshape(TILE_ROWS // 8, 2)
        return tuple(
            mgpu.FragmentedArray(_registers=both[:, row].reshape(shape), _layout=layout, _is_signed=None)
            for row in range(2)
        )

    return split(product)
