"""Many small arrays as one: each array that the host sends costs it more than the bytes in it."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Packed[T]:
    """A pytree of arrays [B, ...] of bools or four-byte numbers, whose bits lie side by side in int32 [B, N]."""

    words: ArrayLike
    treedef: jax.tree_util.PyTreeDef = dataclasses.field(metadata={"static": True})
    layout: tuple[tuple[tuple[int, ...], np.dtype], ...] = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(cls, tree: T) -> Packed[T]:
        """The host's arrays, of which there is at least one."""
        arrays, treedef = jax.tree.flatten(tree)
        words = [_as_words(x).reshape(len(x), -1) for x in arrays]
        return cls(np.concatenate(words, axis=1), treedef, tuple((x.shape, x.dtype) for x in arrays))

    def unpack(self) -> T:
        """The same arrays, where they are computed with."""
        words_BN, arrays, start = jnp.asarray(self.words), [], 0
        for shape, dtype in self.layout:
            stop = start + math.prod(shape[1:])
            own = words_BN[:, start:stop].reshape(shape)
            arrays.append(own != 0 if dtype == np.bool_ else jax.lax.bitcast_convert_type(own, dtype))
            start = stop
        tree: Any = jax.tree.unflatten(self.treedef, arrays)
        return tree


def _as_words(x: np.ndarray) -> np.ndarray:
    return x.astype(np.int32) if x.dtype == np.bool_ else np.ascontiguousarray(x).view(np.int32)
