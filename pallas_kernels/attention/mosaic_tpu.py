"""Ragged paged attention on TPUs, as a Pallas kernel lowered through Mosaic.

A program takes an item, a block of queries of one sequence, and loops over the blocks of keys that any of them sees,
with an online softmax whose initial state is the sink (arXiv:2205.14135, algorithm 1, with the sink as the first
score). One call serves decoding, prompts and both together: the grid has as many programs as there are items, an item
copies only the queries that it has, and computes one query, or a multiple of `STEP`.

The kernel makes all large copies itself, ahead of their use and across the boundaries of programs, so that short
sequences follow each other without a stall: the queries of the next item, the keys of the next block, and for the
block after that its few entries of the page table. Page tables stay in HBM, as they may be larger than scalar memory.

A row of the cache holds the key and the value of a head, which fill 128 lanes at head_dim 64. They are not separated:
queries have zeros in the value half, and the result is the second half of the weighted sum of rows.

Shapes are named by suffix as in the op; I is the items, G the query heads that share a key/value head (padded to a
multiple of 8), R the rows of some queries (a query and one of the G heads), N the keys of a block, and W the entries
of a table in whole rows of lanes.
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
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.attention.ragged import QueryBlocks, RaggedBatch
from pallas_kernels.tpu import LANES, VMEM_LIMIT, Chip, Interpret

SUBLANES = 8
"""Sublanes of a vector register."""

ROWS, HEADS = 1024, 8
"""Most rows of an item for each of at most this many key/value heads; fewer for more."""

STEP = 32
"""Most queries whose scores are computed at a time."""

KEYS = 512
"""Most keys of a block."""

Act = Callable[[Any], None]
"""What to do with a DMA: start it or wait for it."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Queries of an item and most keys of a block, both powers of two.

    Each item reads the keys that it sees once: with 128 queries, a chunk of 2048 reads its keys 8.5 times if they are
    all there are, and 15.1 times if it is the end of 16384. Even at 64 queries (of 8 rows), matrix products take
    longer than reading on every chip, so that larger items would only use more VMEM.
    """

    queries: int
    keys: int

    @classmethod
    def of(cls, kv_heads: int, group: int, page_size: int, window: int | None, most: int) -> Config:
        """For sequences of at most `most` queries."""
        rows = min(ROWS, ROWS * HEADS // kv_heads)
        queries = min(_power_of_two(rows // group), pl.next_power_of_2(most))
        keys = KEYS
        if window is not None:
            keys = min(keys, pl.next_power_of_2(window + queries + min(page_size, LANES) - 2))
        return cls(queries, max(LANES, keys))


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How keys are copied: a DMA takes a unit of keys, which is a page or one of the equal parts of a large page.

    A block is `units` units, and the first block of an item starts at the first unit that any of its queries sees.
    """

    unit: int
    parts: int
    units: int
    window: int | None

    @classmethod
    def of(cls, page_size: int, kv_heads: int, entries: int, window: int | None, keys: int) -> Blocks:
        """Blocks of at most `keys` keys, but at least a page if none of its parts fills tiles of bfloat16."""
        most = keys if window is None else min(keys, LANES)
        unit = page_size if page_size <= most else math.gcd(page_size, most)
        if unit * kv_heads % (2 * SUBLANES):
            unit = page_size
        parts = page_size // unit
        units = min(_power_of_two(keys // unit), pl.next_power_of_2(entries * parts), LANES)
        return cls(unit, parts, units, window)


class Items(NamedTuple):
    """Blocks of queries: int32 [I], followed by empty ones so that the next two of each core can be looked up.

    `row` is the row of the page table, `start` the first query's index on the flat axis, `queries` how many there are,
    0 if the item is empty, `position` the first one's position, and `first` to `last` the units of keys that they see.
    """

    row: Any
    start: Any
    queries: Any
    position: Any
    first: Any
    last: Any

    @classmethod
    def of(cls, batch: RaggedBatch, tokens: int, queries: int, blocks: Blocks, cores: int = 1) -> Items:
        """The items of a batch, those that are not empty first."""
        some = QueryBlocks.of(batch.counts_N, tokens, queries)
        row, start, count, length = (
            x[some.sequence_I].astype(jnp.int32)
            for x in (batch.rows_N, batch.starts_N, batch.counts_N, batch.lengths_N)
        )
        position = length - count + some.first_I
        seen = position if blocks.window is None else jnp.maximum(position - blocks.window + 1, 0)
        first = seen // blocks.unit if blocks.window is not None else jnp.zeros_like(position)
        last = (position + some.queries_I - 1) // blocks.unit + 1
        items = (row, start + some.first_I, some.queries_I, position, first, last)
        present = some.queries_I > 0
        return cls(*(jnp.pad(jnp.where(present, x, 0), (0, 2 * cores)) for x in items))


class Memory(NamedTuple):
    """References of the kernel: four arrays in HBM, the sinks, and the scratch memory, with two slots of each copy."""

    tables_RW: Any
    q_TKGE: Any
    kv_UXE: Any
    sinks_KGL: Any
    out_TKGD: Any
    table: Any
    q: Any
    kv: Any
    out: Any
    largest_KRL: Any
    denominator_KRL: Any
    sum_KRE: Any
    slot: Any
    semaphores: Any


def ragged_paged_attention(
    q_THD: jax.Array,
    kv_pages_PSKE: jax.Array,
    batch: RaggedBatch,
    sinks_H: jax.Array,
    *,
    window: int | None,
    sm_scale: float,
    max_queries: int | None = None,
    interpret: Interpret,
    config: Config | None = None,
    chip: Chip | None = None,
) -> jax.Array:
    """See `pallas_kernels.attention.ragged_paged_attention`."""
    _check(q_THD, kv_pages_PSKE, interpret)
    tokens, heads = q_THD.shape[:2]
    page_size, kv_heads, width = kv_pages_PSKE.shape[1:]
    padding = -(heads // kv_heads) % SUBLANES
    group = heads // kv_heads + padding
    most = tokens if max_queries is None else min(tokens, max_queries)
    config = config or Config.of(kv_heads, group, page_size, window, most)
    blocks = Blocks.of(page_size, kv_heads, batch.page_tables_RM.shape[1], window, config.keys)
    cores = (chip or Chip.current()).cores

    def grouped(x: jax.Array, lanes: int) -> jax.Array:
        x = x.reshape(*x.shape[:-2], kv_heads, heads // kv_heads, x.shape[-1])
        return jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, padding), (0, lanes - x.shape[-1])])

    sinks_KGL = jnp.broadcast_to(
        grouped(sinks_H.astype(jnp.float32)[:, None] * math.log2(math.e), 1), (kv_heads, group, LANES)
    )
    out_TKGD = _call(
        Items.of(batch, tokens, config.queries, blocks, cores),
        _in_lanes(batch.page_tables_RM.astype(jnp.int32), blocks.units),
        grouped(q_THD, width),
        kv_pages_PSKE.reshape(-1, blocks.unit * kv_heads, width),
        sinks_KGL,
        entries=batch.page_tables_RM.shape[1],
        queries=config.queries,
        blocks=blocks,
        scale=sm_scale * math.log2(math.e),
        cores=cores,
        interpret=interpret,
    )
    token_T1 = jnp.arange(tokens, dtype=jnp.int32)[:, None]
    present_T = jnp.any((token_T1 >= batch.starts_N) & (token_T1 < batch.starts_N + batch.counts_N), axis=1)
    out_THD = out_TKGD[:, :, : heads // kv_heads].reshape(q_THD.shape)
    return jnp.where(present_T[:, None, None], out_THD, 0)


def _check(q_THD: jax.Array, kv: jax.Array, interpret: Interpret) -> None:
    if q_THD.dtype not in (jnp.bfloat16, jnp.float32):
        raise NotImplementedError(f"queries of {q_THD.dtype}")
    if kv.dtype not in (jnp.bfloat16, jnp.float32):
        raise NotImplementedError(f"keys of {kv.dtype}")
    if interpret:
        return
    if kv.shape[3] % LANES:
        raise NotImplementedError(f"key and value have {kv.shape[3]} lanes, not a multiple of {LANES}")
    if kv.dtype == jnp.bfloat16 and kv.shape[2] > 1 and kv.shape[2] % 2:
        raise NotImplementedError(f"{kv.shape[2]} bfloat16 key/value heads: expected 1 or an even number")


def _power_of_two(size: int) -> int:
    """The largest that is not above `size`, and at least 1."""
    return 1 << max(size, 1).bit_length() - 1


def _in_lanes(tables_RM: jax.Array, following: int) -> jax.Array:
    """Tables in whole rows of lanes, where after each entry come the `following` - 1 next ones of the cycle."""
    entries = tables_RM.shape[1]
    if entries % LANES == 0:
        return tables_RM
    width = -(-(entries + following - 1) // LANES) * LANES
    return jnp.tile(tables_RM, (1, -(-width // entries)))[:, :width]


def _call(
    items: Items,
    tables_RW: jax.Array,
    q_TKGE: jax.Array,
    kv_UXE: jax.Array,
    sinks_KGL: jax.Array,
    *,
    entries: int,
    queries: int,
    blocks: Blocks,
    scale: float,
    cores: int,
    interpret: Interpret,
) -> jax.Array:
    tokens, kv_heads, group, width = q_TKGE.shape
    head_dim, rows = width // 2, queries * group
    kernel = functools.partial(
        _kernel,
        entries=entries,
        blocks=blocks,
        scale=scale,
        # The TPU interpreter does not support bitcast views.
        by_words=not isinstance(interpret, pltpu.InterpretParams) and kv_heads % 2 == 0,
    )
    programs = jnp.maximum(-(-jnp.sum(items.queries > 0, dtype=jnp.int32) // cores), 1)
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    if not interpret:
        # Left to choose, XLA copies a table of a few MiB to VMEM for every call.
        tables_RW, kv_UXE = (pltpu.with_memory_space_constraint(x, pltpu.HBM) for x in (tables_RW, kv_UXE))
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(items),
            grid=(cores, programs),
            in_specs=[anywhere, anywhere, anywhere, pl.BlockSpec(sinks_KGL.shape, lambda *_: (0, 0, 0))],
            out_specs=anywhere,
            scratch_shapes=[
                pltpu.SMEM((2, 2 * LANES), jnp.int32),
                pltpu.VMEM((2, queries, kv_heads, group, width), q_TKGE.dtype),
                pltpu.VMEM((2, blocks.units * kv_UXE.shape[1], width), kv_UXE.dtype),
                pltpu.VMEM((2, queries, kv_heads, group, head_dim), q_TKGE.dtype),
                pltpu.VMEM((kv_heads, rows, LANES), jnp.float32),
                pltpu.VMEM((kv_heads, rows, LANES), jnp.float32),
                pltpu.VMEM((kv_heads, rows, width), jnp.float32),
                pltpu.SMEM((1,), jnp.int32),
                pltpu.SemaphoreType.DMA((4, 2)),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((tokens, kv_heads, group, head_dim), q_TKGE.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
        ),
        interpret=interpret,
        name="attention",
    )(*items, tables_RW, q_TKGE, kv_UXE, sinks_KGL)


def _kernel(*refs: Any, entries: int, blocks: Blocks, scale: float, by_words: bool) -> None:
    """Items go to the cores in turn. A block's keys are in slot 0 and 1 in turn, as are an item's queries."""
    items, memory = Items(*refs[: len(Items._fields)]), Memory(*refs[len(Items._fields) :])
    index, cores = pl.program_id(1), pl.num_programs(0)
    item = index * cores + pl.program_id(0)
    copies = Copies(items, memory, blocks, entries)

    @pl.when(index == 0)
    def _() -> None:
        memory.slot[0] = 0
        # Masked keys have weight 0, but 0 times an uninitialised NaN would be NaN.
        memory.kv[...] = jnp.zeros_like(memory.kv)

        @pl.when(items.queries[item] > 0)
        def _() -> None:
            copies.queries(item, 0, _start)
            copies.table(item, 0, 0, _start)
            copies.table(item, 0, 0, _wait)
            copies.keys(item, 0, 0, _start)
            _start_table(copies, copies.following(item, 0, cores), 1)

    @pl.when(items.queries[item] > 0)
    def _() -> None:
        _attend_to_all(copies, item, index % 2, scale, by_words)

        @pl.when(index >= 2)
        def _() -> None:
            copies.results(item - 2 * cores, index % 2, _wait)

        _divide(memory, items.queries[item], index % 2)
        copies.results(item, index % 2, _start)

    @pl.when(index == pl.num_programs(1) - 1)
    def _() -> None:
        # An item that is empty made no copies, but the one before the previous may not have been waited for.
        @pl.when((index >= 2) & (items.queries[item] == 0))
        def _() -> None:
            copies.results(item - 2 * cores, index % 2, _wait)

        @pl.when(index >= 1)
        def _() -> None:
            copies.results(item - cores, (index + 1) % 2, _wait)

        copies.results(item, index % 2, _wait)


def _start(copy: Any) -> None:
    copy.start()


def _wait(copy: Any) -> None:
    copy.wait()


@dataclasses.dataclass(frozen=True)
class Copies:
    """The DMAs of an item or of one of its blocks of keys, to or from a slot; `act` starts or awaits each."""

    items: Items
    memory: Memory
    blocks: Blocks
    entries: int

    def count(self, item: Any) -> Any:
        """The number of blocks of keys."""
        return lax.div(self.items.last[item] - self.items.first[item] + self.blocks.units - 1, self.blocks.units)

    def following(self, item: Any, block: Any, cores: Any) -> tuple[Any, Any]:
        """The item and block that come next; there is none if the item is empty."""
        same = block + 1 < self.count(item)
        return jnp.where(same, item, item + cores), jnp.where(same, block + 1, 0)

    def queries(self, item: Any, slot: Any, act: Act) -> None:
        """Queries, from HBM."""

        def one(first: Any, size: int) -> None:
            source = self.memory.q_TKGE.at[pl.ds(self.items.start[item] + first, size)]
            target = self.memory.q.at[slot, pl.ds(first, size)]
            act(pltpu.make_async_copy(source, target, self.memory.semaphores.at[0, slot]))

        _pieces(self.items.queries[item], self._most, one)

    def results(self, item: Any, slot: Any, act: Act) -> None:
        """Results, to HBM."""

        def one(first: Any, size: int) -> None:
            source = self.memory.out.at[slot, pl.ds(first, size)]
            target = self.memory.out_TKGD.at[pl.ds(self.items.start[item] + first, size)]
            act(pltpu.make_async_copy(source, target, self.memory.semaphores.at[1, slot]))

        _pieces(self.items.queries[item], self._most, one)

    def table(self, item: Any, block: Any, slot: Any, act: Act) -> None:
        """Two rows of lanes of the page table, the first of which has the block's first entry."""
        line, _ = self._entry(item, block)
        for i in range(2):
            lanes = pl.multiple_of(lax.rem(line + i, self.memory.tables_RW.shape[1] // LANES) * LANES, LANES)
            source = self.memory.tables_RW.at[self.items.row[item], pl.ds(lanes, LANES)]
            target = self.memory.table.at[slot, pl.ds(i * LANES, LANES)]
            act(pltpu.make_async_copy(source, target, self.memory.semaphores.at[2, slot]))

    def keys(self, item: Any, block: Any, slot: Any, act: Act) -> None:
        """The units of keys that any query sees. To wait for them does not need the page table."""
        rows = self.memory.kv_UXE.shape[1]
        first = self.first(item, block)
        _, entry = self._entry(item, block)
        page = lax.div(first, self.blocks.parts)

        def one(i: Any, carry: None) -> None:
            unit = jnp.int32(0)
            if act is _start:
                number = self.memory.table[slot, entry + lax.div(first + i, self.blocks.parts) - page]
                unit = number * self.blocks.parts + lax.rem(first + i, self.blocks.parts)
            target = self.memory.kv.at[slot, pl.ds(i * rows, rows)]
            act(pltpu.make_async_copy(self.memory.kv_UXE.at[unit], target, self.memory.semaphores.at[3, slot]))

        lax.fori_loop(0, jnp.minimum(self.blocks.units, self.items.last[item] - first), one, None)

    def first(self, item: Any, block: Any) -> Any:
        """The first unit of a block."""
        return self.items.first[item] + block * self.blocks.units

    @property
    def _most(self) -> int:
        """The largest piece of queries."""
        return _power_of_two(min(self.memory.q.shape[1], self.memory.q_TKGE.shape[0]))

    def _entry(self, item: Any, block: Any) -> tuple[Any, Any]:
        """The row of lanes with the first entry of a block, and where in it the entry is."""
        entry = lax.rem(lax.div(self.first(item, block), self.blocks.parts), self.entries)
        return lax.div(entry, LANES), lax.rem(entry, LANES)


def _pieces(count: Any, most: int, one: Callable[[Any, int], None]) -> None:
    """Call `one` with the first and the size of pieces of `count`, whose sizes are powers of two up to `most`."""
    size = most
    while size:
        pl.when((count & size) != 0)(functools.partial(one, count & ~(2 * size - 1), size))
        size //= 2


def _start_table(copies: Copies, at: tuple[Any, Any], slot: Any) -> None:
    """Start to copy the table's entries of a block, if there is one."""

    @pl.when(copies.items.queries[at[0]] > 0)
    def _() -> None:
        copies.table(*at, slot, _start)


def _attend_to_all(copies: Copies, item: Any, q_slot: Any, scale: float, by_words: bool) -> None:
    """Run the online softmax of an item over all its keys, and start the copies of what comes after it."""
    items, memory, blocks = copies.items, copies.memory, copies.blocks
    cores, queries, position = pl.num_programs(0), items.queries[item], items.position[item]

    @pl.when(items.queries[item + cores] > 0)
    def _() -> None:
        copies.queries(item + cores, 1 - q_slot, _start)

    copies.queries(item, q_slot, _wait)
    _begin(memory, queries)

    def step(block: Any, slot: Any) -> Any:
        after = copies.following(item, block, cores)

        @pl.when(items.queries[after[0]] > 0)
        def _() -> None:
            copies.table(*after, 1 - slot, _wait)
            copies.keys(*after, 1 - slot, _start)
            _start_table(copies, copies.following(*after, cores), slot)

        copies.keys(item, block, slot, _wait)
        _clear(copies, item, block, slot)
        first = copies.first(item, block) * blocks.unit
        keys = blocks.units * blocks.unit
        position_1N = first + lax.broadcasted_iota(jnp.int32, (1, keys), 1)
        kv_heads = memory.q.shape[2]
        seen_by = _seen_by(position, first, keys, blocks.window)
        for k in range(kv_heads):
            rows_NE = _rows_of_head(memory.kv, slot, k, kv_heads, by_words).astype(memory.q.dtype)

            def some(start: Any, size: int, k: int = k, rows_NE: jax.Array = rows_NE) -> None:
                q_RE = memory.q[q_slot, pl.ds(start, size), k].reshape(-1, memory.q.shape[4])
                seen_RN = _seen(position + start, size, memory.q.shape[3], position_1N, blocks.window)
                _attend(memory, k, _rows(memory, start, size), q_RE, rows_NE, seen_RN, scale)

            _by_steps(memory, queries, some, *seen_by)
        return 1 - slot

    memory.slot[0] = lax.fori_loop(0, copies.count(item), step, memory.slot[0])


def _by_steps(
    memory: Memory, queries: Any, some: Callable[[Any, int], None], first: Any = 0, past: Any = None
) -> None:
    """Call `some` with the first and the static number of queries, for all from `first` until `past`."""
    step = min(STEP, memory.q.shape[1])
    if step == 1:
        some(0, 1)
        return
    past = queries if past is None else jnp.minimum(queries, past)
    pl.when(queries == 1)(functools.partial(some, 0, 1))

    @pl.when(queries > 1)
    def _() -> None:
        def one(i: Any, carry: None) -> None:
            some(pl.multiple_of(i * step, step), step)

        lax.fori_loop(lax.div(first, step), lax.div(past + step - 1, step), one, None)


def _seen_by(position: Any, first: Any, keys: int, window: int | None) -> tuple[Any, Any]:
    """The first and past-the-last query, of those from a position on, that see some of a block's keys."""
    past = None if window is None else jnp.maximum(first + keys + window - 1 - position, 0)
    return jnp.maximum(first - position, 0), past


def _rows(memory: Memory, start: Any, size: int) -> Any:
    group = memory.q.shape[3]
    return pl.ds(start * group if isinstance(start, int) else pl.multiple_of(start * group, group), size * group)


def _begin(memory: Memory, queries: Any) -> None:
    """The state of the softmax before any key: the sink's score, with weight 1."""
    kv_heads, group, lanes = memory.sinks_KGL.shape

    def some(start: Any, size: int) -> None:
        rows = _rows(memory, start, size)
        for k in range(kv_heads):
            sinks_RL = jnp.broadcast_to(memory.sinks_KGL[k][None], (size, group, lanes)).reshape(-1, lanes)
            memory.largest_KRL[k, rows] = sinks_RL
            memory.denominator_KRL[k, rows] = jnp.ones_like(sinks_RL)
            memory.sum_KRE[k, rows] = jnp.zeros((size * group, memory.sum_KRE.shape[2]), jnp.float32)

    _by_steps(memory, queries, some)


def _divide(memory: Memory, queries: Any, slot: Any) -> None:
    """The results of an item, in a slot."""
    kv_heads, group, head_dim = memory.out.shape[2:]

    def some(start: Any, size: int) -> None:
        rows = _rows(memory, start, size)
        for k in range(kv_heads):
            out_RD = memory.sum_KRE[k, rows][:, head_dim:] * (1 / memory.denominator_KRL[k, rows][:, :1])
            out_QGD = out_RD.reshape(size, group, head_dim)
            memory.out[slot, pl.ds(start, size), k] = out_QGD.astype(memory.out.dtype)

    _by_steps(memory, queries, some)


def _clear(copies: Copies, item: Any, block: Any, slot: Any) -> None:
    """Zero the keys in the first and last unit that no query sees: 0 times what was never written may be NaN."""
    items, blocks, kv = copies.items, copies.blocks, copies.memory.kv
    heads = copies.memory.kv_UXE.shape[1] // blocks.unit
    size = math.gcd(blocks.unit, 2 * SUBLANES) * heads

    def clear(unit: Any, first: Any, past: Any) -> None:
        def one(i: Any, carry: None) -> None:
            at = pl.ds(pl.multiple_of(unit * (blocks.unit * heads) + i * size, size), size)
            row = i * size + lax.broadcasted_iota(jnp.int32, (size, kv.shape[2]), 0)
            rest = jnp.where((row >= first) & (row < past), 0.0, kv[slot, at].astype(jnp.float32))
            kv[slot, at] = rest.astype(kv.dtype)

        lax.fori_loop(lax.div(first, size), lax.div(past + size - 1, size), one, None)

    def before() -> None:
        assert blocks.window is not None
        seen = jnp.maximum(items.position[item] - blocks.window + 1, 0)
        clear(0, 0, (seen - items.first[item] * blocks.unit) * heads)

    def after() -> None:
        last = items.last[item] - 1
        keys = items.position[item] + items.queries[item] - last * blocks.unit
        clear(last - copies.first(item, block), keys * heads, blocks.unit * heads)

    if blocks.window is not None:
        pl.when(block == 0)(before)
    pl.when(block + 1 == copies.count(item))(after)


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


def _seen(position: Any, queries: int, group: int, key_1N: jax.Array, window: int | None) -> jax.Array:
    """Which keys are seen by the rows of some queries, the first of which is at a position: [R, N]."""
    query_RL = lax.broadcasted_iota(jnp.int32, (queries, group, LANES), 0).reshape(-1, LANES)
    position_R1 = position + query_RL[:, :1]
    seen_RN = key_1N <= position_R1
    return seen_RN if window is None else seen_RN & (key_1N > position_R1 - window)


def _attend(
    memory: Memory,
    head: int,
    rows: Any,
    q_RE: jax.Array,
    rows_NE: jax.Array,
    seen_RN: jax.Array,
    scale: float,
) -> None:
    """One step of the online softmax; the denominator and weighted sum are relative to the largest score."""
    precision = lax.Precision.HIGHEST if q_RE.dtype == jnp.float32 else None
    dot = functools.partial(lax.dot_general, precision=precision, preferred_element_type=jnp.float32)
    scores_RN = jnp.where(seen_RN, dot(q_RE, rows_NE, (((1,), (1,)), ((), ()))) * scale, -jnp.inf)
    largest_R1 = memory.largest_KRL[head, rows][:, :1]
    new_R1 = jnp.maximum(largest_R1, jnp.max(scores_RN, axis=1, keepdims=True))
    weights_RN = jnp.exp2(scores_RN - new_R1)
    shrink_R1 = jnp.exp2(largest_R1 - new_R1)
    total_R1 = memory.denominator_KRL[head, rows][:, :1] * shrink_R1 + jnp.sum(weights_RN, axis=1, keepdims=True)
    shape = (q_RE.shape[0], LANES)
    memory.largest_KRL[head, rows] = jnp.broadcast_to(new_R1, shape)
    memory.denominator_KRL[head, rows] = jnp.broadcast_to(total_R1, shape)
    added_RE = dot(weights_RN.astype(q_RE.dtype), rows_NE, (((1,), (0,)), ((), ())))
    memory.sum_KRE[head, rows] = memory.sum_KRE[head, rows] * shrink_R1 + added_RE
