"""The expert op on NVIDIA GPUs for one or two tokens: matrix-vector products bound by memory bandwidth.

A program of one warp multiplies a few whole rows, so that all of its loads are independent and in flight at once, and
reads the id of its expert itself. Values are unpacked two at a time to bfloat16, which represents them exactly, and
multiplied and summed in float32.

Shapes are named by suffix: T tokens, k experts of a token, R = T k rows, D hidden, I intermediate. A tile is
[blocks, 32 words].
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

MAX_ROWS = 8
"""Above this, tokens share experts often enough that the `triton` backend reads less."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Weight rows and warps per program."""

    rows: int
    num_warps: int


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
    configs: tuple[Config, Config] = (Config(1, 1), Config(1, 1)),
) -> jax.Array:
    """See `pallas_kernels.mxfp4_matmul.expert_mlp`; experts in the layout of `gpu_layout.prepare`."""
    if not isinstance(gate_up_EFD, GpuExperts) or not isinstance(down_EDI, GpuExperts):
        raise NotImplementedError("the experts are not in the GPU layout: see gpu_layout.prepare")
    if x_TD.dtype != jnp.bfloat16:
        raise NotImplementedError(f"tokens of {x_TD.dtype}")
    tokens, k = expert_ids_Tk.shape
    if tokens * k > MAX_ROWS:
        raise NotImplementedError(f"{tokens * k} rows are more than {MAX_ROWS}")
    inner, hidden = gate_up_EFD.words.shape[3], down_EDI.words.shape[3]
    call = functools.partial(pl.pallas_call, interpret=interpret)
    products = _products if interpret else _products_ptx
    up, down = configs
    hidden_RI = call(
        functools.partial(_gate_up_kernel, k=k, rows=up.rows, limit=swiglu_limit, products=products),
        grid=(pl.cdiv(inner, up.rows), tokens * k),
        out_shape=jax.ShapeDtypeStruct((tokens * k, inner), x_TD.dtype),
        compiler_params=plt.CompilerParams(num_warps=up.num_warps, num_stages=1),
        name="mxfp4_gate_up_vector",
    )(expert_ids_Tk, x_TD, *_flat(gate_up_EFD), gate_up_bias_EF)
    residual = [] if residual_TD is None else [residual_TD]
    return call(
        functools.partial(_down_kernel, k=k, rows=down.rows, products=products),
        grid=(pl.cdiv(hidden, down.rows), tokens),
        out_shape=jax.ShapeDtypeStruct(x_TD.shape, out_dtype or x_TD.dtype),
        compiler_params=plt.CompilerParams(num_warps=down.num_warps, num_stages=1),
        name="mxfp4_down_vector",
    )(expert_ids_Tk, expert_weights_Tk.astype(jnp.float32), hidden_RI, *_flat(down_EDI), down_bias_ED, *residual)


def _flat(experts: GpuExperts) -> tuple[jax.Array, jax.Array]:
    """Words and scales with parts and blocks merged into one dimension."""
    count, _, _, rows, _ = experts.words.shape
    scales = lax.bitcast_convert_type(experts.scales, jnp.int32)
    return experts.words.reshape(count, -1, rows, WORDS), scales.reshape(count, -1, rows)


