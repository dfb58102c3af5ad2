"""The expert op on TPUs, as Pallas kernels lowered through Mosaic.

Both variants multiply bfloat16 tokens with weights that are unpacked in registers to bfloat16, which represents every
released value exactly, and accumulate in float32. Weights are copied by the pipeline's double buffering, in blocks
that span the whole contracting dimension, so each block is used once.

- few tokens: one kernel loops over the experts that any token chose, reads only their weights, once, and multiplies
  all tokens with each. A token's router weight is 0 for experts that it did not choose.
- many tokens: rows are sorted by expert and split into tiles of a single expert each. One kernel per product unpacks a
  block of weights when the expert changes, and multiplies all its tiles with it.

Shapes are named by suffix: T tokens, k experts of a token, U experts in use, M tiles, S slots of tiles, D hidden, I
intermediate, K contracting dimension, N lanes (rows of the weights).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from pallas_kernels.mxfp4_matmul.format import GROUP
from pallas_kernels.mxfp4_matmul.reference import SWIGLU_ALPHA, ExpertWeight
from pallas_kernels.mxfp4_matmul.tiles import tiles_by_expert
from pallas_kernels.mxfp4_matmul.tpu_layout import RUN, STEP, TpuExperts, pad_to, to_lanes
from pallas_kernels.tpu import LANES, VMEM_LIMIT, Chip, Interpret

MAX_TOKENS = 64
"""Up to this many tokens, multiplying all of them with an expert takes no longer than reading its weights."""

UNPACKED_AT_ONCE = 512
"""Values along the contracting dimension that are unpacked at a time: a multiple of the depth of the matrix units (128
or 256), large enough for the compiler to overlap products with unpacking."""

BLOCK_LANES = {1: 12 * LANES, 2: 16 * LANES}
"""Lanes of a block of down (1 part) and of gate_up (2 parts): 2.2 and 2.9 MB at 2880, each double-buffered."""

CHUNK = 2 * LANES
"""Lanes that are multiplied at a time."""

BIAS = 13
"""log2 of the ratio between a released value and the float8 number that `_as_float8` makes of its nibble."""


@dataclasses.dataclass(frozen=True)
class Unpacking:
    """How nibbles are unpacked: with `float4` by the chip's float4 conversion, else by integer operations and float8.

    `by_bits` packs pairs of bfloat16 by integer operations, because the interpreter lacks the pack instruction.
    """

    float4: bool
    by_bits: bool


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
    interpret: Interpret,
    chip: Chip | None = None,
) -> jax.Array:
    """See `pallas_kernels.mxfp4_matmul.expert_mlp`; experts in the layout of `tpu_layout.prepare`."""
    if not isinstance(gate_up_EFD, TpuExperts) or not isinstance(down_EDI, TpuExperts):
        raise NotImplementedError("the experts are not in the TPU layout: see tpu_layout.prepare")
    if gate_up_EFD.parts != 2 or down_EDI.parts != 1:
        raise NotImplementedError("gate_up must be prepared in two parts and down in one")
    if x_TD.dtype not in (jnp.bfloat16, jnp.float32):
        raise NotImplementedError(f"tokens of {x_TD.dtype}")
    chip = chip or Chip.current()
    few = functools.partial(_few_tokens, cores=chip.cores)
    compute: Callable[..., jax.Array] = few if x_TD.shape[0] <= MAX_TOKENS else _many_tokens
    out_TD = compute(
        x_TD,
        expert_ids_Tk,
        expert_weights_Tk.astype(jnp.float32),
        gate_up_EFD,
        to_lanes(gate_up_bias_EF, 2).astype(jnp.float32),
        down_EDI,
        to_lanes(down_bias_ED, 1).astype(jnp.float32),
        limit=swiglu_limit,
        interpret=interpret,
        unpacking=Unpacking(chip.float4, by_bits=bool(interpret)),
    )
    if residual_TD is not None:
        out_TD += residual_TD.astype(jnp.float32)
    return out_TD.astype(out_dtype or x_TD.dtype)


def _few_tokens(
    x_TD: jax.Array,
    ids_Tk: jax.Array,
    weights_Tk: jax.Array,
    gate_up: TpuExperts,
    gate_up_bias_EN: jax.Array,
    down: TpuExperts,
    down_bias_EN: jax.Array,
    *,
    limit: float,
    interpret: Interpret,
    unpacking: Unpacking,
    cores: int,
) -> jax.Array:
    """The weighted sum [T, D] in float32, by one kernel over the used experts, which are distributed over the cores."""
    tokens, hidden = x_TD.shape
    used_U, count, weights_TU = _experts_in_use(ids_Tk, weights_Tk, gate_up.shape[0], cores)
    x_TK = pad_to(pad_to(x_TD, 0, 16), 1, STEP)
    weights_TU = pad_to(weights_TU, 0, 16)
    rows = x_TK.shape[0]
    ups, downs = _blocks(gate_up), _blocks(down)
    # Padded to whole blocks, because the last chunk of lanes may extend past the biases.
    up_bias_UN, down_bias_UN = (
        pad_to(bias_EN[used_U][:, None], 2, _block_lanes(weight))
        for bias_EN, weight in ((gate_up_bias_EN, gate_up), (down_bias_EN, down))
    )
    out_CTN = jax.ShapeDtypeStruct((cores, rows, downs * _block_lanes(down)), jnp.float32)

    def up_block(core: Any, i: Any, step: Any, used: Any, count: Any) -> tuple[Any, ...]:
        u, last = i * cores + core, _last_of_core(core, cores, count)
        # Past the core's last used expert the block index does not change, so nothing more is read.
        return used[jnp.minimum(u, last)], 0, jnp.where(u < count[0], jnp.minimum(step, ups - 1), ups - 1)

    def down_block(core: Any, i: Any, step: Any, used: Any, count: Any) -> tuple[Any, ...]:
        u, last = i * cores + core, _last_of_core(core, cores, count)
        # During the gate_up steps the index stays at the previous block, so that each step reads one block.
        gate_up_step = (u < count[0]) & (step < ups)
        block = jnp.where(u < count[0], jnp.maximum(step - ups, 0), downs - 1)
        expert = used[jnp.where(gate_up_step & (i > 0), u - cores, jnp.minimum(u, last))]
        return expert, 0, jnp.where(gate_up_step & (i > 0), downs - 1, block)

    def whole(*_: Any) -> tuple[int, int]:
        return 0, 0

    def own(core: Any, i: Any, *_: Any) -> tuple[Any, ...]:
        return i * cores + core, 0, 0

    sums_CTN = pl.pallas_call(
        functools.partial(_few_tokens_kernel, ups=ups, up=gate_up, down=down, limit=limit, unpacking=unpacking),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(cores, len(used_U) // cores, ups + downs),
            in_specs=[
                pl.BlockSpec(x_TK.shape, whole),
                pl.BlockSpec(weights_TU.shape, whole),
                *_weight_specs(gate_up, up_block),
                pl.BlockSpec((1, *up_bias_UN.shape[1:]), own),
                *_weight_specs(down, down_block),
                pl.BlockSpec((1, *down_bias_UN.shape[1:]), own),
            ],
            out_specs=pl.BlockSpec((1, *out_CTN.shape[1:]), lambda core, *_: (core, 0, 0)),
            scratch_shapes=[
                pltpu.VMEM((gate_up.scales.shape[1], _block_lanes(gate_up)), jnp.float32),
                pltpu.VMEM((down.scales.shape[1], _block_lanes(down)), jnp.float32),
                pltpu.VMEM((rows, ups * _block_lanes(gate_up) // 2), x_TD.dtype),
            ],
        ),
        out_shape=out_CTN,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
        ),
        interpret=interpret,
        name="mxfp4_few_tokens",
    )(
        used_U,
        count,
        x_TK,
        weights_TU,
        gate_up.blocks,
        gate_up.scales,
        up_bias_UN,
        down.blocks,
        down.scales,
        down_bias_UN,
    )
    return jnp.sum(sums_CTN, axis=0)[:tokens, :hidden]


def _last_of_core(core: Any, cores: int, count: Any) -> Any:
    """Index of the last used expert of a core, which computes every `cores`-th one."""
    return core + cores * (jnp.maximum(count[0] - 1 - core, 0) // cores)


def _experts_in_use(
    ids_Tk: jax.Array, weights_Tk: jax.Array, num_experts: int, multiple: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The experts that any token chose, int32 [U], their number [1], and each token's weights of them [T, U].

    U is the largest possible number, rounded up to a multiple. Entries past the number repeat the last expert, with
    weights of 0.
    """
    experts_E = jnp.arange(num_experts, dtype=jnp.int32)
    chosen_TkE = ids_Tk[..., None] == experts_E
    weights_TE = jnp.sum(jnp.where(chosen_TkE, weights_Tk[..., None], 0), axis=1)
    in_use_E = jnp.any(chosen_TkE, axis=(0, 1))
    count = jnp.sum(in_use_E, dtype=jnp.int32)
    place_E = jnp.cumsum(in_use_E, dtype=jnp.int32) - 1
    slot_U = jnp.arange(pl.cdiv(min(num_experts, ids_Tk.size), multiple) * multiple, dtype=jnp.int32)
    own_UE = in_use_E & (place_E == jnp.minimum(slot_U, count - 1)[:, None])
    used_U = jnp.sum(jnp.where(own_UE, experts_E, 0), axis=1)
    return used_U, count[None], jnp.where(slot_U < count, weights_TE[:, used_U], 0)


