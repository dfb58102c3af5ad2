"""Calls of the ops as the engine makes them, on random data, for `benchmarks.counters` to profile."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import kernels
from gptoss_jax.model.config import ModelConfig
from gptoss_jax.model.gpt_oss import rope_frequencies
from pallas_kernels.attention import attention, paged_attention
from pallas_kernels.rotary import rotate_and_store

PAGE_SIZE = 32
RING_SLACK = 3
"""Rows of a ring beyond the window where three tokens are drafted at a time."""

LONG_CONTEXT = 32768
"""Longer contexts are decoded by one sequence only."""


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of an op; the fewest bytes that it moves and the operations that it needs bound its time.

    The call overwrites the argument of index `donated` in place and returns it last.
    """

    name: str
    function: Callable[..., Any]
    args: tuple[Any, ...]
    bytes: float
    flops: float
    donated: int | None = None


@dataclasses.dataclass(frozen=True)
class Shapes:
    """Sequences and contexts of decode; prompt tokens of a chunk and those that come before it."""

    batches: list[int]
    contexts: list[int]
    chunk: int = 2048
    earlier: tuple[int, ...] = (0, 8192)


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)


def some_of(count: int, *shape: int) -> np.ndarray:
    """Different numbers from 0 to below `count`, in any order: int32 of this shape."""
    return np.random.default_rng(0).permutation(count)[: math.prod(shape)].astype(np.int32).reshape(shape)


def attention_calls(config: ModelConfig, shapes: Shapes) -> Iterator[Call]:
    """Decode over pages and over rings, then prefill of a chunk by a full and by a sliding layer."""
    for batch in shapes.batches:
        for context in shapes.contexts:
            if batch == 1 or context <= LONG_CONTEXT:
                yield _over_pages(config, batch, 1, context)
        yield _over_ring_pages(config, batch)
        yield _over_slack_rings(config, batch)
    for earlier in shapes.earlier:
        yield _over_pages(config, 1, shapes.chunk, earlier + shapes.chunk)
        yield _over_held_ring(config, shapes.chunk, earlier)


def _call(
    config: ModelConfig,
    name: str,
    function: Callable[..., jax.Array],
    q: jax.Array,
    *args: jax.Array,
    keys: int,
    pairs: int,
) -> Call:
    """Attention that reads `keys` keys and values, and scores so many pairs of query and key for each sequence."""
    kv_bytes = keys * config.num_key_value_heads * 2 * config.head_dim * 2
    flops = 4 * config.num_attention_heads * config.head_dim * pairs
    function = partial(function, sm_scale=config.head_dim**-0.5)
    return Call(name, function, (q, *args), len(q) * kv_bytes + 2 * q.nbytes, len(q) * flops)


def _queries(config: ModelConfig, batch: int, length: int) -> jax.Array:
    return normal(0, batch, length, config.num_attention_heads, config.head_dim)


def _keys(config: ModelConfig, *rows: int) -> jax.Array:
    return normal(1, *rows, config.num_key_value_heads, 2 * config.head_dim)


def _sinks(config: ModelConfig) -> jax.Array:
    return normal(2, config.num_attention_heads)


