"""Ragged paged attention on NVIDIA GPUs, as Pallas kernels lowered through Triton.

A program computes the G query heads that share a key/value head, for a block of queries of one sequence, and loops
over blocks of keys with an online softmax whose initial state is the sink (arXiv:2205.14135, algorithm 1, with the
sink as the first score). There are two such kernels. The decode kernel computes the sequences with few queries, which
are bound by reading their keys: the visible keys of a sequence are split among as many programs as they need, and a
kernel that joins the partial results follows where there may be more than one. The prompt kernel computes the other
sequences, in blocks of many queries. The kernels write disjoint rows of one result.

What a program works on is read from a record of int32, so that keys are two dependent loads away: the record, and an
entry of a page table. The records are made outside of the kernels, and are the same for all layers of a model.

Shapes are named by suffix as in the op; I is the blocks of a kernel, F the fields of a record, R the rows of a block
(queries times G, padded to a power of two), C the keys of a block, and L the parts that are joined at a time.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels import gpu
from pallas_kernels.attention.ragged import QueryBlocks, RaggedBatch, blocks_of

State = tuple[jax.Array, jax.Array, jax.Array]
"""For each row: the largest score so far, and the softmax's denominator and weighted sum relative to it."""

LOWEST = -1e30
"""A finite score below all others, so that differences stay finite."""

MIN_ROWS = 16
"""Fewest rows of a matrix multiplication."""

MAX_DECODE_ROWS = 64
"""Most rows of the decode kernel, where no sequence has more."""

PROMPT_ROWS = 128

PARTS = 64
"""Most parts of a row that are joined at a time."""


@dataclasses.dataclass(frozen=True)
class Decode:
    """Keys per block, the fewest keys of a split, the programs to split for, and Triton's warps and stages."""

    keys: int = 128
    chunk: int = 128
    programs: int = 512
    num_warps: int = 4
    num_stages: int = 3


@dataclasses.dataclass(frozen=True)
class Prompt:
    """Queries and keys per block, and Triton's warps and pipeline stages."""

    queries: int = 8
    keys: int = 64
    num_warps: int = 4
    num_stages: int = 2


@dataclasses.dataclass(frozen=True)
class Config:
    """The configs of the two kernels."""

    decode: Decode = Decode()
    prompt: Prompt = Prompt()


@dataclasses.dataclass(frozen=True)
class _Op:
    """What the kernels know when they are traced: sequences of at most `few` queries are the decode kernel's.

    `group` is the query heads of a key/value head, and `scale` the factor of scores in base 2.
    """

    group: int
    few: int
    window: int | None
    scale: float

    @property
    def padded_group(self) -> int:
        return pl.next_power_of_2(self.group)

    def rows(self, queries: int) -> int:
        """The rows of a block of this many queries."""
        return max(MIN_ROWS, pl.next_power_of_2(queries * self.padded_group))


def ragged_paged_attention(
    q_THD: jax.Array,
    kv_pages_PSKE: jax.Array,
    batch: RaggedBatch,
    sinks_H: jax.Array,
    *,
    window: int | None,
    sm_scale: float,
    max_queries: int | None = None,
    interpret: bool,
    config: Config | None = None,
) -> jax.Array:
    """See `pallas_kernels.attention.ragged_paged_attention`."""
    _check(q_THD, kv_pages_PSKE, interpret)
    tokens, heads, _ = q_THD.shape
    group = heads // kv_pages_PSKE.shape[2]
    most = min(max_queries or tokens, tokens)
    op = _Op(group, _few(pl.next_power_of_2(group), most), window, sm_scale * math.log2(math.e))
    config = config or choose(op, most, batch.page_tables_RM.shape[1] * kv_pages_PSKE.shape[1], q_THD.dtype)
    arguments = (q_THD, kv_pages_PSKE, batch, sinks_H)
    out_THD = None
    if most > op.few:
        out_THD = _attend_prompts(*arguments, op, config.prompt, interpret)
    return _attend_decodes(*arguments, out_THD, op, config.decode, interpret)


