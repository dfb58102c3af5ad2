"""The reference of the expert op, in plain JAX: sparse over experts, unpacking one expert at a time."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from pallas_kernels.mxfp4_matmul.format import MXFP4Tensor, dequantize
from pallas_kernels.mxfp4_matmul.gpu_layout import GpuExperts
from pallas_kernels.mxfp4_matmul.tpu_layout import TpuExperts

ExpertWeight = jax.Array | MXFP4Tensor | GpuExperts | TpuExperts
SWIGLU_ALPHA = 1.702


def expert_mlp(
    x_TD: jax.Array,
    expert_ids_Tk: jax.Array,
    expert_weights_Tk: jax.Array,
    gate_up_EFD: ExpertWeight,
    gate_up_bias_EF: jax.Array,
    down_EDI: ExpertWeight,
    down_bias_ED: jax.Array,
    *,
    swiglu_limit: float,
    residual_TD: jax.Array | None = None,
    out_dtype: DTypeLike | None = None,
) -> jax.Array:
    """Defines `pallas_kernels.mxfp4_matmul.expert_mlp`; see there.

    Rows are sorted by expert and split into tiles of a single expert each. A scan over the tiles unpacks only that
    expert, so the unpacked weights of at most one expert are in memory.
    """
    num_experts = gate_up_bias_EF.shape[0]
    num_tokens, k = expert_ids_Tk.shape
    rows = num_tokens * k
    tile_rows, num_tiles = tiling(rows, num_experts)

    ids_R = expert_ids_Tk.reshape(rows)
    order_R = jnp.argsort(ids_R, stable=True)
    counts_E = jnp.bincount(ids_R, length=num_experts)
    starts_E = jnp.cumsum(counts_E) - counts_E
    tiles_E = -(-counts_E // tile_rows)
    tile_ends_E = jnp.cumsum(tiles_E)
    first_tile_E = tile_ends_E - tiles_E

    def tile(_: None, index: jax.Array) -> tuple[None, jax.Array]:
        expert = jnp.minimum(jnp.searchsorted(tile_ends_E, index, side="right"), num_experts - 1)
        offset_B = (index - first_tile_E[expert]) * tile_rows + jnp.arange(tile_rows)
        row_B = order_R[jnp.minimum(starts_E[expert] + offset_B, rows - 1)]

        def compute() -> jax.Array:
            gate_up = _linear(x_TD[row_B // k], gate_up_EFD, gate_up_bias_EF, expert)
            hidden = clamped_swiglu(gate_up, swiglu_limit).astype(x_TD.dtype)
            return _linear(hidden, down_EDI, down_bias_ED, expert)

        empty = jnp.zeros((tile_rows, x_TD.shape[1]), jnp.float32)
        return None, lax.cond(index < tile_ends_E[-1], compute, lambda: empty)

    _, out_NBD = lax.scan(tile, None, jnp.arange(num_tiles))
    # Gathering each token's rows keeps its sum over experts independent of the other tokens.
    rank_R = jnp.zeros(rows, order_R.dtype).at[order_R].set(jnp.arange(rows, dtype=order_R.dtype))
    here_R = ids_R < num_experts
    expert_R = jnp.minimum(ids_R, num_experts - 1)
    slot_R = first_tile_E[expert_R] * tile_rows + rank_R - starts_E[expert_R]
    out_RD = out_NBD.reshape(num_tiles * tile_rows, -1)[jnp.where(here_R, slot_R, 0)]
    out_TkD = jnp.where(here_R[:, None], out_RD, 0).reshape(num_tokens, k, -1)
    out_TD = jnp.sum(out_TkD * expert_weights_Tk[..., None].astype(jnp.float32), axis=1)
    if residual_TD is not None:
        out_TD += residual_TD.astype(jnp.float32)
    return out_TD.astype(out_dtype or x_TD.dtype)


def tiling(rows: int, num_experts: int) -> tuple[int, int]:
    """Rows per tile, and the most tiles that any routing of `rows` over `num_experts` needs."""
    tile_rows = 1
    while tile_rows * num_experts < rows and tile_rows < 128:
        tile_rows *= 2
    occupied = min(num_experts, rows)
    return tile_rows, (rows - occupied) // tile_rows + occupied


def clamped_swiglu(gate_up: jax.Array, limit: float) -> jax.Array:
    """[..., 2I] with gate at even and up at odd indices -> [..., I], float32.

    The gate is clamped above only; from `swiglu` in openai/gpt-oss `gpt_oss/torch/model.py`.
    """
    gate = jnp.minimum(gate_up[..., 0::2], limit)
    up = jnp.clip(gate_up[..., 1::2], -limit, limit)
    return gate * jax.nn.sigmoid(SWIGLU_ALPHA * gate) * (up + 1)


def _linear(x_BK: jax.Array, weight: ExpertWeight, bias_EN: jax.Array, expert: jax.Array) -> jax.Array:
    """x @ weight[expert].T + bias[expert] in float32."""
    own = weight[expert]
    weight_NK = dequantize(own, x_BK.dtype) if isinstance(own, MXFP4Tensor) else own.astype(x_BK.dtype)
    product_BN = jnp.einsum(
        "bk,nk->bn",
        x_BK,
        weight_NK,
        precision=lax.Precision.HIGHEST if x_BK.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )
    return product_BN + bias_EN[expert].astype(jnp.float32)
