"""The attention ops on TPUs, as a Pallas kernel lowered through Mosaic.

One kernel serves decode and prefill, contiguous and paged keys; contiguous keys are treated as pages of one block. A
program takes a block of queries of one sequence and loops over the blocks of keys that any of them attends to, with an
online softmax whose initial state is the sink (arXiv:2205.14135, algorithm 1, with the sink as the first score). The
kernel prefetches keys by its own DMAs one block ahead, across program boundaries too, so that short sequences follow
each other without a stall.

A row of the cache holds the key and the value of a head, which fill 128 lanes at head_dim 64. They are not separated:
queries have zeros in the value half, and the result is the second half of the weighted sum of rows.

Shapes are named by suffix as in the op; Q is the blocks of queries, R the rows of a block (a query and one of the G
heads that share a key/value head), and N the keys of a block.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.tpu import LANES, VMEM_LIMIT, Chip, Interpret

ROWS = 256
"""Maximum rows of a block of queries."""

KEYS = 512
"""Keys per block; a block is one page if pages are larger."""

MAX_TABLE_ENTRIES = 1 << 17
"""Maximum entries of all page tables together, which stay in the 1 MiB of SMEM for the whole call."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Queries and keys per block."""

    queries: int
    keys: int


def attention(
    q_BTHD: jax.Array,
    kv_BSKE: jax.Array,
    sinks_H: jax.Array,
    q_positions_BT: jax.Array,
    kv_positions_BS: jax.Array,
    *,
    window: int | None,
    sm_scale: float,
    interpret: Interpret,
    config: Config | None = None,
    chip: Chip | None = None,
) -> jax.Array:
    """See `pallas_kernels.attention.attention`."""
    batch, keys, kv_heads, width = kv_BSKE.shape
    _check(q_BTHD, kv_BSKE, interpret)
    if config is None:
        most = KEYS if window is None else max(LANES, pl.next_power_of_2(window))
        whole = [size for size in (KEYS, KEYS // 2) if keys % size == 0 and size <= most]
        config = Config(_queries(q_BTHD, kv_heads), whole[0] if whole else LANES)
    padding = -keys % config.keys
    kv_BSKE = jnp.pad(kv_BSKE, ((0, 0), (0, padding), (0, 0), (0, 0)))
    blocks = (keys + padding) // config.keys
    positions_BSN = jnp.pad(kv_positions_BS, ((0, 0), (0, padding)), constant_values=-1)
    positions_BSN = positions_BSN.reshape(batch, blocks, config.keys)
    queries = _blocks_of_queries(q_positions_BT, config.queries)
    return _call(
        q_BTHD,
        kv_BSKE.reshape(batch * blocks, config.keys, kv_heads, width),
        jnp.arange(batch * blocks, dtype=jnp.int32).reshape(batch, blocks),
        sinks_H,
        queries,
        positions_BSN,
        _visible(queries, positions_BSN, window),
        window,
        sm_scale,
        config,
        chip or Chip.current(),
        interpret,
    )


def ragged_paged_attention(
    q_BTHD: jax.Array,
    kv_pages_PSKE: jax.Array,
    page_table_BM: jax.Array,
    sinks_H: jax.Array,
    q_positions_BT: jax.Array,
    *,
    sm_scale: float,
    interpret: Interpret,
    config: Config | None = None,
    chip: Chip | None = None,
) -> jax.Array:
    """See `pallas_kernels.attention.paged_attention`."""
    _check(q_BTHD, kv_pages_PSKE, interpret)
    if page_table_BM.size > MAX_TABLE_ENTRIES:
        raise NotImplementedError(f"page tables of more than {MAX_TABLE_ENTRIES} entries: {page_table_BM.size}")
    page_size, kv_heads = kv_pages_PSKE.shape[1:3]
    pages = min(page_table_BM.shape[1], max(1, KEYS // page_size))
    config = config or Config(_queries(q_BTHD, kv_heads), pages * page_size)
    queries = _blocks_of_queries(q_positions_BT, config.queries)
    last_BQ = jnp.max(queries, axis=-1)
    visible = (jnp.zeros_like(last_BQ), last_BQ // config.keys + 1, last_BQ // page_size + 1)
    return _call(
        q_BTHD,
        kv_pages_PSKE,
        page_table_BM,
        sinks_H,
        queries,
        None,
        visible,
        None,
        sm_scale,
        config,
        chip or Chip.current(),
        interpret,
    )


def _check(q_BTHD: jax.Array, kv: jax.Array, interpret: Interpret) -> None:
    if q_BTHD.dtype not in (jnp.bfloat16, jnp.float32):
        raise NotImplementedError(f"queries of {q_BTHD.dtype}")
    if kv.dtype not in (jnp.bfloat16, jnp.float32):
        raise NotImplementedError(f"keys of {kv.dtype}")
    if interpret:
        return
    if kv.shape[3] % LANES:
        raise NotImplementedError(f"key and value have {kv.shape[3]} lanes, not a multiple of {LANES}")
    if kv.dtype == jnp.bfloat16 and kv.shape[2] > 1 and kv.shape[2] % 2:
        raise NotImplementedError(f"{kv.shape[2]} bfloat16 key/value heads: expected 1 or an even number")


def _queries(q_BTHD: jax.Array, kv_heads: int) -> int:
    return max(1, min(q_BTHD.shape[1], ROWS * kv_heads // q_BTHD.shape[2]))


def _blocks_of_queries(q_positions_BT: jax.Array, queries: int) -> jax.Array:
    """The queries' positions by block: int32 [B, Q, queries]."""
    batch, length = q_positions_BT.shape
    padded = jnp.pad(q_positions_BT, ((0, 0), (0, -length % queries)), constant_values=-1)
    return padded.reshape(batch, -1, queries)


def _visible(
    queries_BQT: jax.Array, positions_BSN: jax.Array, window: int | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """For each block of queries: the first and past-the-last visible block of keys, and the latter in pages."""
    highest = jnp.iinfo(jnp.int32).max

    def extent(positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jnp.min(jnp.where(positions < 0, highest, positions), axis=-1), jnp.max(positions, axis=-1)

    q_first, q_last = (x[:, :, None] for x in extent(queries_BQT))
    k_first, k_last = (x[:, None, :] for x in extent(positions_BSN))
    seen_BQS = (k_last >= 0) & (k_first <= q_last)
    if window is not None:
        seen_BQS &= k_last > q_first - window
    block = jnp.arange(seen_BQS.shape[-1], dtype=jnp.int32)
    last = jnp.max(jnp.where(seen_BQS, block + 1, 0), axis=-1)
    first = jnp.minimum(jnp.min(jnp.where(seen_BQS, block, highest), axis=-1), last)
    return first, last, last


def _call(
    q_BTHD: jax.Array,
    kv_PSKE: jax.Array,
    table_BM: jax.Array,
    sinks_H: jax.Array,
    queries_BQT: jax.Array,
    positions_BSN: jax.Array | None,
    visible: tuple[jax.Array, jax.Array, jax.Array],
    window: int | None,
    sm_scale: float,
    config: Config,
    chip: Chip,
    interpret: Interpret,
) -> jax.Array:
    batch, length, heads, head_dim = q_BTHD.shape
    kv_heads, width = kv_PSKE.shape[2:]
    group, blocks = heads // kv_heads, queries_BQT.shape[1]
    rows = config.queries * group

    programs = batch * blocks
    cores = chip.cores if programs % chip.cores == 0 else 1

    def block(*shape: int) -> pl.BlockSpec:
        return pl.BlockSpec((1, *shape), lambda core, i, *_: (core * (programs // cores) + i, *(0,) * len(shape)))

    padding = blocks * config.queries - length
    q = jnp.pad(q_BTHD, ((0, 0), (0, padding), (0, 0), (0, width - head_dim)))
    q = q.reshape(batch, blocks, config.queries, kv_heads, group, width).swapaxes(2, 3)
    sinks_K1R = jnp.tile(sinks_H.astype(jnp.float32).reshape(kv_heads, 1, group), (1, 1, config.queries))
    arrays = [
        q.reshape(programs, kv_heads, rows, width),
        jnp.repeat(queries_BQT, group, axis=2).reshape(programs, 1, rows),
        sinks_K1R * math.log2(math.e),
        kv_PSKE.reshape(len(kv_PSKE), -1, width),
    ]
    in_specs = [
        block(kv_heads, rows, width),
        block(1, rows),
        pl.BlockSpec(sinks_K1R.shape, lambda *_: (0, 0, 0)),
        pl.BlockSpec(memory_space=pl.ANY),
    ]
    if positions_BSN is not None:
        arrays.append(positions_BSN[:, :, None])
        in_specs.append(
            pl.BlockSpec(
                (1, positions_BSN.shape[1], 1, config.keys),
                lambda core, i, *_: ((core * (programs // cores) + i) // blocks, 0, 0, 0),
            )
        )
    kernel = functools.partial(
        _kernel,
        table_width=table_BM.shape[1],
        blocks_of_queries=blocks,
        head_dim=head_dim,
        window=window,
        scale=sm_scale * math.log2(math.e),
        has_positions=positions_BSN is not None,
        # The TPU interpreter does not support bitcast views.
        by_words=not isinstance(interpret, pltpu.InterpretParams) and kv_heads % 2 == 0,
    )
    out = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(cores, programs // cores),
            in_specs=in_specs,
            out_specs=block(kv_heads, rows, head_dim),
            scratch_shapes=[
                pltpu.VMEM((2, config.keys * kv_heads, width), kv_PSKE.dtype),
                pltpu.VMEM((kv_heads, rows, LANES), jnp.float32),
                pltpu.VMEM((kv_heads, rows, LANES), jnp.float32),
                pltpu.VMEM((kv_heads, rows, width), jnp.float32),
                pltpu.SMEM((2,), jnp.int32),
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((programs, kv_heads, rows, head_dim), q_BTHD.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
        ),
        interpret=interpret,
        name="attention",
    )(table_BM.reshape(-1), *(x.reshape(-1) for x in visible), *arrays)
    out = out.reshape(batch, blocks, kv_heads, config.queries, group, head_dim).swapaxes(2, 3)
    return out.reshape(batch, blocks * config.queries, heads, head_dim)[:, :length]


def _kernel(
    table_ref: Any,
    first_ref: Any,
    last_ref: Any,
    pages_ref: Any,
    q_ref: Any,
    q_positions_ref: Any,
    sinks_ref: Any,
    kv_ref: Any,
    *refs: Any,
    table_width: int,
    blocks_of_queries: int,
    head_dim: int,
    window: int | None,
    scale: float,
    has_positions: bool,
    by_words: bool,
) -> None:
    positions_ref = refs[0] if has_positions else None
    out_ref, buffer_ref, largest_ref, denominator_ref, sum_ref, next_ref, semaphores = refs[has_positions:]
    kv_heads = q_ref.shape[1]
    program = pl.program_id(0) * pl.num_programs(1) + pl.program_id(1)
    last_of_core = (pl.program_id(0) + 1) * pl.num_programs(1) - 1
    first, last = first_ref[program], last_ref[program]
    copies = functools.partial(
        _copies, table_ref, pages_ref, kv_ref, buffer_ref, semaphores, table_width, blocks_of_queries
    )

    @pl.when(pl.program_id(1) == 0)
    def _() -> None:
        # The buffer of the next block, and the program for which its copies were started.
        next_ref[0], next_ref[1] = 0, -1
        # Masked keys have weight 0, but 0 times an uninitialised NaN would be NaN.
        buffer_ref[...] = jnp.zeros_like(buffer_ref)

    largest_ref[...] = jnp.broadcast_to(
        jnp.stack([_column(sinks_ref[k]) for k in range(kv_heads)]), largest_ref.shape
    )
    denominator_ref[...] = jnp.ones_like(denominator_ref)
    sum_ref[...] = jnp.zeros_like(sum_ref)
    position_R1 = _column(q_positions_ref[0].astype(jnp.float32)).astype(jnp.int32)

    @pl.when((first < last) & (next_ref[1] != program))
    def _() -> None:
        copies(program, first, next_ref[0], lambda copy: copy.start())

    def step(block: jax.Array, slot: jax.Array) -> jax.Array:
        after = jnp.where(block + 1 < last, program, jnp.minimum(program + 1, last_of_core))
        following = jnp.where(block + 1 < last, block + 1, first_ref[after])

        @pl.when((block + 1 < last) | ((after > program) & (first_ref[after] < last_ref[after])))
        def _() -> None:
            next_ref[1] = after
            copies(after, following, 1 - slot, lambda copy: copy.start())

        copies(program, block, slot, lambda copy: copy.wait())
        keys = buffer_ref.shape[1] // kv_heads
        if positions_ref is not None:
            position_1N = positions_ref[0, block]
        else:
            position_1N = block * keys + lax.broadcasted_iota(jnp.int32, (1, keys), 1)
        seen_RN = (position_1N >= 0) & (position_1N <= position_R1)
        if window is not None:
            seen_RN &= position_1N > position_R1 - window
        for k in range(kv_heads):
            rows_NE = _rows_of_head(buffer_ref, slot, k, kv_heads, by_words).astype(q_ref.dtype)
            state = (largest_ref.at[k], denominator_ref.at[k], sum_ref.at[k])
            _attend(q_ref[0, k], rows_NE, seen_RN, scale, *state)
        return 1 - slot

    next_ref[0] = lax.fori_loop(first, last, step, next_ref[0])
    for k in range(kv_heads):
        result_RD = sum_ref[k, :, head_dim:] * (1 / denominator_ref[k, :, :1])
        out_ref[0, k] = result_RD.astype(out_ref.dtype)


def _copies(
    table_ref: Any,
    pages_ref: Any,
    kv_ref: Any,
    buffer_ref: Any,
    semaphores: Any,
    table_width: int,
    blocks_of_queries: int,
    program: Any,
    block: Any,
    slot: Any,
    act: Callable[[Any], None],
) -> None:
    """Call `act` (start or wait) with the DMA of each page of a block that its program attends to."""
    page_rows = kv_ref.shape[1]
    pages = buffer_ref.shape[1] // page_rows
    sequence = program // blocks_of_queries

    def one(index: jax.Array, carry: None) -> None:
        page = table_ref[sequence * table_width + block * pages + index]
        there = buffer_ref.at[slot, pl.ds(index * page_rows, page_rows)]
        act(pltpu.make_async_copy(kv_ref.at[page], there, semaphores.at[slot]))

    lax.fori_loop(0, jnp.minimum(pages, pages_ref[program] - block * pages), one, None)


def _rows_of_head(buffer_ref: Any, slot: Any, head: int, heads: int, by_words: bool) -> jax.Array:
    """Keys and values of one head: [N, E]."""
    keys = buffer_ref.shape[1] // heads
    if heads == 1:
        return buffer_ref[slot]
    if buffer_ref.dtype == jnp.float32 or not by_words:
        return buffer_ref[slot, pl.ds(head, keys, stride=heads)]
    # Strided reads are only supported for 32-bit words, and a word holds two heads.
    words = buffer_ref.bitcast(jnp.uint32)[slot, pl.ds(head // 2, keys, stride=heads // 2)]
    bits = words << jnp.uint32(16) if head % 2 == 0 else words & jnp.uint32(0xFFFF0000)
    return lax.bitcast_convert_type(bits, jnp.float32)


def _attend(
    q_RE: jax.Array,
    rows_NE: jax.Array,
    seen_RN: jax.Array,
    scale: float,
    largest_ref: Any,
    denominator_ref: Any,
    sum_ref: Any,
) -> None:
    """One step of the online softmax; the denominator and weighted sum are relative to the largest score."""
    precision = lax.Precision.HIGHEST if q_RE.dtype == jnp.float32 else None
    dot = functools.partial(lax.dot_general, precision=precision, preferred_element_type=jnp.float32)
    scores_RN = jnp.where(seen_RN, dot(q_RE, rows_NE, (((1,), (1,)), ((), ()))) * scale, -jnp.inf)
    largest_R1 = largest_ref[:, :1]
    new_R1 = jnp.maximum(largest_R1, jnp.max(scores_RN, axis=1, keepdims=True))
    weights_RN = jnp.exp2(scores_RN - new_R1)
    shrink_R1 = jnp.exp2(largest_R1 - new_R1)
    total_R1 = denominator_ref[:, :1] * shrink_R1 + jnp.sum(weights_RN, axis=1, keepdims=True)
    largest_ref[...] = jnp.broadcast_to(new_R1, largest_ref.shape)
    denominator_ref[...] = jnp.broadcast_to(total_R1, denominator_ref.shape)
    added_RE = dot(weights_RN.astype(q_RE.dtype), rows_NE, (((1,), (0,)), ((), ())))
    sum_ref[...] = sum_ref[...] * shrink_R1 + added_RE


def _column(row_1R: jax.Array) -> jax.Array:
    """Transpose a float32 row [1, R] to a column [R, 1]."""
    size = row_1R.shape[1]
    index = functools.partial(lax.broadcasted_iota, jnp.int32, (size, size))
    return jnp.sum(jnp.where(index(0) == index(1), row_1R, 0.0), axis=1, keepdims=True)
