"""The expert op on Hopper GPUs for many rows, as Pallas kernels lowered through Mosaic GPU.

Rows are sorted by expert into tiles of a single expert each, padded to whole tiles, so that every load and store of
activations is a full tile of a padded array. A kernel is persistent: one program per multiprocessor loops over output
tiles. One warpgroup fetches blocks of activations and packed weights into a ring buffer in shared memory. Three others
each unpack 64 rows of the weights in registers to bfloat16, which represents every released value exactly, and
multiply them with the shared tile of activations.

For gate_up, each 16 weight rows of a warp are 8 gate rows and the 8 up rows of the same outputs, so that one thread
has both products for SwiGLU.

Shapes are named by suffix: T tokens, k experts of a token, R = T k rows, M tiles, S slots of padded tiles, D hidden,
I intermediate, K contracting, N outputs, E experts, P parts, B blocks.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

from pallas_kernels.mxfp4_matmul.gpu_layout import BLOCK, WORDS, GpuExperts, unpack
from pallas_kernels.mxfp4_matmul.reference import SWIGLU_ALPHA, ExpertWeight
from pallas_kernels.mxfp4_matmul.tiles import Tiles, tiles_by_expert

MIN_ROWS_PER_EXPERT = 48
"""Average rows per expert from which this backend is faster than the Triton kernels."""

TILE_ROWS = 128
"""Activation rows of a tile."""

MULTIPLIED_ROWS = (64, 128)
"""Sizes of the multiplied part of a tile: the smallest that contains all of its rows is used."""

COPIED = 64
"""The activations' columns are a multiple of this: a copy fills rows of 128 bytes in shared memory."""

WARPGROUPS = 3
"""Warpgroups that multiply 64 weight rows each: the released 2880 outputs are whole tiles of 192 or of 96."""

FETCHING_REGISTERS, MULTIPLYING_REGISTERS = 24, 160
"""Registers per thread; the sum over the four warpgroups is at most 512."""

STAGES = {1: 3, 2: 4}
"""Number of blocks in the ring buffer, by parts."""

UNROLL = 3
"""Blocks that are multiplied per loop iteration, without waiting for all of them; more would spill registers."""

STORED_ROWS = {1: 64, 2: 128}
"""Activation rows that a warpgroup stages in shared memory at once for a store, by parts."""

VALUE_BITS = 0x81C081C0
"""Sign, low two exponent bits and top mantissa bit of two bfloat16."""