def _gate_up_kernel(
    ids_ref: Any,
    x_ref: Any,
    words_ref: Any,
    scales_ref: Any,
    bias_ref: Any,
    out_ref: Any,
    *,
    k: int,
    rows: int,
    limit: float,
    products: Any,
) -> None:
    first, slot = pl.program_id(0) * rows, pl.program_id(1)
    expert = ids_ref[slot // k, slot % k]
    blocks = words_ref.shape[1] // 2

    @pl.when(expert < words_ref.shape[0])
    def _() -> None:
        tiles = _x_tiles(x_ref, slot // k, blocks)
        for i in range(rows):
            row = first + i

            def compute(row: jax.Array = row) -> None:
                gate = _row(tiles, words_ref, scales_ref, expert, 0, row, products)
                up = _row(tiles, words_ref, scales_ref, expert, blocks, row, products)
                gate = jnp.minimum(gate + bias_ref[expert, 2 * row].astype(jnp.float32), limit)
                up = jnp.clip(up + bias_ref[expert, 2 * row + 1].astype(jnp.float32), -limit, limit)
                value = gate / (1 + jnp.exp(-SWIGLU_ALPHA * gate)) * (up + 1)
                out_ref[slot, row] = value.astype(out_ref.dtype)

            _where_exists(row, out_ref.shape[1], rows, compute)


def _down_kernel(
    ids_ref: Any,
    weights_ref: Any,
    x_ref: Any,
    words_ref: Any,
    scales_ref: Any,
    bias_ref: Any,
    *rest: Any,
    k: int,
    rows: int,
    products: Any,
) -> None:
    residual_ref, out_ref = rest if len(rest) == 2 else (None, *rest)
    token = pl.program_id(1)
    blocks = words_ref.shape[1]
    own = [pl.program_id(0) * rows + i for i in range(rows)]

    def choice(c: jax.Array, totals: list[jax.Array]) -> list[jax.Array]:
        expert = ids_ref[token, c]

        def here() -> list[jax.Array]:
            tiles = _x_tiles(x_ref, token * k + c, blocks)
            weight = weights_ref[token, c]
            added = []
            for row, total in zip(own, totals, strict=True):
                row = jnp.minimum(row, out_ref.shape[1] - 1)
                product = _row(tiles, words_ref, scales_ref, expert, 0, row, products)
                added.append(total + weight * (product + bias_ref[expert, row].astype(jnp.float32)))
            return added

        return lax.cond(expert < words_ref.shape[0], here, lambda: totals)

    totals = lax.fori_loop(0, k, choice, [jnp.float32(0)] * rows)
    for row, total in zip(own, totals, strict=True):

        def store(row: jax.Array = row, total: jax.Array = total) -> None:
            if residual_ref is not None:
                total += residual_ref[token, row].astype(jnp.float32)
            out_ref[token, row] = total.astype(out_ref.dtype)

        _where_exists(row, out_ref.shape[1], rows, store)


def _where_exists(row: jax.Array, outputs: int, rows: int, body: Any) -> None:
    """Run the body if the row exists."""
    if outputs % rows:
        pl.when(row < outputs)(body)
    else:
        body()


def _x_tiles(x_ref: Any, row: jax.Array, blocks: int) -> list[tuple[jax.Array, list[jax.Array]]]:
    """Row `row` of x in the order of the packed words: block indices, and [blocks, 32] for each of the four groups."""
    tiles = []
    start = 0
    while start < blocks:
        # Largest tiles first; the last one is padded by less than half.
        left = blocks - start
        size = min(16, 1 << (left.bit_length() - 1 if left & (left + 1) else left.bit_length()))
        block = start + jnp.arange(size)
        xs = []
        for j in range(BLOCK // WORDS):
            at = block[:, None] * BLOCK + j * WORDS + jnp.arange(WORDS)[None, :]
            xs.append(plt.load(x_ref.at[row, at], mask=at < x_ref.shape[1], other=0.0))
        tiles.append((block, xs))
        start += size
    return tiles


def _row(
    tiles: list[tuple[jax.Array, list[jax.Array]]],
    words_ref: Any,
    scales_ref: Any,
    expert: jax.Array,
    first_block: int,
    row: jax.Array,
    products: Any,
) -> jax.Array:
    """Dot product of one row of an expert with x: a float32 scalar."""
    blocks = words_ref.shape[1] if first_block == 0 else first_block
    total = jnp.float32(0)
    for block, xs in tiles:
        # Padding blocks read the last block again; their x is zero.
        block = first_block + jnp.minimum(block, blocks - 1)
        words = plt.load(words_ref.at[expert, block[:, None], row, jnp.arange(WORDS)[None, :]])
        scales = plt.load(scales_ref.at[expert, block[:, None], row])
        total += jnp.sum(products(words, scales, xs))
    return total


def _products(words: jax.Array, scales: jax.Array, xs: list[jax.Array]) -> jax.Array:
    """For each word [B, 32], the sum over its four nibbles of value times x: float32 [B, 32]."""
    return sum(unpack(words, (scales >> (8 * j)) & 255, j) * x.astype(jnp.float32) for j, x in enumerate(xs))  # type: ignore[return-value]


def _products_ptx(words: jax.Array, scales: jax.Array, xs: list[jax.Array]) -> jax.Array:
    """`_products` in PTX, two words at a time; see `gpu_layout.unpack` for the bit operations."""
    factors = [jnp.broadcast_to(group_factor((scales >> (8 * j)) & 255), words.shape) for j in range(len(xs))]
    body = ["mov.b32 $0, 0; mov.b32 $1, 0; mov.b32 z, 0x80008000;"]
    for j, shift in enumerate(
        ("shl.b32 a, $2, 6;", "shl.b32 a, $2, 2;", "shr.u32 a, $2, 2;", "shr.u32 a, $2, 6;")
    ):
        body.append(
            f"{shift} shl.b32 b, $2, {12 - 4 * j}; and.b32 b, b, 0x80008000;"
            f"lop3.b32 a, a, 0x01C001C0, b, 0xEA; fma.rn.bf16x2 a, a, ${7 + j}, z;"
            f"shl.b32 b, a, 16; shl.b32 c, ${3 + j}, 16; fma.rn.f32 $0, b, c, $0;"
            f"and.b32 b, a, 0xFFFF0000; and.b32 c, ${3 + j}, 0xFFFF0000; fma.rn.f32 $1, b, c, $1;"
        )
    [sums] = plt.elementwise_inline_asm(
        "{ .reg .b32 a, b, c, z;" + "".join(body) + "}",
        args=[words, *xs, *factors],
        constraints="=&f,=&f" + ",r" * 9,
        pack=2,
        result_shape_dtypes=[jax.ShapeDtypeStruct(words.shape, jnp.float32)],
    )
    return sums