def _few_tokens_kernel(
    used_ref: Any,
    count_ref: Any,
    x_ref: Any,
    weights_ref: Any,
    up_blocks_ref: Any,
    up_scales_ref: Any,
    up_bias_ref: Any,
    down_blocks_ref: Any,
    down_scales_ref: Any,
    down_bias_ref: Any,
    out_ref: Any,
    up_factors_ref: Any,
    down_factors_ref: Any,
    hidden_ref: Any,
    *,
    ups: int,
    up: TpuExperts,
    down: TpuExperts,
    limit: float,
    unpacking: Unpacking,
) -> None:
    del used_ref
    core, i, step = (pl.program_id(axis) for axis in range(3))
    u = i * pl.num_programs(0) + core
    here = u < count_ref[0]

    @pl.when((i == 0) & (step == 0))
    def _() -> None:
        out_ref[...] = jnp.zeros_like(out_ref)

    @pl.when(here & (step < ups))
    def _() -> None:
        up_factors_ref[...] = _factors(up_scales_ref[0], unpacking)

        def chunk(local: Any, lanes: Any, width: int) -> None:
            product = _product(x_ref, up_blocks_ref, up_factors_ref, local, width, unpacking)
            gate_up = product + up_bias_ref[0, :, pl.ds(lanes, width)]
            hidden_ref[:, pl.ds(_divided(lanes, 2, CHUNK), width // 2)] = _swiglu(gate_up, limit).astype(
                hidden_ref.dtype
            )

        _for_chunks(step, up, chunk)

    @pl.when(here & (step >= ups))
    def _() -> None:
        down_factors_ref[...] = _factors(down_scales_ref[0], unpacking)
        column = lax.broadcasted_iota(jnp.int32, weights_ref.shape, 1)
        weight_T1 = jnp.sum(jnp.where(column == u, weights_ref[...], 0), axis=1, keepdims=True)

        def chunk(local: Any, lanes: Any, width: int) -> None:
            product = _product(hidden_ref, down_blocks_ref, down_factors_ref, local, width, unpacking)
            own = weight_T1 * (product + down_bias_ref[0, :, pl.ds(lanes, width)])
            # The product of a token that did not choose the expert may have overflowed.
            out_ref[0, :, pl.ds(lanes, width)] += jnp.where(weight_T1 == 0, 0, own)

        _for_chunks(step - ups, down, chunk)


def _many_tokens(
    x_TD: jax.Array,
    ids_Tk: jax.Array,
    weights_Tk: jax.Array,
    gate_up: TpuExperts,
    gate_up_bias_EN: jax.Array,
    down: TpuExperts,
    down_bias_EN: jax.Array,
    *,
    limit: float,
    interpret: Interpret,
    unpacking: Unpacking,
) -> jax.Array:
    """The weighted sum [T, D] in float32, by rows sorted by expert."""
    tokens, k = ids_Tk.shape
    rows, num_experts = tokens * k, gate_up.shape[0]
    tile_rows = min(256, max(16, pl.next_power_of_2(pl.cdiv(rows, num_experts))))
    tiles = tiles_by_expert(ids_Tk.reshape(rows), num_experts, tile_rows)
    # Empty tiles come last; their block index stays at the last non-empty tile, so they read and write nothing.
    last = jnp.maximum(jnp.sum(tiles.count_M > 0, dtype=jnp.int32) - 1, 0)
    at_M = jnp.minimum(jnp.arange(len(tiles.expert_M), dtype=jnp.int32), last)
    expert_M = tiles.expert_M[at_M]
    place_MS = jnp.arange(tile_rows)
    inside_MS = place_MS < tiles.count_M[:, None]
    row_S = tiles.rows_R[jnp.minimum(tiles.start_M[:, None] + place_MS, rows - 1)].reshape(-1)
    x_SK = pad_to(x_TD, 1, STEP)[row_S // k]
    args = (expert_M, at_M, tiles.count_M)
    hidden_SI = _grouped(*args, x_SK, gate_up, gate_up_bias_EN, tile_rows, x_TD.dtype, limit, interpret, unpacking)
    out_SN = _grouped(*args, hidden_SI, down, down_bias_EN, tile_rows, jnp.float32, None, interpret, unpacking)
    # Gathering each token's rows keeps its sum independent of the other tokens.
    row_S = jnp.where(inside_MS.reshape(-1), row_S, rows)
    slot_R = jnp.zeros(rows, jnp.int32).at[row_S].set(jnp.arange(len(row_S), dtype=jnp.int32), mode="drop")
    out_TkN = out_SN[slot_R].reshape(tokens, k, -1)
    here_Tk1 = (ids_Tk < num_experts)[..., None]
    return jnp.sum(jnp.where(here_Tk1, out_TkN * weights_Tk[..., None], 0), axis=1)[:, : x_TD.shape[1]]


def _grouped(
    expert_M: jax.Array,
    at_M: jax.Array,
    count_M: jax.Array,
    x_SK: jax.Array,
    weight: TpuExperts,
    bias_EN: jax.Array,
    tile_rows: int,
    out_dtype: Any,
    limit: float | None,
    interpret: Interpret,
    unpacking: Unpacking,
) -> jax.Array:
    """Multiply each tile of rows with its expert and add the bias; with a limit, apply the clamped SwiGLU."""
    lanes, blocks = _block_lanes(weight), _blocks(weight)
    halved = 1 if limit is None else 2
    contracting = 2 * weight.blocks.shape[1]

    def weight_block(j: jax.Array, m: jax.Array, expert: Any, *_: Any) -> tuple[Any, ...]:
        return expert[m], 0, j

    return pl.pallas_call(
        functools.partial(_grouped_kernel, weight=weight, limit=limit, unpacking=unpacking),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(blocks, len(expert_M)),
            in_specs=[
                pl.BlockSpec((tile_rows, x_SK.shape[1]), lambda j, m, expert, at, count: (at[m], 0)),
                *_weight_specs(weight, weight_block),
                pl.BlockSpec((1, 1, lanes), weight_block),
            ],
            out_specs=pl.BlockSpec((tile_rows, lanes // halved), lambda j, m, expert, at, count: (at[m], j)),
            scratch_shapes=[
                pltpu.VMEM((weight.scales.shape[1], lanes), jnp.float32),
                pltpu.VMEM((contracting, lanes), jnp.bfloat16),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((len(x_SK), blocks * lanes // halved), out_dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
        ),
        interpret=interpret,
        name="mxfp4_grouped_down" if limit is None else "mxfp4_grouped_gate_up",
    )(expert_M, at_M, count_M, x_SK, weight.blocks, weight.scales, bias_EN[:, None])


def _grouped_kernel(
    expert_ref: Any,
    at_ref: Any,
    count_ref: Any,
    x_ref: Any,
    blocks_ref: Any,
    scales_ref: Any,
    bias_ref: Any,
    out_ref: Any,
    factors_ref: Any,
    weight_ref: Any,
    *,
    weight: TpuExperts,
    limit: float | None,
    unpacking: Unpacking,
) -> None:
    del at_ref
    j, m = pl.program_id(0), pl.program_id(1)
    here = count_ref[m] > 0
    new = (m == 0) | (expert_ref[m] != expert_ref[jnp.maximum(m - 1, 0)])

    @pl.when(here & new)
    def _() -> None:
        factors_ref[...] = _factors(scales_ref[0], unpacking)

        def chunk(local: Any, lanes: Any, width: int) -> None:
            def some(at: Any, size: int, carry: None) -> None:
                values = _unpacked(blocks_ref, factors_ref, at, size, local, width, unpacking)
                weight_ref[pl.ds(at, size), pl.ds(local, width)] = values

            _for_steps(weight_ref.shape[0], some, None)

        _for_chunks(j, weight, chunk)

    @pl.when(here)
    def _() -> None:
        def chunk(local: Any, lanes: Any, width: int) -> None:
            x = x_ref[:, : weight_ref.shape[0]]
            result = _dot(x, weight_ref[:, pl.ds(local, width)]) + bias_ref[0, :, pl.ds(local, width)]
            if limit is None:
                out_ref[:, pl.ds(local, width)] = result.astype(out_ref.dtype)
            else:
                out_ref[:, pl.ds(_divided(local, 2, CHUNK), width // 2)] = _swiglu(result, limit).astype(
                    out_ref.dtype
                )

        _for_chunks(j, weight, chunk)


def _block_lanes(weight: TpuExperts) -> int:
    """Lanes of a block of the weights, a multiple of CHUNK."""
    return min(BLOCK_LANES[weight.parts], pl.cdiv(weight.blocks.shape[2], CHUNK) * CHUNK)


def _blocks(weight: TpuExperts) -> int:
    return pl.cdiv(weight.blocks.shape[2], _block_lanes(weight))


def _weight_specs(weight: TpuExperts, index_map: Callable[..., Any]) -> list[pl.BlockSpec]:
    lanes = _block_lanes(weight)
    return [pl.BlockSpec((1, x.shape[1], lanes), index_map) for x in (weight.blocks, weight.scales)]


def _for_chunks(block: Any, weight: TpuExperts, body: Callable[[Any, Any, int], None]) -> None:
    """Call `body(lane in the block, lane overall, width)` for each chunk of a block that contains weights."""
    lanes = _block_lanes(weight)
    chunks = pl.cdiv(jnp.minimum(weight.blocks.shape[2] - block * lanes, lanes), CHUNK)

    def chunk(i: jax.Array, carry: None) -> None:
        local = pl.multiple_of(i * CHUNK, CHUNK)
        body(local, pl.multiple_of(block * lanes + local, CHUNK), CHUNK)

    lax.fori_loop(0, chunks, chunk, None)


def _for_steps[Carry](length: int, body: Callable[[Any, int, Carry], Carry], carry: Carry) -> Carry:
    """Loop with `body(start, size, carry)` over the contracting dimension; the remainder is last."""
    whole = length // UNPACKED_AT_ONCE

    def step(i: jax.Array, carry: Carry) -> Carry:
        return body(pl.multiple_of(i * UNPACKED_AT_ONCE, UNPACKED_AT_ONCE), UNPACKED_AT_ONCE, carry)

    carry = lax.fori_loop(0, whole, step, carry) if whole else carry
    rest = length - whole * UNPACKED_AT_ONCE
    return body(whole * UNPACKED_AT_ONCE, rest, carry) if rest else carry


def _product(
    x_ref: Any, blocks_ref: Any, factors_ref: Any, lane: Any, width: int, unpacking: Unpacking
) -> jax.Array:
    """x times the weights in `width` lanes of the block, from `lane` on: float32 [rows, width]."""

    def some(at: Any, size: int, sums: jax.Array) -> jax.Array:
        weight = _unpacked(blocks_ref, factors_ref, at, size, lane, width, unpacking)
        return sums + _dot(x_ref[:, pl.ds(at, size)], weight)

    return _for_steps(2 * blocks_ref.shape[1], some, jnp.zeros((x_ref.shape[0], width), jnp.float32))


def _dot(x_RK: jax.Array, weight_KN: jax.Array) -> jax.Array:
    return jnp.dot(
        x_RK,
        weight_KN.astype(x_RK.dtype),
        precision=lax.Precision.HIGHEST if x_RK.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )


def _swiglu(gate_up_RN: jax.Array, limit: float) -> jax.Array:
    """Clamped SwiGLU of tiles with 64 lanes of gate, then 64 of up: float32, half as wide."""
    first = lax.broadcasted_iota(jnp.int32, (gate_up_RN.shape[0], LANES), 1) < RUN
    results = []
    for start in range(0, gate_up_RN.shape[1], 2 * LANES):
        a, b = (gate_up_RN[:, at : at + LANES] for at in (start, start + LANES))
        gate = jnp.where(first, a, pltpu.roll(b, RUN, 1))
        up = jnp.where(first, pltpu.roll(a, RUN, 1), b)
        gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
        results.append(gate / (1 + jnp.exp(-SWIGLU_ALPHA * gate)) * (up + 1))
    return jnp.concatenate(results, axis=1) if len(results) > 1 else results[0]


def _factors(scales: jax.Array, unpacking: Unpacking) -> jax.Array:
    """The factors of the unpacked nibbles: powers of two in float32, made from their bits."""
    bias = 0 if unpacking.float4 else BIAS
    return lax.bitcast_convert_type((scales.astype(jnp.int32) + bias) << 23, jnp.float32)


def _unpacked(
    blocks_ref: Any, factors_ref: Any, at: Any, size: int, lane: Any, width: int, unpacking: Unpacking
) -> jax.Array:
    """Weights from `at` on along the contracting dimension and from `lane` on: bfloat16 [size, width]."""
    bytes_at, groups_at = (_divided(at, by, UNPACKED_AT_ONCE) for by in (2, GROUP))
    packed = blocks_ref[0, pl.ds(bytes_at, size // 2), pl.ds(lane, width)]
    return _unpack(packed, factors_ref[pl.ds(groups_at, size // GROUP), pl.ds(lane, width)], unpacking)


def _divided(index: Any, by: int, multiple: int) -> Any:
    """index / by, with a hint to the compiler that the index is a multiple of `multiple`."""
    return index // by if isinstance(index, int) else pl.multiple_of(index // by, multiple // by)


def _unpack(packed: jax.Array, factors: jax.Array, unpacking: Unpacking) -> jax.Array:
    """The bfloat16 values [2 S, N] of bytes [S, N], times the factors [S / 16, N] of their groups."""
    if unpacking.float4:
        values = pltpu.bitcast(packed, jnp.float4_e2m1fn).astype(jnp.bfloat16)
        return values * _over_groups(factors.astype(jnp.bfloat16), GROUP)
    factor = _over_groups(factors, GROUP // 2)
    even, odd = (pltpu.bitcast(x, jnp.float8_e5m2).astype(jnp.float32) * factor for x in _as_float8(packed))
    pack = (
        _pack_by_bits
        if unpacking.by_bits
        else functools.partial(pltpu.pack_elementwise, packed_dtype=jnp.bfloat16)
    )
    return pltpu.bitcast(pack([even, odd]), jnp.bfloat16)


def _over_groups(factors: jax.Array, rows: int) -> jax.Array:
    """Repeat each row of factors for the `rows` rows of its group."""
    groups, lanes = factors.shape
    return jnp.concatenate([jnp.broadcast_to(factors[g : g + 1], (rows, lanes)) for g in range(groups)], axis=0)


def _as_float8(packed: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The low and the high nibbles of bytes [S, N], times 2^-BIAS, as the bits of float8_e5m2: uint32 [S / 4, N].

    All chips convert float8_e5m2 with one instruction. No subnormal numbers occur: the magnitudes become 0, 2^-14,
    2^-13, 1.5 x 2^-13 ... 1.5 x 2^-11, whose bits are twice 0, 2, 4, 5 ... 9. All eight nibbles of a word are computed
    at once: an addition carries into the top bit of a nibble whose magnitude is at least 1, and another one if it is
    at least 2, and each carry adds one to the magnitude.
    """
    word = pltpu.bitcast(packed, jnp.uint32)
    bits = jnp.uint32
    magnitude = word & bits(0x77777777)
    at_least_1 = ((magnitude + bits(0x77777777)) >> bits(3)) & bits(0x11111111)
    at_least_2 = ((magnitude + bits(0x66666666)) >> bits(3)) & bits(0x11111111)
    code = magnitude + at_least_1 + at_least_2
    low = ((code & bits(0x0F0F0F0F)) << bits(1)) | ((word & bits(0x08080808)) << bits(4))
    high = ((code >> bits(3)) & bits(0x1E1E1E1E)) | (word & bits(0x80808080))
    return low, high


def _pack_by_bits(pair: list[jax.Array]) -> jax.Array:
    """Equivalent to `pltpu.pack_elementwise` for numbers that bfloat16 represents exactly."""
    low, high = (lax.bitcast_convert_type(x, jnp.uint32) for x in pair)
    return (low >> jnp.uint32(16)) | (high & jnp.uint32(0xFFFF0000))