def choose(op: _Op, most_queries: int, table_keys: int, dtype: Any) -> Config:
    """The config for sequences of so many queries, tables of so many keys, and queries of this dtype."""
    table_keys = table_keys if op.window is None else min(table_keys, op.window + op.few - 1)
    decode = Decode(keys=min(128, max(16, pl.next_power_of_2(table_keys))))
    queries = max(1, min(PROMPT_ROWS // op.padded_group, pl.next_power_of_2(most_queries)))
    # Three stages of float32 keys and values exceed the shared memory of Ada GPUs.
    return Config(decode, Prompt(queries=queries, num_stages=2 if jnp.dtype(dtype) == jnp.float32 else 3))


def _check(q_THD: jax.Array, kv_pages_PSKE: jax.Array, interpret: bool) -> None:
    head_dim = q_THD.shape[-1]
    if head_dim < 16 or head_dim & (head_dim - 1):
        raise NotImplementedError(f"head_dim {head_dim} is not a power of two of at least 16")
    if q_THD.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        raise NotImplementedError(f"queries of {q_THD.dtype}")
    if not interpret:
        gpu.check_converts(kv_pages_PSKE.dtype)
        gpu.check_indexes(kv_pages_PSKE)


def _few(padded_group: int, most_queries: int) -> int:
    """The most queries of the decode kernel's sequences, if no sequence has more than `most_queries`."""
    if most_queries * padded_group <= MAX_DECODE_ROWS:
        return most_queries
    return max(1, min(MIN_ROWS // padded_group, most_queries))


# The fields of a block's record: its row of the page tables, its first token, its queries (0 for none), the position
# of the first, and, in the decode kernel, the range of its keys and whether they are all that its sequence has.
ROW, TOKEN, QUERIES, POSITION, BEGIN, END, ALONE = range(7)


class Items(NamedTuple):
    """The decode kernel's work: its blocks, and the sequences that have several, which are joined.

    `records_IF` are the blocks; `joins_JF` has for each sequence with several blocks the first and the number of
    them, its first token, and its queries; None if no sequence can have several. `parts` is the most that it can have.
    """

    records_IF: jax.Array
    joins_JF: jax.Array | None
    parts: int

    @classmethod
    def of(cls, batch: RaggedBatch, table_keys: int, kv_heads: int, op: _Op, config: Decode) -> Items:
        """The blocks of sequences with at most `op.few` queries, with tables that hold so many keys."""
        position_N = batch.lengths_N - batch.counts_N
        first_N = jnp.zeros_like(position_N)
        most = table_keys
        if op.window is not None:
            first_N = jnp.maximum(position_N - op.window + 1, 0)
            most = op.window + op.few - 1
        here_N = (batch.counts_N > 0) & (batch.counts_N <= op.few)
        queries_N = jnp.where(here_N, batch.counts_N, 0)
        fields = [batch.rows_N, batch.starts_N, queries_N, position_N]
        chunk = -(-config.chunk // config.keys) * config.keys
        # A window is read as a whole.
        if most <= (chunk if op.window is None else 2 * chunk):
            fields += [first_N, batch.lengths_N, jnp.ones_like(first_N)]
            return cls(jnp.stack(fields, axis=1), None, 1)
        target = max(1, config.programs // kv_heads)
        keys_N = jnp.where(here_N, batch.lengths_N - first_N, 0)
        # No more than `target` blocks of this size are full, so at most so many sequences have more than one.
        share = -(-jnp.sum(keys_N) // (target * config.keys)) * config.keys
        size = jnp.maximum(share, chunk).astype(jnp.int32)
        whole = pl.cdiv(most, chunk)
        items = min(len(keys_N) + target, len(keys_N) * whole)
        blocks = blocks_of(keys_N, size, items)
        row_I, token_I, queries_I, position_I = (x[blocks.sequence_I] for x in fields)
        begin_I = first_N[blocks.sequence_I] + blocks.first_I
        alone_I = keys_N[blocks.sequence_I] <= size
        records_IF = jnp.stack(
            [
                row_I,
                token_I,
                jnp.where(blocks.count_I > 0, queries_I, 0),
                position_I,
                begin_I,
                begin_I + blocks.count_I,
                alone_I.astype(jnp.int32),
            ],
            axis=1,
        )
        splits_N = -(-keys_N // size)
        joins_JF = _joins(splits_N, batch.starts_N, queries_N, min(len(keys_N), target))
        return cls(records_IF, joins_JF, min(target, whole))


def _joins(splits_N: jax.Array, starts_N: jax.Array, queries_N: jax.Array, most: int) -> jax.Array:
    """See `Items.joins_JF`."""
    several_N = splits_N > 1
    before_N = jnp.cumsum(several_N)
    sequence_J = jnp.sum(before_N <= jnp.arange(most)[:, None], axis=1)
    here_J = sequence_J < len(splits_N)
    sequence_J = jnp.minimum(sequence_J, len(splits_N) - 1)
    first_N = jnp.cumsum(splits_N) - splits_N
    first_J, splits_J, starts_J, queries_J = (x[sequence_J] for x in (first_N, splits_N, starts_N, queries_N))
    return jnp.stack([first_J, splits_J, starts_J, jnp.where(here_J, queries_J, 0)], axis=1).astype(jnp.int32)


def _owned(batch: RaggedBatch, tokens: int) -> jax.Array:
    """int32 [T], 1 for the queries of a sequence."""
    token_T1 = jnp.arange(tokens, dtype=jnp.int32)[:, None]
    in_TN = (batch.starts_N <= token_T1) & (token_T1 < batch.starts_N + batch.counts_N)
    return jnp.any(in_TN, axis=1).astype(jnp.int32)


def _attend_decodes(
    q_THD: jax.Array,
    kv_pages_PSKE: jax.Array,
    batch: RaggedBatch,
    sinks_H: jax.Array,
    out_THD: jax.Array | None,
    op: _Op,
    config: Decode,
    interpret: bool,
) -> jax.Array:
    """Write the results of sequences with few queries to `out_THD`, or to a new array with 0 between sequences."""
    tokens, heads, head_dim = q_THD.shape
    page_size, kv_heads = kv_pages_PSKE.shape[1:3]
    items = Items.of(batch, batch.page_tables_RM.shape[1] * page_size, kv_heads, op, config)
    records_IF = items.records_IF
    operands = [q_THD, kv_pages_PSKE, batch.page_tables_RM, sinks_H, records_IF]
    if out_THD is None:
        # Program i also clears token i.
        records_IF = jnp.pad(records_IF, ((0, max(0, tokens - len(records_IF))), (0, 0)))
        operands[-1:] = [records_IF, _owned(batch, tokens)]
    else:
        operands.append(out_THD)
    shape = (len(records_IF), kv_heads, op.rows(op.few))
    out_shape = [jax.ShapeDtypeStruct(q_THD.shape, q_THD.dtype)]
    if items.joins_JF is not None:
        out_shape += [jax.ShapeDtypeStruct(x, jnp.float32) for x in ((*shape, head_dim), shape, shape)]
    out_THD, *partials = pl.pallas_call(
        functools.partial(_decode_kernel, op=op, config=config, fills=out_THD is None),
        grid=(kv_heads, len(records_IF)),
        out_shape=out_shape,
        input_output_aliases={} if out_THD is None else {len(operands) - 1: 0},
        compiler_params=plt.CompilerParams(num_warps=config.num_warps, num_stages=config.num_stages),
        interpret=interpret,
        name="attention_decode",
    )(*operands)
    if items.joins_JF is None:
        return out_THD
    return pl.pallas_call(
        functools.partial(_join_kernel, op=op, parts=min(PARTS, pl.next_power_of_2(items.parts))),
        grid=(heads, op.few, len(items.joins_JF)),
        out_shape=jax.ShapeDtypeStruct(q_THD.shape, q_THD.dtype),
        input_output_aliases={4: 0},
        compiler_params=plt.CompilerParams(num_warps=1 if items.parts <= 16 else 4, num_stages=1),
        interpret=interpret,
        name="attention_join",
    )(*partials, items.joins_JF, out_THD)


def _attend_prompts(
    q_THD: jax.Array,
    kv_pages_PSKE: jax.Array,
    batch: RaggedBatch,
    sinks_H: jax.Array,
    op: _Op,
    config: Prompt,
    interpret: bool,
) -> jax.Array:
    """The results of sequences with many queries, and 0 between sequences."""
    tokens, kv_heads = len(q_THD), kv_pages_PSKE.shape[2]
    counts_N = jnp.where(batch.counts_N > op.few, batch.counts_N, 0)
    blocks = QueryBlocks.of(counts_N, tokens, config.queries, least=op.few + 1)
    rows_I, starts_I, lengths_I, counts_I = (
        x[blocks.sequence_I] for x in (batch.rows_N, batch.starts_N, batch.lengths_N, batch.counts_N)
    )
    position_I = lengths_I - counts_I + blocks.first_I
    records_IF = jnp.stack([rows_I, starts_I + blocks.first_I, blocks.queries_I, position_I], axis=1)
    return pl.pallas_call(
        functools.partial(_prompt_kernel, op=op, config=config),
        grid=(kv_heads, len(records_IF)),
        out_shape=jax.ShapeDtypeStruct(q_THD.shape, q_THD.dtype),
        compiler_params=plt.CompilerParams(num_warps=config.num_warps, num_stages=config.num_stages),
        interpret=interpret,
        name="attention_prompt",
    )(q_THD, kv_pages_PSKE, batch.page_tables_RM, sinks_H, records_IF, _owned(batch, tokens))


class _Rows(NamedTuple):
    """Of each row of a block: its query in the block, its token and its head, and whether there is such a row.

    Rows that there are not have a token past the end: the interpreter drops out-of-bounds stores.
    """

    query_R: jax.Array
    token_R: jax.Array
    head_R: jax.Array
    here_R: jax.Array

    @classmethod
    def of(cls, op: _Op, size: int, kv_head: Any, first_token: Any, queries: Any, tokens: int) -> _Rows:
        """The rows of the first `queries` of a block of `size`."""
        row = jnp.arange(op.rows(size))
        query, head = row // op.padded_group, row % op.padded_group
        here = (query < queries) & (head < op.group)
        return cls(query, jnp.where(here, first_token + query, tokens), kv_head * op.group + head, here)

    def place(self, head_dim: int) -> tuple[tuple[jax.Array, ...], jax.Array]:
        """The index of the rows in an array [T, H, D], and its mask."""
        index = (self.token_R[:, None], self.head_R[:, None], jnp.arange(head_dim)[None, :])
        return index, jnp.broadcast_to(self.here_R[:, None], (len(self.token_R), head_dim))

    def sinks(self, sinks_ref: Any) -> jax.Array:
        """The sinks float32 [R] in base 2."""
        sink_R = plt.load(sinks_ref.at[self.head_R], mask=self.here_R, other=0.0)
        return sink_R.astype(jnp.float32) * math.log2(math.e)


def _decode_kernel(
    q_ref: Any,
    kv_ref: Any,
    tables_ref: Any,
    sinks_ref: Any,
    records_ref: Any,
    owned_or_out_ref: Any,
    out_ref: Any,
    *partial_refs: Any,
    op: _Op,
    config: Decode,
    fills: bool,
) -> None:
    kv_head, item = pl.program_id(0), pl.program_id(1)
    tokens, head_dim = q_ref.shape[0], q_ref.shape[2]
    record = [records_ref[item, field] for field in range(records_ref.shape[1])]
    rows = _Rows.of(op, op.few, kv_head, record[TOKEN], record[QUERIES], tokens)

    @pl.when(record[QUERIES] > 0)
    def _() -> None:
        index, mask_RD = rows.place(head_dim)
        q_RD = plt.load(q_ref.at[index], mask=mask_RD, other=0.0)
        position_R = record[POSITION] + rows.query_R

        def step(block: jax.Array, state: State) -> State:
            key_C = record[BEGIN] + block * config.keys + jnp.arange(config.keys)
            here_C = key_C < record[END]
            seen_RC = jnp.broadcast_to(here_C[None, :], (len(position_R), config.keys))
            if op.few > 1:
                seen_RC &= _seen(key_C, position_R, op.window)
            load = _loader(kv_ref, tables_ref, record[ROW], kv_head, key_C, here_C, q_RD.dtype)
            return _accumulate(state, q_RD, load, seen_RC, op.scale)

        sink_R, denominator_R = rows.sinks(sinks_ref), jnp.ones(rows.here_R.shape, jnp.float32)
        if partial_refs:
            # All parts are relative to the sink or more, but it counts in the first only.
            first = record[BEGIN] <= _first_key(record[POSITION], op.window)
            denominator_R = jnp.where(jnp.broadcast_to(first, sink_R.shape), denominator_R, 0.0)
        initial = (sink_R, denominator_R, jnp.zeros((len(sink_R), head_dim), jnp.float32))
        blocks = pl.cdiv(record[END] - record[BEGIN], config.keys)
        largest_R, denominator_R, sum_RD = lax.fori_loop(0, blocks, step, initial)

        def finish() -> None:
            plt.store(out_ref.at[index], (sum_RD / denominator_R[:, None]).astype(out_ref.dtype), mask=mask_RD)

        def leave_part() -> None:
            for ref, value in zip(partial_refs, (sum_RD, largest_R, denominator_R), strict=True):
                ref[item, kv_head] = value

        if partial_refs:
            pl.when(record[ALONE] != 0)(finish)
            pl.when(record[ALONE] == 0)(leave_part)
        else:
            finish()

    if fills:
        # Last, since loads wait for the stores before them.
        clears = (item < tokens) & (owned_or_out_ref[jnp.minimum(item, tokens - 1)] == 0)
        _clear(out_ref, _Rows.of(op, 1, kv_head, item, clears.astype(jnp.int32), tokens))


def _join_kernel(
    sums_ref: Any,
    largest_ref: Any,
    denominators_ref: Any,
    joins_ref: Any,
    _out_in_ref: Any,
    out_ref: Any,
    *,
    op: _Op,
    parts: int,
) -> None:
    head, query, join = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    kv_head, row = head // op.group, query * op.padded_group + head % op.group
    first, count, token, queries = (joins_ref[join, field] for field in range(4))
    head_dim = out_ref.shape[-1]

    @pl.when(query < queries)
    def _() -> None:
        def step(block: jax.Array, state: State) -> State:
            largest, denominator, sum_D = state
            part_L = block * parts + jnp.arange(parts)
            here_L = part_L < count
            item_L = jnp.where(here_L, first + part_L, 0)
            largest_L = plt.load(largest_ref.at[item_L, kv_head, row], mask=here_L, other=LOWEST)
            denominator_L = plt.load(denominators_ref.at[item_L, kv_head, row], mask=here_L, other=0.0)
            here_LD = jnp.broadcast_to(here_L[:, None], (parts, head_dim))
            at = sums_ref.at[item_L[:, None], kv_head, row, jnp.arange(head_dim)[None, :]]
            sums_LD = plt.load(at, mask=here_LD, other=0.0)
            new = jnp.maximum(largest, jnp.max(largest_L))
            shrink, factor_L = jnp.exp2(largest - new), jnp.exp2(largest_L - new)
            denominator = denominator * shrink + jnp.sum(factor_L * denominator_L)
            return new, denominator, sum_D * shrink + jnp.sum(factor_L[:, None] * sums_LD, axis=0)

        initial = (jnp.float32(LOWEST), jnp.float32(0.0), jnp.zeros(head_dim, jnp.float32))
        _, denominator, sum_D = lax.fori_loop(0, pl.cdiv(count, parts), step, initial)
        out_ref[token + query, head, :] = (sum_D / denominator).astype(out_ref.dtype)


def _prompt_kernel(
    q_ref: Any,
    kv_ref: Any,
    tables_ref: Any,
    sinks_ref: Any,
    records_ref: Any,
    owned_ref: Any,
    out_ref: Any,
    *,
    op: _Op,
    config: Prompt,
) -> None:
    # The last blocks of a prompt see the most keys, and start first.
    kv_head, block = pl.program_id(0), records_ref.shape[0] - 1 - pl.program_id(1)
    tokens, head_dim = q_ref.shape[0], q_ref.shape[2]
    row, token, queries, position = (records_ref[block, field] for field in range(4))
    chunk = _Rows.of(op, config.queries, kv_head, block * config.queries, config.queries, tokens)
    _clear_block(out_ref, owned_ref, chunk)

    @pl.when(queries > 0)
    def _() -> None:
        rows = _Rows.of(op, config.queries, kv_head, token, queries, tokens)
        index, mask_RD = rows.place(head_dim)
        q_RD = plt.load(q_ref.at[index], mask=mask_RD, other=0.0)
        position_R = position + rows.query_R
        first, end = _first_key(position, op.window), position + queries

        def step(block: jax.Array, state: State, *, masked: bool) -> State:
            key_C = first + block * config.keys + jnp.arange(config.keys)
            here_C = key_C < end if masked else None
            seen_RC = _seen(key_C, position_R, op.window) if masked else None
            load = _loader(kv_ref, tables_ref, row, kv_head, key_C, here_C, q_RD.dtype)
            return _accumulate(state, q_RD, load, seen_RC, op.scale)

        sink_R = rows.sinks(sinks_ref)
        state: State = (sink_R, jnp.ones(sink_R.shape, jnp.float32), jnp.zeros(mask_RD.shape, jnp.float32))
        whole: Any = 0
        if op.window is None:
            # Blocks of keys that all queries see.
            whole = (position + 1) // config.keys
            state = lax.fori_loop(0, whole, functools.partial(step, masked=False), state)
        blocks = pl.cdiv(end - first, config.keys)
        _, denominator_R, sum_RD = lax.fori_loop(whole, blocks, functools.partial(step, masked=True), state)
        plt.store(out_ref.at[index], (sum_RD / denominator_R[:, None]).astype(out_ref.dtype), mask=mask_RD)


def _first_key(position: jax.Array, window: int | None) -> Any:
    """The first key that the query at a position sees."""
    return 0 if window is None else jnp.maximum(position - window + 1, 0)


def _seen(key_C: jax.Array, position_R: jax.Array, window: int | None) -> jax.Array:
    seen_RC = key_C[None, :] <= position_R[:, None]
    return seen_RC if window is None else seen_RC & (key_C[None, :] > position_R[:, None] - window)


def _clear(out_ref: Any, rows: _Rows) -> None:
    """Write 0 to rows of the result."""
    index, mask_RD = rows.place(out_ref.shape[-1])
    plt.store(out_ref.at[index], jnp.zeros(mask_RD.shape, out_ref.dtype), mask=mask_RD)


def _clear_block(out_ref: Any, owned_ref: Any, rows: _Rows) -> None:
    """Write 0 to those rows of the result that belong to no sequence."""
    tokens = out_ref.shape[0]
    here_R = rows.here_R & (rows.token_R < tokens)
    here_R &= plt.load(owned_ref.at[rows.token_R], mask=here_R, other=1) == 0
    _clear(out_ref, rows._replace(token_R=jnp.where(here_R, rows.token_R, tokens), here_R=here_R))


def _loader(
    kv_ref: Any,
    tables_ref: Any,
    table_row: jax.Array,
    kv_head: jax.Array,
    key_C: jax.Array,
    here_C: jax.Array | None,
    dtype: Any,
) -> Callable[[int], jax.Array]:
    """A function that loads D columns [C, D] of the keys' cache rows from a column on; 0 for keys that are not here."""
    page_size, head_dim = kv_ref.shape[1], kv_ref.shape[3] // 2
    entry_C = tables_ref.at[table_row, key_C // page_size % tables_ref.shape[1]]
    page_C = plt.load(entry_C, mask=here_C, other=None if here_C is None else 0)
    slot_C = key_C % page_size

    def load(start: int) -> jax.Array:
        at = kv_ref.at[page_C[:, None], slot_C[:, None], kv_head, start + jnp.arange(head_dim)[None, :]]
        if here_C is None:
            return plt.load(at).astype(dtype)
        mask_CD = jnp.broadcast_to(here_C[:, None], (len(key_C), head_dim))
        return plt.load(at, mask=mask_CD, other=0.0).astype(dtype)

    return load


def _accumulate(
    state: State, q_RD: jax.Array, load: Callable[[int], jax.Array], seen_RC: jax.Array | None, scale: float
) -> State:
    """One step of the online softmax in base 2; all of the keys are seen if `seen_RC` is None."""
    largest_R, denominator_R, sum_RD = state
    precision = lax.Precision.HIGHEST if q_RD.dtype == jnp.float32 else None
    dot = functools.partial(lax.dot_general, precision=precision, preferred_element_type=jnp.float32)
    scores_RC = dot(q_RD, load(0), (((1,), (1,)), ((), ())))
    if seen_RC is not None:
        scores_RC = jnp.where(seen_RC, scores_RC, -jnp.inf)
    # Scaled with the difference, in one instruction.
    new_R = jnp.maximum(largest_R, jnp.max(scores_RC, axis=1) * scale)
    weights_RC = jnp.exp2(scores_RC * scale - new_R[:, None])
    shrink_R = jnp.exp2(largest_R - new_R)
    values_CD = load(q_RD.shape[1])
    sum_RD = sum_RD * shrink_R[:, None] + dot(weights_RC.astype(q_RD.dtype), values_CD, (((1,), (0,)), ((), ())))
    return new_R, denominator_R * shrink_R + jnp.sum(weights_RC, axis=1), sum_RD
