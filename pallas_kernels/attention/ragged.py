"""The layout of a ragged batch: sequences with any number of queries each, on one flat axis of tokens."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RaggedBatch:
    """The N sequences of a flat axis of T queries, and the pages of their keys.

    The queries of sequence n are `q[starts[n] : starts[n] + counts[n]]`, at the last `counts[n]` of its `lengths[n]`
    positions; its keys are those of all its positions. Sequences are in the order of their starts and do not overlap.

    Args:
      page_tables_RM: int32; position p of a sequence with table row r is in page `page_tables[r, p // S % M]`, slot
        p % S, for pages of S slots. A table is used cyclically, so that one with a window needs few entries. Entries
        that hold no visible key may be any number, and are not read.
      rows_N: int32, the table row of each sequence.
      starts_N, counts_N, lengths_N: int32; a count of 0 marks an absent sequence.
    """

    page_tables_RM: jax.Array
    rows_N: jax.Array
    starts_N: jax.Array
    counts_N: jax.Array
    lengths_N: jax.Array


class Blocks(NamedTuple):
    """Blocks of some of the elements of one sequence each; all int32 [I].

    `sequence` is each block's sequence, `first` its first element among the sequence's, and `count` how many it has,
    0 for the blocks of the static size I that are not needed.
    """

    sequence_I: jax.Array
    first_I: jax.Array
    count_I: jax.Array


def blocks_of(counts_N: jax.Array, size: jax.Array | int, most: int) -> Blocks:
    """The blocks of `size` elements of sequences that have `counts_N`, in order; there must be at most `most`."""
    blocks_N = -(-counts_N // size)
    ends_N = jnp.cumsum(blocks_N)
    index_I = jnp.arange(most, dtype=jnp.int32)
    sequence_I = jnp.minimum(jnp.sum(ends_N <= index_I[:, None], axis=1, dtype=jnp.int32), len(counts_N) - 1)
    first_I = (index_I - (ends_N - blocks_N)[sequence_I]) * size
    count_I = jnp.where(index_I < ends_N[-1], jnp.minimum(counts_N[sequence_I] - first_I, size), 0)
    return Blocks(sequence_I, first_I.astype(jnp.int32), count_I.astype(jnp.int32))


class QueryBlocks(NamedTuple):
    """Blocks of at most Q queries of one sequence each; all int32 [I].

    `sequence` is each block's sequence, `first` its first query among the sequence's, and `queries` how many it has,
    0 for the blocks of the static size I that are not needed.
    """

    sequence_I: jax.Array
    first_I: jax.Array
    queries_I: jax.Array

    @classmethod
    def of(cls, counts_N: jax.Array, tokens: int, size: int, least: int = 1) -> QueryBlocks:
        """All blocks of `size` queries of sequences that have `tokens` queries together, in order.

        Sequences have 0 or at least `least` queries each.
        """
        most = min(tokens, tokens // size + min(len(counts_N), tokens // least))
        return cls(*blocks_of(counts_N, size, most))
