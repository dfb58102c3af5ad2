"""The rotary op on NVIDIA GPUs for one new token a sequence: one small kernel instead of five."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jax.typing import DTypeLike

from pallas_kernels.rotary import reference


def rotate_and_keep(
    q_BTHD: jax.Array,
    k_BTKD: jax.Array,
    v_BTKD: jax.Array,
    positions_BT: jax.Array,
    frequencies_F: jax.Array,
    kv_BSKE: jax.Array,
    kv_positions_BS: jax.Array,
    *,
    concentration: float,
    out_dtype: DTypeLike,
    interpret: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See `pallas_kernels.rotary.rotate_and_keep`."""
    batch, length, heads, head_dim = q_BTHD.shape
    kv_heads = k_BTKD.shape[2]
    if length != 1:
        # Of many tokens the fused plain JAX is as quick.
        return reference.rotate_and_keep(
            q_BTHD,
            k_BTKD,
            v_BTKD,
            positions_BT,
            frequencies_F,
            kv_BSKE,
            kv_positions_BS,
            concentration=concentration,
            out_dtype=out_dtype,
        )
    if head_dim & (head_dim - 1):
        raise NotImplementedError(f"head_dim {head_dim} is not a power of two")
    q_BHD, kv, kv_positions = pl.pallas_call(
        functools.partial(_kernel, group=heads // kv_heads, concentration=concentration),
        grid=(kv_heads, batch),
        out_shape=[
            jax.ShapeDtypeStruct((batch, heads, head_dim), out_dtype),
            jax.ShapeDtypeStruct(kv_BSKE.shape, kv_BSKE.dtype),
            jax.ShapeDtypeStruct(kv_positions_BS.shape, jnp.int32),
        ],
        input_output_aliases={5: 1, 6: 2},
        compiler_params=plt.CompilerParams(num_warps=1, num_stages=1),
        interpret=interpret,
        name="rotate_and_keep",
    )(q_BTHD[:, 0], k_BTKD[:, 0], v_BTKD[:, 0], positions_BT[:, 0], frequencies_F, kv_BSKE, kv_positions_BS)
    return q_BHD[:, None], kv, kv_positions


def _kernel(
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    positions_ref: Any,
    frequencies_ref: Any,
    _kv_in_ref: Any,
    _kv_positions_in_ref: Any,
    out_ref: Any,
    kv_ref: Any,
    kv_positions_ref: Any,
    *,
    group: int,
    concentration: float,
) -> None:
    kv_head, sequence = pl.program_id(0), pl.program_id(1)
    head_dim = q_ref.shape[-1]
    half = head_dim // 2
    position = positions_ref[sequence]
    angle = position.astype(jnp.float32) * frequencies_ref[:]
    cos, sin = jnp.cos(angle) * concentration, jnp.sin(angle) * concentration
    low, high = jnp.arange(half), half + jnp.arange(half)
    head = kv_head * group + jnp.arange(pl.next_power_of_2(group))
    here = jnp.broadcast_to((head < (kv_head + 1) * group)[:, None], (head.shape[0], half))
    # Padding points past the end, where the interpreter drops its masked stores.
    head = jnp.where(head < (kv_head + 1) * group, head, q_ref.shape[1])[:, None]
    first = plt.load(q_ref.at[sequence, head, low[None, :]], mask=here, other=0.0).astype(jnp.float32)
    second = plt.load(q_ref.at[sequence, head, high[None, :]], mask=here, other=0.0).astype(jnp.float32)
    dtype = out_ref.dtype
    plt.store(out_ref.at[sequence, head, low[None, :]], (first * cos - second * sin).astype(dtype), mask=here)
    plt.store(out_ref.at[sequence, head, high[None, :]], (second * cos + first * sin).astype(dtype), mask=here)

    @pl.when(position >= 0)
    def _() -> None:
        slot = position % kv_positions_ref.shape[1]
        first = k_ref[sequence, kv_head, pl.ds(0, half)].astype(jnp.float32)
        second = k_ref[sequence, kv_head, pl.ds(half, half)].astype(jnp.float32)
        kv_ref[sequence, slot, kv_head, pl.ds(0, half)] = (first * cos - second * sin).astype(kv_ref.dtype)
        kv_ref[sequence, slot, kv_head, pl.ds(half, half)] = (second * cos + first * sin).astype(kv_ref.dtype)
        value = v_ref[sequence, kv_head, pl.ds(0, head_dim)]
        kv_ref[sequence, slot, kv_head, pl.ds(head_dim, head_dim)] = value.astype(kv_ref.dtype)

        @pl.when(kv_head == 0)
        def _() -> None:
            kv_positions_ref[sequence, slot] = position
