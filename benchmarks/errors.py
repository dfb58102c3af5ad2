"""Relative errors against a float32 reference."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def relative_error(got: Any, want: Any) -> float:
    """The norm of the difference divided by that of `want`; for pytrees, the maximum over their arrays."""

    def one(got: jax.Array, want: jax.Array) -> float:
        got, want = got.astype(jnp.float32).reshape(-1), want.astype(jnp.float32).reshape(-1)
        return float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want))

    return max(one(*pair) for pair in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True))


def to_float32(tree: Any) -> Any:
    """Cast the bfloat16 arrays of a pytree to float32; others, such as packed weights, stay as they are."""
    return jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, tree)
