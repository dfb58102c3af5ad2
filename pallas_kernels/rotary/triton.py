"""The rotary op on NVIDIA GPUs as one small kernel instead of five."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jax.typing import DTypeLike

from pallas_kernels import gpu
from pallas_kernels.rotary.reference import to_cache_dtype


def rotate_and_store(
    q_THD: jax.Array,
    k_TKD: jax.Array,
    v_TKD: jax.Array,
    positions_T: jax.Array,
    frequencies_F: jax.Array,
    kv_pages_PSKE: jax.Array,
    pages_T: jax.Array,
    slots_T: jax.Array,
    *,
    concentration: float,
    out_dtype: DTypeLike,
    interpret: bool,
) -> tuple[jax.Array, jax.Array]:
    """See `pallas_kernels.rotary.rotate_and_store`."""
    tokens, heads, head_dim = q_THD.shape
    kv_heads = k_TKD.shape[1]
    if head_dim & (head_dim - 1):
        raise NotImplementedError(f"head_dim {head_dim} is not a power of two")
    if not interpret:
        gpu.check_converts(kv_pages_PSKE.dtype)
        gpu.check_indexes(kv_pages_PSKE)
    q_out_THD, kv_pages = pl.pallas_call(
        functools.partial(_kernel, group=heads // kv_heads, concentration=concentration),
        grid=(kv_heads, tokens),
        out_shape=[
            jax.ShapeDtypeStruct((tokens, heads, head_dim), out_dtype),
            jax.ShapeDtypeStruct(kv_pages_PSKE.shape, kv_pages_PSKE.dtype),
        ],
        input_output_aliases={7: 1},
        compiler_params=plt.CompilerParams(num_warps=1, num_stages=1),
        interpret=interpret,
        name="rotate_and_store",
    )(q_THD, k_TKD, v_TKD, positions_T, pages_T, slots_T, frequencies_F, kv_pages_PSKE)
    return q_out_THD, kv_pages


def _kernel(
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    positions_ref: Any,
    pages_ref: Any,
    slots_ref: Any,
    frequencies_ref: Any,
    _kv_in_ref: Any,
    out_ref: Any,
    kv_ref: Any,
    *,
    group: int,
    concentration: float,
) -> None:
    kv_head, token = pl.program_id(0), pl.program_id(1)
    head_dim = q_ref.shape[-1]
    half = head_dim // 2
    angle = positions_ref[token].astype(jnp.float32) * frequencies_ref[:]
    cos, sin = jnp.cos(angle) * concentration, jnp.sin(angle) * concentration
    low, high = jnp.arange(half), half + jnp.arange(half)
    head = kv_head * group + jnp.arange(pl.next_power_of_2(group))
    here = jnp.broadcast_to((head < (kv_head + 1) * group)[:, None], (head.shape[0], half))
    # Padding heads get an index past the end: the interpreter drops out-of-bounds stores.
    head = jnp.where(head < (kv_head + 1) * group, head, q_ref.shape[1])[:, None]
    first = plt.load(q_ref.at[token, head, low[None, :]], mask=here, other=0.0).astype(jnp.float32)
    second = plt.load(q_ref.at[token, head, high[None, :]], mask=here, other=0.0).astype(jnp.float32)
    dtype = out_ref.dtype
    plt.store(out_ref.at[token, head, low[None, :]], (first * cos - second * sin).astype(dtype), mask=here)
    plt.store(out_ref.at[token, head, high[None, :]], (second * cos + first * sin).astype(dtype), mask=here)

    page, slot = pages_ref[token], slots_ref[token]

    @pl.when(page < kv_ref.shape[0])
    def _() -> None:
        first = k_ref[token, kv_head, pl.ds(0, half)].astype(jnp.float32)
        second = k_ref[token, kv_head, pl.ds(half, half)].astype(jnp.float32)
        kv_ref[page, slot, kv_head, pl.ds(0, half)] = to_cache_dtype(first * cos - second * sin, kv_ref.dtype)
        kv_ref[page, slot, kv_head, pl.ds(half, half)] = to_cache_dtype(second * cos + first * sin, kv_ref.dtype)
        value = v_ref[token, kv_head, pl.ds(0, head_dim)]
        kv_ref[page, slot, kv_head, pl.ds(head_dim, head_dim)] = to_cache_dtype(value, kv_ref.dtype)