def _over_pages(config: ModelConfig, batch: int, length: int, context: int) -> Call:
    """A full layer's queries at the last positions of `context`, with page tables of the engine's width."""
    pages = -(-context // PAGE_SIZE)
    width = -(-config.max_position_embeddings // PAGE_SIZE)
    table = np.pad(some_of(batch * pages, batch, pages), ((0, 0), (0, width - pages)))
    return _call(
        config,
        f"paged_attention B={batch} T={length} S={context}",
        paged_attention,
        _queries(config, batch, length),
        _keys(config, batch * pages, PAGE_SIZE),
        jnp.asarray(table),
        _sinks(config),
        jnp.broadcast_to(jnp.arange(context - length, context, dtype=jnp.int32), (batch, length)),
        keys=context,
        pairs=sum(range(context - length + 1, context + 1)),
    )


def _over_ring_pages(config: ModelConfig, batch: int) -> Call:
    """A sliding layer's decode over full rings of the window, each of them one page."""
    window = config.sliding_window
    return _call(
        config,
        f"paged_attention on rings B={batch} S={window}",
        paged_attention,
        _queries(config, batch, 1),
        _keys(config, batch, window),
        jnp.asarray(some_of(batch, batch, 1)),
        _sinks(config),
        jnp.full((batch, 1), window - 1, jnp.int32),
        keys=window,
        pairs=window,
    )


def _over_slack_rings(config: ModelConfig, batch: int) -> Call:
    """A sliding layer's decode over rings with slack, and the new key after each."""
    window, position = config.sliding_window, 1000
    held = _ring_positions(position, window + RING_SLACK)
    kv_positions = jnp.broadcast_to(jnp.append(held, position), (batch, len(held) + 1))
    return _call(
        config,
        f"attention on rings B={batch} S={len(held) + 1} window={window}",
        partial(attention, window=window),
        _queries(config, batch, 1),
        _keys(config, *kv_positions.shape),
        _sinks(config),
        jnp.full((batch, 1), position, jnp.int32),
        kv_positions,
        keys=window,
        pairs=window,
    )


def _over_held_ring(config: ModelConfig, chunk: int, earlier: int) -> Call:
    """A sliding layer's prefill over the ring as it was and the chunk's own keys."""
    window = config.sliding_window
    positions = earlier + jnp.arange(chunk, dtype=jnp.int32)
    kv_positions = jnp.append(_ring_positions(earlier, window), positions)
    return _call(
        config,
        f"attention T={chunk} after {earlier} window={window}",
        partial(attention, window=window),
        _queries(config, 1, chunk),
        _keys(config, 1, len(kv_positions)),
        _sinks(config),
        positions[None],
        kv_positions[None],
        keys=min(earlier, window - 1) + chunk,
        pairs=sum(min(p + 1, window) for p in range(earlier, earlier + chunk)),
    )


def _ring_positions(end: int, rows: int) -> jax.Array:
    """The position int32 [rows] in each row of a ring that has seen all before `end`; -1 if none."""
    row = jnp.arange(rows, dtype=jnp.int32)
    return jnp.maximum(end - 1 - (end - 1 - row) % rows, -1)


def rotary_calls(config: ModelConfig, shapes: Shapes) -> Iterator[Call]:
    """One new token of each sequence, then a chunk of one prompt."""
    for batch in shapes.batches:
        yield _rotary(config, some_of(config.max_position_embeddings, batch, 1))
    yield _rotary(config, np.arange(shapes.chunk, dtype=np.int32)[None])


def _rotary(config: ModelConfig, positions: np.ndarray) -> Call:
    """Float32 queries, keys and values at `positions` [B, T], kept in pages of a store twice as large."""
    batch, length = positions.shape
    heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
    q, k, v = (
        jax.random.normal(jax.random.key(i), (batch, length, n, config.head_dim)) for i, n in enumerate(heads)
    )
    pages = -(-length // PAGE_SIZE)
    table = some_of(2 * batch * pages, batch, pages)[:, np.arange(length) // PAGE_SIZE]
    store = _keys(config, 2 * batch * pages, PAGE_SIZE)
    frequencies, concentration = rope_frequencies(config.rope, config.head_dim)
    function = partial(rotate_and_store, concentration=concentration, out_dtype=jnp.bfloat16)
    place, page, slot = (jnp.asarray(x) for x in (positions, table, positions % PAGE_SIZE))
    args = (q, k, v, place, frequencies, store, page, slot)
    moved = q.nbytes + k.nbytes + v.nbytes + (q.size + k.size + v.size) * 2
    return Call(f"rotate_and_store B={batch} T={length}", function, args, moved, 0, donated=5)


def _of_cases(cases: Iterator[kernels.Case]) -> Iterator[Call]:
    """The cases of `benchmarks.kernels`, each with the first of its sets."""
    for case in cases:
        yield Call(case.name, case.step, (case.carry, case.sets[0]), case.bytes, case.flops)


OPS: dict[str, Callable[[ModelConfig, Shapes], Iterator[Call]]] = {
    "attention": attention_calls,
    "rotary": rotary_calls,
    "expert_mlp": lambda config, shapes: _of_cases(kernels.expert_cases(config, shapes.batches)),
    "linear": lambda config, shapes: _of_cases(kernels.linear_cases(config, shapes.batches)),
    "route": lambda config, shapes: _of_cases(kernels.route_cases(config, shapes.batches)),
}
