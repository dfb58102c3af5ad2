"""Rows of a mixture-of-experts layer, sorted by expert and split into tiles of a single expert each."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

COMPARED_ROWS = 2048
"""Up to this many rows are ranked by comparing all pairs, in two fused kernels; a sort takes a dozen."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tiles:
    """M tiles over R rows (a token with k experts has k rows); the last tiles may be empty.

    `rows_R` is int32 and lists the rows sorted by expert, those of absent experts last. Tile m has the rows
    `rows[start : start + count]`, which all belong to `expert`.
    """

    rows_R: jax.Array
    expert_M: jax.Array
    start_M: jax.Array
    count_M: jax.Array


def tiles_of_one(ids_R: jax.Array, num_experts: int) -> Tiles:
    """One tile per row, in the order of the rows."""
    rows_R = jnp.arange(ids_R.shape[0], dtype=jnp.int32)
    here_R = (ids_R < num_experts).astype(jnp.int32)
    return Tiles(rows_R, jnp.minimum(ids_R, num_experts - 1), rows_R, here_R)


def tiles_by_expert(ids_R: jax.Array, num_experts: int, tile_rows: int) -> Tiles:
    """Tiles of at most `tile_rows` rows; their number is static, and enough for any routing."""
    rows = ids_R.shape[0]
    experts_E = jnp.arange(num_experts, dtype=jnp.int32)
    counts_E = jnp.sum(ids_R[:, None] == experts_E, axis=0, dtype=jnp.int32)
    tiles_E = -(-counts_E // tile_rows)
    # Masked sums instead of cumsum: each is one small kernel on a GPU.
    before_EE = experts_E[None, :] < experts_E[:, None]
    starts_E = jnp.sum(jnp.where(before_EE, counts_E, 0), axis=1)
    first_tile_E = jnp.sum(jnp.where(before_EE, tiles_E, 0), axis=1)
    occupied = min(num_experts, rows)
    tile_M = jnp.arange((rows - occupied) // tile_rows + occupied, dtype=jnp.int32)
    own_ME = (first_tile_E <= tile_M[:, None]) & (tile_M[:, None] < first_tile_E + tiles_E)
    expert_M = jnp.sum(jnp.where(own_ME, experts_E, 0), axis=1)
    done_ME = (tile_M[:, None] - first_tile_E) * tile_rows
    start_M = jnp.sum(jnp.where(own_ME, starts_E + done_ME, 0), axis=1)
    count_M = jnp.sum(jnp.where(own_ME, jnp.minimum(counts_E - done_ME, tile_rows), 0), axis=1)
    return Tiles(_sorted_rows(ids_R), expert_M, start_M, count_M)


def _sorted_rows(ids_R: jax.Array) -> jax.Array:
    """The stable order of the rows by id."""
    rows = ids_R.shape[0]
    row_R = jnp.arange(rows, dtype=jnp.int32)
    if rows > COMPARED_ROWS:
        return jnp.argsort(ids_R, stable=True).astype(jnp.int32)
    earlier_RR = (ids_R[None, :] < ids_R[:, None]) | (
        (ids_R[None, :] == ids_R[:, None]) & (row_R[None, :] < row_R[:, None])
    )
    rank_R = jnp.sum(earlier_RR, axis=1, dtype=jnp.int32)
    return jnp.sum(jnp.where(rank_R[None, :] == row_R[:, None], row_R, 0), axis=1)
