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
from pallas_kernels.rotary import rotate_and_store

PAGE_SIZE = 32
SLIDING_CONTEXT = 900
"""Keys before the window of a sliding layer's decode."""

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
    """Decode of a full and of a sliding layer, with and without drafts, then a chunk of a prompt in both."""
    window = config.sliding_window
    for batch in shapes.batches:
        for context in shapes.contexts:
            if batch == 1 or context <= LONG_CONTEXT:
                yield _ragged(config, f"decode N={batch} S={context}", batch, 1, context, None)
        for queries in (1, kernels.MOST_DRAFTS + 1):
            context = window + SLIDING_CONTEXT
            yield _ragged(config, f"decode N={batch} T={queries} S={context}", batch, queries, context, window)
    for earlier in shapes.earlier:
        for own in (None, window):
            yield _ragged(
                config, f"prompt T={shapes.chunk} after {earlier}", 1, shapes.chunk, earlier + shapes.chunk, own
            )


def _ragged(config: ModelConfig, name: str, batch: int, queries: int, length: int, window: int | None) -> Call:
    """Attention of equal sequences, with the fewest bytes and operations that it needs."""
    ragged = kernels.Ragged([queries] * batch, [length] * batch, window)
    return next(_of_cases(iter([kernels.ragged_case(config, name, ragged)])))


def rotary_calls(config: ModelConfig, shapes: Shapes) -> Iterator[Call]:
    """One new token of each sequence, then a chunk of one prompt."""
    for batch in shapes.batches:
        yield _rotary(config, some_of(config.max_position_embeddings, batch), some_of(2 * batch, batch))
    positions = np.arange(shapes.chunk, dtype=np.int32)
    pages = -(-shapes.chunk // PAGE_SIZE)
    yield _rotary(config, positions, some_of(2 * pages, pages)[positions // PAGE_SIZE])


def _rotary(config: ModelConfig, positions_T: np.ndarray, pages_T: np.ndarray) -> Call:
    """Float32 queries, keys and values of tokens, kept in `pages_T` of a store twice as large."""
    tokens = len(positions_T)
    heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
    q, k, v = (jax.random.normal(jax.random.key(i), (tokens, n, config.head_dim)) for i, n in enumerate(heads))
    store = normal(3, 2 * len(set(pages_T.tolist())), PAGE_SIZE, config.num_key_value_heads, 2 * config.head_dim)
    frequencies, concentration = rope_frequencies(config.rope, config.head_dim)
    function = partial(rotate_and_store, concentration=concentration, out_dtype=jnp.bfloat16)
    place, page, slot = (jnp.asarray(x) for x in (positions_T, pages_T, positions_T % PAGE_SIZE))
    args = (q, k, v, place, frequencies, store, page, slot)
    moved = q.nbytes + k.nbytes + v.nbytes + (q.size + k.size + v.size) * 2
    return Call(f"rotate_and_store T={tokens}", function, args, moved, 0, donated=5)


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