NIBBLES = tuple((8 * (j // 2), 0x000F000F << 4 * (j % 2), (1 << 6 | 1 << 12) >> 4 * (j % 2)) for j in range(4))
"""For nibble j of two words: a right shift, a mask, and a multiplier. The multiplication adds two shifted copies of the
nibble, which do not overlap and put its magnitude and its sign at VALUE_BITS."""

INTERPRETED_PROGRAMS = 2
"""Number of programs when the kernel is interpreted; a GPU has one per multiprocessor."""

FULL = plgpu.Layout.WGMMA
HALF = plgpu.Layout.TILED(
    plgpu.Tiling(((32, 8), (8, 8), (2,))), warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1
)
"""Rows g and g + 8 of each 16 rows in FULL correspond to row g of two arrays in HALF."""


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
    interpret: bool | plgpu.InterpretGPUParams,
) -> jax.Array:
    """See `pallas_kernels.mxfp4_matmul.expert_mlp`; experts in the layout of `gpu_layout.prepare`."""
    if not isinstance(gate_up_EFD, GpuExperts) or not isinstance(down_EDI, GpuExperts):
        raise NotImplementedError("the experts are not in the GPU layout: see gpu_layout.prepare")
    if gate_up_EFD.words.shape[1] != 2 or down_EDI.words.shape[1] != 1:
        raise NotImplementedError("gate_up must be prepared in two parts and down in one")
    if x_TD.dtype != jnp.bfloat16:
        raise NotImplementedError(f"tokens of {x_TD.dtype}")
    num_tokens, k = expert_ids_Tk.shape
    num_experts = gate_up_EFD.shape[0]
    if not interpret and num_tokens * k < MIN_ROWS_PER_EXPERT * num_experts:
        raise NotImplementedError(
            f"{num_tokens * k} rows for {num_experts} experts: fewer than {MIN_ROWS_PER_EXPERT} each"
        )
    programs = INTERPRETED_PROGRAMS if interpret else multiprocessors()

    tiles = tiles_by_expert(expert_ids_Tk.reshape(num_tokens * k), num_experts, TILE_ROWS)
    row_S = rows_of_slots(tiles)
    x_SD = jnp.pad(x_TD, ((0, 0), (0, -x_TD.shape[1] % COPIED))).at[row_S // k].get(mode="clip")
    matmul = functools.partial(_matmul, tiles, programs=programs, interpret=interpret)
    hidden_SI = matmul(x_SD, gate_up_EFD, gate_up_bias_EF, swiglu_limit)
    out_SD = matmul(hidden_SI, down_EDI, down_bias_ED, None)
    weights_Tk = expert_weights_Tk.astype(jnp.float32)
    out_TD = _sum_of_choices(out_SD, row_S, weights_Tk, expert_ids_Tk < num_experts)
    if residual_TD is not None:
        out_TD += residual_TD.astype(jnp.float32)
    return out_TD.astype(out_dtype or x_TD.dtype)


def multiprocessors() -> int:
    """Multiprocessors of the GPU that is traced for. Raises NotImplementedError if it is not a Hopper GPU."""
    device: Any = jax.sharding.get_abstract_mesh().abstract_device
    count = getattr(device, "num_cores", None)
    if device is None:
        device = jax.config.jax_default_device or jax.local_devices()[0]
        count = getattr(device, "core_count", None)
    kind = getattr(device, "device_kind", str(device))
    if not re.search(r"\bG?H\d{2,3}\b", kind) or not count:
        raise NotImplementedError(f"{kind}: not a Hopper GPU with a known number of multiprocessors")
    return count


def rows_of_slots(tiles: Tiles) -> jax.Array:
    """The row of each slot [S] of tiles of TILE_ROWS; empty slots have distinct values of R or more."""
    rows = tiles.rows_R.shape[0]
    within = jnp.arange(TILE_ROWS, dtype=jnp.int32)
    at_S = (tiles.start_M[:, None] + within).reshape(-1)
    here_S = (within < tiles.count_M[:, None]).reshape(-1)
    slot_S = jnp.arange(at_S.shape[0], dtype=jnp.int32)
    return jnp.where(here_S, tiles.rows_R[jnp.minimum(at_S, rows - 1)], rows + slot_S)


def _sum_of_choices(out_SD: jax.Array, row_S: jax.Array, weights_Tk: jax.Array, here_Tk: jax.Array) -> jax.Array:
    """The weighted sum of each token's rows: [T, D]."""
    num_tokens, k = weights_Tk.shape
    slot_S = jnp.arange(row_S.shape[0], dtype=jnp.int32)
    slot_R = jnp.zeros(num_tokens * k, jnp.int32).at[row_S].set(slot_S, mode="drop", unique_indices=True)
    out_TkD = out_SD[slot_R].reshape(num_tokens, k, -1) * weights_Tk[..., None]
    return jnp.sum(jnp.where(here_Tk[..., None], out_TkD, 0), axis=1)


def tile_outputs(parts: int) -> int:
    """Number of outputs of a tile, which is its weight rows of each part."""
    return WARPGROUPS * 64 // parts


def _matmul(
    tiles: Tiles,
    x_SK: jax.Array,
    experts: GpuExperts,
    bias_EF: jax.Array,
    swiglu_limit: float | None,
    *,
    programs: int,
    interpret: bool | plgpu.InterpretGPUParams,
) -> jax.Array:
    """Multiply each slot with its tile's expert and add the bias: [S, N]; empty slots have undefined values.

    With two parts, the clamped SwiGLU is applied, and the result is bfloat16, padded with zeros to a multiple of
    COPIED columns. With one part it is float32.
    """
    num_experts, parts, _, outputs, _ = experts.words.shape
    padded = outputs + -outputs % COPIED if parts == 2 else outputs
    bias_EPN = bias_EF.astype(jnp.float32).reshape(num_experts, outputs, parts).transpose(0, 2, 1)
    covered = pl.cdiv(padded, tile_outputs(parts)) * tile_outputs(parts)
    bias_EPN = jnp.pad(bias_EPN, ((0, 0), (0, 0), (0, covered - outputs)))
    out_type = jax.ShapeDtypeStruct((x_SK.shape[0], padded), jnp.bfloat16 if parts == 2 else jnp.float32)
    body = functools.partial(
        _kernel, contracting=experts.contracting, swiglu_limit=swiglu_limit, interpret=bool(interpret)
    )
    kernel = plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=_scratch(parts, out_type.dtype, bool(interpret)),
        grid=(programs,),
        grid_names=("program",),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, unsafe_no_auto_barriers=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
        kernel_name="mxfp4_gate_up_mosaic" if parts == 2 else "mxfp4_down_mosaic",
        interpret=plgpu.InterpretGPUParams() if interpret is True else interpret or None,
    )
    return kernel(
        tiles.expert_M,
        tiles.count_M,
        jnp.sum(tiles.count_M > 0, dtype=jnp.int32)[None],
        x_SK,
        lax.bitcast_convert_type(experts.words, jnp.int16),
        lax.bitcast_convert_type(experts.scales, jnp.int32),
        bias_EPN,
    )


def _scratch(parts: int, out_dtype: Any, interpret: bool) -> dict[str, Any]:
    """Shared memory and barriers of a program."""

    def swizzled(row_bytes: int, itemsize: int) -> tuple[Any, ...]:
        """A swizzled layout, which avoids bank conflicts."""
        tiling = plgpu.TilingTransform((8, row_bytes // itemsize))  # type: ignore[abstract]
        return tiling, plgpu.SwizzleTransform(row_bytes)  # type: ignore[abstract]

    stages, outputs = STAGES[parts], tile_outputs(parts)
    stored = (WARPGROUPS, STORED_ROWS[parts], 64 // parts)
    stored_bytes = min(128, 64 // parts * out_dtype.itemsize)
    scratch = {
        "x": plgpu.SMEM((stages, TILE_ROWS, BLOCK), jnp.bfloat16, transforms=swizzled(128, 2)),
        "words": plgpu.SMEM((stages, parts, outputs, WORDS), jnp.int16, transforms=swizzled(2 * WORDS, 2)),
        "scales": plgpu.SMEM((stages, parts, outputs), jnp.int32),
        "out_smem": plgpu.SMEM(stored, out_dtype, transforms=swizzled(stored_bytes, out_dtype.itemsize)),
        "filled": plgpu.Barrier(num_arrivals=1 + 2 * parts, num_barriers=stages),
        "freed": plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=stages),
    }
    if interpret:
        scratch["unpacked"] = plgpu.SMEM((WARPGROUPS, 64, 64), jnp.bfloat16)
    return scratch


@dataclasses.dataclass(frozen=True)
class _Ring:
    """Ring buffer of blocks of activations and weights in shared memory, with two barriers per slot.

    Copies arrive at `filled`, and the multiplying warpgroups at `freed`. A program numbers its blocks consecutively
    over all of its output tiles; block n is in slot n % stages. `words` and `scales` are [stages, P, rows, ...], of
    all warpgroups or of one. `unpacked` is half a block of weights for the interpreter, whose wgmma does not accept
    operands in registers.
    """

    x: Any
    words: Any
    scales: Any
    filled: Any
    freed: Any
    unpacked: Any = None

    @property
    def stages(self) -> int:
        return self.x.shape[0]

    @property
    def parts(self) -> int:
        return self.words.shape[1]

    def slot(self, number: jax.Array) -> jax.Array:
        return lax.rem(number, jnp.int32(self.stages))

    def of(self, warpgroup: jax.Array) -> _Ring:
        rows = 64 // self.parts
        own = pl.ds(warpgroup * rows, rows)
        words, scales = self.words.at[:, :, own], self.scales.at[:, :, own]
        unpacked = None if self.unpacked is None else self.unpacked.at[warpgroup]
        return dataclasses.replace(self, words=words, scales=scales, unpacked=unpacked)


def _kernel(
    expert_ref: Any,
    count_ref: Any,
    tiles_ref: Any,
    x_ref: Any,
    words_ref: Any,
    scales_ref: Any,
    bias_ref: Any,
    out_ref: Any,
    *,
    out_smem: Any,
    contracting: int,
    swiglu_limit: float | None,
    interpret: bool,
    **ring_of_blocks: Any,
) -> None:
    """`tiles_ref` [1] is the number of tiles that have rows, which are the first ones."""
    ring = _Ring(**ring_of_blocks)
    warpgroup = lax.axis_index("warpgroup")
    program, programs = lax.axis_index("program"), lax.axis_size("program")
    outputs = tile_outputs(ring.parts)
    steps = pl.cdiv(out_ref.shape[1], outputs)
    blocks = pl.cdiv(contracting, BLOCK)
    own_tiles = pl.cdiv(tiles_ref[0] * steps - program, programs)

    def place(i: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The tile of activations and the first output of this program's i-th output tile."""
        index = program + i * programs
        return lax.div(index, jnp.int32(steps)), lax.rem(index, jnp.int32(steps)) * outputs

    @pl.when(warpgroup == WARPGROUPS)
    def _fetch() -> None:
        if not interpret:
            plgpu.set_max_registers(FETCHING_REGISTERS, action="decrease")

        @pl.loop(0, own_tiles)
        def _tile(i: jax.Array) -> None:
            tile, first = place(i)
            own = pl.ds(first, outputs)
            expert = expert_ref[tile]
            x = x_ref.at[pl.ds(tile * TILE_ROWS, TILE_ROWS)]
            _fill(ring, x, words_ref.at[expert, :, :, own], scales_ref.at[expert, :, :, own], i * blocks, blocks)

        @pl.loop(jnp.maximum(own_tiles * blocks - ring.stages, 0), own_tiles * blocks)
        def _wait(number: jax.Array) -> None:
            plgpu.barrier_wait(ring.freed.at[ring.slot(number)])

    @pl.when(warpgroup < WARPGROUPS)
    def _multiply() -> None:
        if not interpret:
            plgpu.set_max_registers(MULTIPLYING_REGISTERS, action="increase")
        rows = 64 // ring.parts

        def multiply(multiplied: int, i: jax.Array) -> None:
            tile, first = place(i)
            own = pl.ds(first + warpgroup * rows, rows)
            bias = [_load_bias(bias_ref.at[expert_ref[tile], part, own], ring.parts) for part in range(ring.parts)]
            contract = functools.partial(_contract, ring.of(warpgroup), i * blocks, contracting, interpret)
            product = pl.run_scoped(contract, plgpu.ACC((64, multiplied), jnp.float32))
            result = _finish(product, bias, swiglu_limit, interpret)
            _store(result, out_smem.at[warpgroup], out_ref.at[pl.ds(tile * TILE_ROWS, TILE_ROWS), own], interpret)

        @pl.loop(0, own_tiles)
        def _tile(i: jax.Array) -> None:
            count = count_ref[place(i)[0]]
            fewer = 0
            for multiplied in MULTIPLIED_ROWS:
                pl.when((count > fewer) & (count <= multiplied))(functools.partial(multiply, multiplied, i))
                fewer = multiplied

        plgpu.wait_smem_to_gmem(0)


def _fill(ring: _Ring, x_ref: Any, words_ref: Any, scales_ref: Any, number: jax.Array, blocks: int) -> None:
    """Copy all blocks of an output tile into the ring as its slots are freed; the first block has this number."""

    @pl.loop(0, blocks)
    def _block(b: jax.Array) -> None:
        slot = ring.slot(number + b)

        @pl.when(number + b >= ring.stages)
        def _() -> None:
            plgpu.barrier_wait(ring.freed.at[slot])

        ready = ring.filled.at[slot]
        plgpu.copy_gmem_to_smem(x_ref.at[:, pl.ds(b * BLOCK, BLOCK)], ring.x.at[slot], ready)
        for part in range(ring.parts):
            plgpu.copy_gmem_to_smem(words_ref.at[part, b], ring.words.at[slot, part], ready)
            plgpu.copy_gmem_to_smem(scales_ref.at[part, b], ring.scales.at[slot, part], ready)


def _contract(ring: _Ring, number: jax.Array, contracting: int, interpret: bool, acc_ref: Any) -> jax.Array:
    """Multiply a warpgroup's 64 weight rows with the tile of activations, whose first block has this number.

    Each half of a block is unpacked while the previous half is multiplied. At the end of each iteration of UNROLL
    blocks all multiplications are awaited, because the compiler can assign separate registers to the weights within an
    iteration but not across iterations. Meanwhile the other warpgroups keep the tensor cores busy.
    """
    layout = _layout(ring.parts)
    blocks = pl.cdiv(contracting, BLOCK)
    last_halves = pl.cdiv(contracting - (blocks - 1) * BLOCK, BLOCK // 2)

    def load(b: jax.Array | int) -> tuple[list[jax.Array], list[jax.Array]]:
        slot = ring.slot(number + b)
        plgpu.barrier_wait(ring.filled.at[slot])
        words = [plgpu.load(ring.words.at[slot, part], layout=layout) for part in range(ring.parts)]
        scales = [plgpu.load(ring.scales.at[slot, part], layout=layout.reduce(1)) for part in range(ring.parts)]
        return words, scales

    def multiply(packed: tuple[list[jax.Array], list[jax.Array]], b: jax.Array | int, half: int) -> None:
        x = ring.x.at[ring.slot(number + b), pl.ds(0, acc_ref.shape[1]), pl.ds(64 * half, 64)].transpose((1, 0))
        if interpret:
            ring.unpacked[...] = _unpack_plain(*packed, half)
            plgpu.wgmma(acc_ref, ring.unpacked, x)
        else:
            plgpu.wgmma(acc_ref, _unpack(*packed, half), x)

    def free(b: jax.Array | int, under_way: int) -> None:
        plgpu.wgmma_wait(under_way)
        if interpret:
            # The data is already in registers, but the interpreter requires a fence.
            plgpu.commit_smem()
        plgpu.barrier_arrive(ring.freed.at[ring.slot(number + b)])

    def multiply_blocks(first: jax.Array | int, count: int, packed: Any, following: bool) -> Any:
        """Multiply `count` blocks, beginning with `packed`; returns the block after them, if `following`."""
        for b in range(count):
            more = following or b < count - 1
            multiply(packed, first + b, 0)
            if b > 0:
                free(first + b - 1, 1)
            if more or last_halves == 2:
                multiply(packed, first + b, 1)
            packed = load(first + b + 1) if more else None
        free(first + count - 1, 0)
        return packed

    iterations = (blocks - 1) // UNROLL
    packed = load(0)
    if iterations:
        packed = lax.fori_loop(
            0, iterations, lambda i, packed: multiply_blocks(i * UNROLL, UNROLL, packed, True), packed
        )
    multiply_blocks(iterations * UNROLL, blocks - iterations * UNROLL, packed, False)
    return acc_ref[...]


def _layout(parts: int) -> Any:
    """The register layout of a warpgroup's rows of one part."""
    return HALF if parts == 2 else FULL


def _load_bias(bias_ref: Any, parts: int) -> jax.Array:
    return plgpu.load(bias_ref, layout=_layout(parts).reduce(1), optimized=False)


def _finish(product: jax.Array, bias: list[jax.Array], swiglu_limit: float | None, interpret: bool) -> jax.Array:
    """Add the bias to a warpgroup's float32 product [64, rows]; with a limit, apply SwiGLU: bfloat16 [32, rows]."""

    def biased(x: jax.Array, part: int) -> jax.Array:
        return x + plgpu.layout_cast(lax.broadcast_in_dim(bias[part], x.shape, [0]), _layout(len(bias)))

    if swiglu_limit is None:
        return biased(product, 0)
    gate, up = (_split_plain if interpret else _split)(product)
    gate = jnp.minimum(biased(gate, 0), swiglu_limit)
    up = jnp.minimum(jnp.maximum(biased(up, 1), -swiglu_limit), swiglu_limit)
    return (gate / (1 + jnp.exp(-SWIGLU_ALPHA * gate)) * (up + 1)).astype(jnp.bfloat16)


def _store(result: jax.Array, out_smem: Any, out_ref: Any, interpret: bool) -> None:
    """Write a warpgroup's [outputs, rows], transposed, to the first rows of out [TILE_ROWS, outputs]."""
    if result.dtype == jnp.float32:
        # Values that are adjacent in registers are not adjacent in the transposed tile.
        result = plgpu.layout_cast(result, plgpu.Layout._WGMMA_ACC_32BIT)
    for start in range(0, result.shape[1], out_smem.shape[0]):
        rows = min(out_smem.shape[0], result.shape[1] - start)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        if not interpret:
            _barrier()
        part_smem = out_smem.at[pl.ds(0, rows)]
        part_smem.transpose((1, 0))[...] = result[:, start : start + rows]
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(part_smem, out_ref.at[pl.ds(start, rows)])


def _barrier() -> None:
    """Synchronise the warps of the warpgroup, because only one of them has waited for the last store."""

    @plgpu.inline_mgpu()
    def barrier(_: Any) -> None:
        mgpu.warpgroup_barrier()

    barrier()


def _unpack(words: list[jax.Array], scales: list[jax.Array], half: int) -> jax.Array:
    """Half a block of weights, bfloat16 [64, 64]: nibbles 2 half and 2 half + 1 of the words of each part.

    A thread's 32-bit register has two adjacent values of a row. The thread has two of each 16 rows: both of one part,
    or one of each part.
    """
    parts = len(words)
    layouts = [_layout(parts)] * parts, [_layout(parts).reduce(1)] * parts

    @plgpu.inline_mgpu(arg_types=layouts, return_type=plgpu.ShapeDtypeStruct((64, 64), jnp.bfloat16, layout=FULL))
    def build(_: Any, words: Any, scales: Any) -> Any:
        shape = mgpu.WGMMA_LAYOUT.registers_shape((64, 64))
        pairs = ir.VectorType.get((2,), ir.BF16Type.get())
        i32 = ir.IntegerType.get_signless(32)
        words_PCR = np.stack([own.registers.reshape(WORDS // 8, 2 // parts) for own in words])
        scales_PR = np.stack([own.registers.reshape(2 // parts) for own in scales])
        registers = np.empty((2, WORDS // 8, 2), dtype=object)
        for j, column, row in np.ndindex(registers.shape):
            at = (row, column, 0) if parts == 2 else (0, column, row)
            factor = _factor(mgpu.utils.bitcast(scales_PR[at[0], at[2]], i32), 2 * half + j)
            values = _nibble(mgpu.utils.bitcast(words_PCR[at], i32), factor, 2 * half + j)
            registers[j, column, row] = mgpu.utils.bitcast(values, pairs)
        return mgpu.FragmentedArray(
            _registers=registers.reshape(shape), _layout=mgpu.WGMMA_LAYOUT, _is_signed=None
        )

    return build(words, scales)


def _unpack_plain(words: list[jax.Array], scales: list[jax.Array], half: int) -> jax.Array:
    """`_unpack` for the interpreter."""
    columns = []
    for j in (2 * half, 2 * half + 1):
        parts = [
            unpack(own, (scale >> (8 * j) & 255)[:, None], j) for own, scale in zip(words, scales, strict=True)
        ]
        columns.append(jnp.stack([part.reshape(4, -1, WORDS) for part in parts], axis=1).reshape(64, WORDS))
    return jnp.concatenate(columns, axis=1).astype(jnp.bfloat16)


def _asm(code: str, *args: ir.Value) -> ir.Value:
    """Inline PTX without side effects: computes the 32-bit register $0 from $1, $2, ..."""
    i32 = ir.IntegerType.get_signless(32)
    return llvm.inline_asm(i32, list(args), code, ",".join(["=r"] + ["r"] * len(args)), has_side_effects=False)


def _factor(scales: ir.Value, j: int) -> ir.Value:
    """2^(scale - 1) of byte j of the scales, as bfloat16 in both halves; see `gpu_layout.group_factor`."""
    selector = f"{0x4040 + 0x0101 * j:#x}"
    return _asm("{ .reg .b32 a; prmt.b32 a, $1, 0, " + selector + "; mad.lo.u32 $0, a, 128, 0x3F003F00; }", scales)


def _nibble(words: ir.Value, factor: ir.Value, j: int) -> ir.Value:
    """The values of nibble j of two words, times the factor; see `gpu_layout.unpack` for the bit operations."""
    shift, mask, multiplier = NIBBLES[j]
    return _asm(
        "{ .reg .b32 a, c;"
        + (f"shr.u32 a, $1, {shift};" if shift else "mov.b32 a, $1;")
        + f"and.b32 a, a, {mask:#x}; mul.lo.u32 a, a, {multiplier:#x}; and.b32 a, a, {VALUE_BITS:#x};"
        + "mov.b32 c, 0x80008000; fma.rn.bf16x2 $0, a, $2, c; }",
        words,
        factor,
    )


def _split(product: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rows 0 to 7 and 8 to 15 of each 16 of a product [64, rows] in FULL, as two arrays in HALF."""
    rows = product.shape[1]
    half = plgpu.ShapeDtypeStruct((32, rows), jnp.float32, layout=HALF)

    @plgpu.inline_mgpu(arg_types=(FULL,), return_type=(half, half))
    def build(_: Any, product: Any) -> Any:
        layout = HALF.to_mgpu()
        shape = layout.registers_shape((32, rows))
        both = product.registers.reshape(rows // 8, 2)
        return tuple(
            mgpu.FragmentedArray(_registers=both[:, row].reshape(shape), _layout=layout, _is_signed=None)
            for row in range(2)
        )

    return build(product)


def _split_plain(product: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`_split` for the interpreter."""
    both = product.reshape(4, 2, 8, -1)
    return both[:, 0].reshape(32, -1), both[:, 1].reshape(32, -1)
