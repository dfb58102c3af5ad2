"""The attention ops on NVIDIA GPUs, as a Pallas kernel lowered through Triton.

One kernel serves decode and prefill, contiguous and paged keys. A program computes the G query heads that share a
key/value head, for a block of queries, and loops over blocks of keys with an online softmax whose initial state is
the sink (arXiv:2205.14135, algorithm 1, with the sink as the first score). If there are too few programs to fill the
GPU, the keys are split among several programs, and a second kernel combines their partial results.

Shapes are named by suffix as in the op; R is the rows of a block (queries times G, padded to powers of two), and N
the keys of a block.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jax.typing import DTypeLike

from pallas_kernels import gpu

State = tuple[jax.Array, jax.Array, jax.Array]
"""For each row: the largest score so far, and the softmax's denominator and weighted sum relative to it."""

LOWEST = -1e30
"""A finite score below all others, so that differences stay finite."""

PROGRAMS = 264
"""Number of programs to aim for: two per multiprocessor of a GPU with 132."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Queries and keys per block, number of splits of the keys, and Triton's warps and pipeline stages."""

    queries: int
    keys: int
    splits: int
    num_warps: int
    num_stages: int


def choose(batch: int, length: int, kv_heads: int, group: int, keys: int, dtype: DTypeLike) -> Config:
    """The config for these dimensions and this dtype of the queries."""
    if length == 1:
        block = min(128, max(16, pl.next_power_of_2(keys)))
        wanted = pl.cdiv(PROGRAMS, batch * kv_heads)
        return Config(1, block, max(1, min(pl.cdiv(keys, block), wanted)), 4, 2)
    queries = max(1, min(128 // group, pl.next_power_of_2(length)))
    # Three stages of float32 keys and values exceed the shared memory of Ada GPUs.
    stages = 2 if jnp.dtype(dtype) == jnp.float32 else 3
    return Config(queries, min(64, max(16, pl.next_power_of_2(keys))), 1, 4, stages)


def attention(
    q_BTHD: jax.Array,
    kv_BSKE: jax.Array,
    sinks_H: jax.Array,
    q_positions_BT: jax.Array,
    kv_positions_BS: jax.Array,
    *,
    window: int | None,
    sm_scale: float,
    interpret: bool,
    config: Config | None = None,
) -> jax.Array:
    """See `pallas_kernels.attention.attention`."""
    _check(q_BTHD, kv_BSKE, interpret)
    batch, length, heads, _ = q_BTHD.shape
    keys, kv_heads = kv_BSKE.shape[1:3]
    config = config or choose(batch, length, kv_heads, _padded_group(heads, kv_heads), keys, q_BTHD.dtype)
    bounds = None
    if length > 1:
        bounds = _visible_blocks(q_positions_BT, kv_positions_BS, window, config)
    return _call(
        q_BTHD,
        kv_BSKE,
        sinks_H,
        q_positions_BT,
        kv_positions_BS,
        None,
        bounds,
        window,
        sm_scale,
        config,
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
    interpret: bool,
    config: Config | None = None,
) -> jax.Array:
    """See `pallas_kernels.attention.paged_attention`."""
    _check(q_BTHD, kv_pages_PSKE, interpret)
    batch, length, heads, _ = q_BTHD.shape
    page_size, kv_heads = kv_pages_PSKE.shape[1:3]
    keys = page_table_BM.shape[1] * page_size
    config = config or choose(batch, length, kv_heads, _padded_group(heads, kv_heads), keys, q_BTHD.dtype)
    return _call(
        q_BTHD,
        kv_pages_PSKE,
        sinks_H,
        q_positions_BT,
        None,
        page_table_BM,
        None,
        None,
        sm_scale,
        config,
        interpret,
    )


def _check(q_BTHD: jax.Array, kv_XSKE: jax.Array, interpret: bool) -> None:
    head_dim = q_BTHD.shape[-1]
    if head_dim < 16 or head_dim & (head_dim - 1):
        raise NotImplementedError(f"head_dim {head_dim} is not a power of two of at least 16")
    if q_BTHD.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        raise NotImplementedError(f"queries of {q_BTHD.dtype}")
    if not interpret:
        gpu.check_converts(kv_XSKE.dtype)


def _padded_group(heads: int, kv_heads: int) -> int:
    return pl.next_power_of_2(heads // kv_heads)


def _visible_blocks(
    q_positions_BT: jax.Array, kv_positions_BS: jax.Array, window: int | None, config: Config
) -> jax.Array:
    """For each block of queries the range of blocks of keys that it may attend to: int32 [B, query blocks, 2]."""
    batch = q_positions_BT.shape[0]
    highest = jnp.iinfo(jnp.int32).max

    def blocks(positions: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
        padded = jnp.pad(positions, ((0, 0), (0, -positions.shape[1] % size)), constant_values=-1)
        padded = padded.reshape(batch, -1, size)
        return jnp.min(jnp.where(padded < 0, highest, padded), axis=-1), jnp.max(padded, axis=-1)

    q_first, q_last = (x[:, :, None] for x in blocks(q_positions_BT, config.queries))
    k_first, k_last = (x[:, None, :] for x in blocks(kv_positions_BS, config.keys))
    visible = (k_last >= 0) & (k_first <= q_last)
    if window is not None:
        visible &= k_last > q_first - window
    block = jnp.arange(visible.shape[-1], dtype=jnp.int32)
    first = jnp.min(jnp.where(visible, block, highest), axis=-1)
    last = jnp.max(jnp.where(visible, block + 1, 0), axis=-1)
    return jnp.stack([jnp.minimum(first, last), last], axis=-1)


def _call(
    q_BTHD: jax.Array,
    kv_XSKE: jax.Array,
    sinks_H: jax.Array,
    q_positions_BT: jax.Array,
    kv_positions_BS: jax.Array | None,
    page_table_BM: jax.Array | None,
    bounds_BQ2: jax.Array | None,
    window: int | None,
    sm_scale: float,
    config: Config,
    interpret: bool,
) -> jax.Array:
    batch, length, heads, _ = q_BTHD.shape
    kv_heads = kv_XSKE.shape[2]
    splits = config.splits
    kernel = functools.partial(
        _kernel,
        group=heads // kv_heads,
        window=window,
        scale=sm_scale * math.log2(math.e),
        config=config,
        has_positions=kv_positions_BS is not None,
        has_bounds=bounds_BQ2 is not None,
    )
    if splits == 1:
        out_shape = [jax.ShapeDtypeStruct((1, *q_BTHD.shape), q_BTHD.dtype)]
    else:
        out_shape = [
            jax.ShapeDtypeStruct((splits, *q_BTHD.shape), jnp.float32),
            jax.ShapeDtypeStruct((splits, *q_BTHD.shape[:3]), jnp.float32),
            jax.ShapeDtypeStruct((splits, *q_BTHD.shape[:3]), jnp.float32),
        ]
    # Contiguous and paged calls share one kernel signature; missing operands are dummies.
    where = kv_positions_BS if kv_positions_BS is not None else page_table_BM
    bounds = bounds_BQ2 if bounds_BQ2 is not None else jnp.zeros((1, 1, 1), jnp.int32)
    outs = pl.pallas_call(
        kernel,
        grid=(batch * kv_heads, pl.cdiv(length, config.queries), splits),
        out_shape=out_shape,
        compiler_params=plt.CompilerParams(num_warps=config.num_warps, num_stages=config.num_stages),
        interpret=interpret,
        name="attention",
    )(q_BTHD, kv_XSKE, sinks_H, q_positions_BT, where, bounds)
    if splits == 1:
        return outs[0][0]
    sums, largest, denominators = outs
    return _combine(sums, largest, denominators, q_BTHD.dtype, interpret)


def _combine(
    sums: jax.Array, largest: jax.Array, denominators: jax.Array, out_dtype: Any, interpret: bool
) -> jax.Array:
    """Combine partial softmax sums [splits, B, T, H, D], each relative to its own largest score in base 2."""
    splits, *shape, head_dim = sums.shape
    rows = math.prod(shape)
    combined = pl.pallas_call(
        _combine_kernel,
        grid=(rows,),
        out_shape=jax.ShapeDtypeStruct((rows, head_dim), out_dtype),
        compiler_params=plt.CompilerParams(num_warps=1 if splits <= 16 else 4, num_stages=1),
        interpret=interpret,
        name="attention_combine",
    )(sums.reshape(splits, rows, head_dim), largest.reshape(splits, rows), denominators.reshape(splits, rows))
    return combined.reshape(*shape, head_dim)


def _combine_kernel(sums_ref: Any, largest_ref: Any, denominators_ref: Any, out_ref: Any) -> None:
    row = pl.program_id(0)
    splits, _, head_dim = sums_ref.shape
    part = jnp.arange(pl.next_power_of_2(splits))
    here, column = part < splits, jnp.arange(head_dim)
    largest = plt.load(largest_ref.at[part, row], mask=here, other=LOWEST)
    factor = jnp.where(here, jnp.exp2(largest - jnp.max(largest)), 0.0)
    total = jnp.sum(factor * plt.load(denominators_ref.at[part, row], mask=here, other=0.0))
    mask = jnp.broadcast_to(here[:, None], (part.shape[0], head_dim))
    sums = plt.load(sums_ref.at[part[:, None], row, column[None, :]], mask=mask, other=0.0)
    out_ref[row, :] = (jnp.sum(factor[:, None] * sums, axis=0) / total).astype(out_ref.dtype)


def _kernel(
    q_ref: Any,
    kv_ref: Any,
    sinks_ref: Any,
    q_positions_ref: Any,
    where_ref: Any,
    bounds_ref: Any,
    *out_refs: Any,
    group: int,
    window: int | None,
    scale: float,
    config: Config,
    has_positions: bool,
    has_bounds: bool,
) -> None:
    length, _, head_dim = q_ref.shape[1:]
    kv_heads = kv_ref.shape[2]
    sequence, kv_head = pl.program_id(0) // kv_heads, pl.program_id(0) % kv_heads
    query_block, split = pl.program_id(1), pl.program_id(2)

    padded_group = pl.next_power_of_2(group)
    row = jnp.arange(max(16, config.queries * padded_group))
    token = query_block * config.queries + row // padded_group
    here = (row < config.queries * padded_group) & (row % padded_group < group) & (token < length)
    # Padding rows get an index past the end: the interpreter drops out-of-bounds stores.
    token = jnp.where(here, token, length)
    head = kv_head * group + row % padded_group
    column = jnp.arange(head_dim)
    q_index = (sequence, token[:, None], head[:, None], column[None, :])
    q_RD = plt.load(q_ref.at[q_index], mask=jnp.broadcast_to(here[:, None], (*row.shape, head_dim)), other=0.0)
    position_R = plt.load(q_positions_ref.at[sequence, token], mask=here, other=-1)
    sink_R = plt.load(sinks_ref.at[head], mask=here, other=0.0).astype(jnp.float32) * math.log2(math.e)
    if config.splits > 1:
        sink_R = jnp.where(split == 0, sink_R, LOWEST)
        denominator_R = jnp.where(jnp.broadcast_to(split == 0, row.shape), 1.0, 0.0)
    else:
        denominator_R = jnp.ones(row.shape, jnp.float32)

    keys = where_ref.shape[1] * (1 if has_positions else kv_ref.shape[1])
    if has_bounds:
        first, last = bounds_ref[sequence, query_block, 0], bounds_ref[sequence, query_block, 1]
    elif has_positions:
        first, last = 0, pl.cdiv(keys, config.keys)
    else:
        first, last = 0, jnp.minimum(jnp.max(position_R), keys - 1) // config.keys + 1
    if config.splits > 1:
        # Split the keys that exist: page tables may be much longer than their sequences.
        share = pl.cdiv(last - first, config.splits)
        first, last = first + split * share, jnp.minimum(last, first + (split + 1) * share)

    def attend(block: jax.Array, seen_RN: jax.Array, state: State) -> State:
        largest_R, denominator_R, sum_RD = state
        key = block * config.keys + jnp.arange(config.keys)
        if has_positions:
            place: tuple[jax.Array, ...] = (sequence, key[:, None])
        else:
            page = plt.load(where_ref.at[sequence, key // kv_ref.shape[1]], mask=key < keys, other=0)
            place = (page[:, None], (key % kv_ref.shape[1])[:, None])
        mask_ND = jnp.broadcast_to((key < keys)[:, None], (config.keys, head_dim))

        def load(start: int) -> jax.Array:
            at = kv_ref.at[(*place, kv_head, start + column[None, :])]
            return plt.load(at, mask=mask_ND, other=0.0).astype(q_RD.dtype)

        precision = lax.Precision.HIGHEST if q_RD.dtype == jnp.float32 else None
        dot = functools.partial(lax.dot_general, precision=precision, preferred_element_type=jnp.float32)
        scores_RN = dot(q_RD, load(0), (((1,), (1,)), ((), ()))) * scale
        scores_RN = jnp.where(seen_RN, scores_RN, -jnp.inf)
        new_R = jnp.maximum(largest_R, jnp.max(scores_RN, axis=1))
        weights_RN = jnp.exp2(scores_RN - new_R[:, None])
        shrink_R = jnp.exp2(largest_R - new_R)
        values_ND = load(head_dim)
        sum_RD = sum_RD * shrink_R[:, None] + dot(
            weights_RN.astype(q_RD.dtype), values_ND, (((1,), (0,)), ((), ()))
        )
        return new_R, denominator_R * shrink_R + jnp.sum(weights_RN, axis=1), sum_RD

    def step(block: jax.Array, state: State) -> State:
        key = block * config.keys + jnp.arange(config.keys)
        position_N = key
        if has_positions:
            position_N = plt.load(where_ref.at[sequence, key], mask=key < keys, other=-1)
        seen_RN = (position_N[None, :] <= position_R[:, None]) & ((position_N >= 0) & (key < keys))[None, :]
        if window is not None:
            seen_RN &= position_N[None, :] > position_R[:, None] - window
        run = functools.partial(attend, block, seen_RN)
        if has_bounds or not has_positions:
            return run(state)
        # With one query over slots in any order, skip blocks without visible keys: a new cache is mostly empty.
        return lax.cond(jnp.max(seen_RN.astype(jnp.int32)) > 0, run, lambda state: state, state)

    initial = (sink_R, denominator_R, jnp.zeros((*row.shape, head_dim), jnp.float32))
    largest_R, denominator_R, sum_RD = lax.fori_loop(first, last, step, initial)
    if config.splits == 1:
        sum_RD = sum_RD / denominator_R[:, None]
    out_ref = out_refs[0]
    mask = jnp.broadcast_to(here[:, None], sum_RD.shape)
    plt.store(out_ref.at[(split, *q_index)], sum_RD.astype(out_ref.dtype), mask=mask)
    if config.splits > 1:
        plt.store(out_refs[1].at[split, sequence, token, head], largest_R, mask=here)
        plt.store(out_refs[2].at[split, sequence, token, head], denominator_R, mask=here)
