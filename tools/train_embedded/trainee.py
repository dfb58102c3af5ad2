"""The project's model adapted for training: packed rows, dense experts, and weights rounded as when saved."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from gptoss_jax.model.config import ModelConfig
from gptoss_jax.model.gpt_oss import GptOss, MoE, weight_specs
from gptoss_jax.model.kv_cache import Rotation
from gptoss_jax.model.mxfp4 import MXFP4Tensor, dequantize, quantize
from gptoss_jax.model.weights import Creator, Weight, WeightSpec, random_creator
from pallas_kernels.linear.reference import rms_norm
from pallas_kernels.mxfp4_matmul.reference import clamped_swiglu
from pallas_kernels.rotary import rotate

Parameters = dict[str, jax.Array]
"""Float32 master weights by name; the experts' matrices are unpacked."""


class PackedRows(NamedTuple):
    """Attention within each conversation of packed rows [B, T]; see gptoss_jax.model.kv_cache.KeyValues."""

    segments_BT: jax.Array

    def attend(
        self,
        layer: int,
        q_BTHD: jax.Array,
        k_BTKD: jax.Array,
        v_BTKD: jax.Array,
        sinks_H: jax.Array,
        positions_BT: jax.Array,
        rotation: Rotation,
        window: int | None,
        dtype: DTypeLike,
    ) -> tuple[jax.Array, PackedRows]:
        """Attention as in `pallas_kernels.attention`, masked between conversations; positions only rotate."""
        q_BTHD, k_BTKD = (rotate(x, positions_BT, *rotation).astype(dtype) for x in (q_BTHD, k_BTKD))
        places_BT = jnp.broadcast_to(jnp.arange(q_BTHD.shape[1]), positions_BT.shape)
        rows = (q_BTHD, k_BTKD, v_BTKD.astype(dtype), places_BT, self.segments_BT)
        if window is not None and q_BTHD.shape[1] > 2 * window:
            out = _attend(*_query_blocks(rows, window), sinks_H=sinks_H, window=window)
            return out.reshape(q_BTHD.shape[0], -1, *q_BTHD.shape[2:])[:, : q_BTHD.shape[1]], self
        q, k, v, places, segments = rows
        return _attend(q, k, v, places, places, segments, segments, sinks_H=sinks_H, window=window), self


def _query_blocks(rows: tuple[jax.Array, ...], window: int) -> tuple[jax.Array, ...]:
    """Queries in blocks of a window, each with the keys of its block and the previous one, which cover the window.

    Requires rows filled from the left. Blocks are folded into the batch dimension.
    """
    padding = -rows[0].shape[1] % window
    q, k, v, places, segments = (
        jnp.pad(x, ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2)).reshape(x.shape[0], -1, window, *x.shape[2:])
        for x in rows
    )

    def with_previous(x: jax.Array) -> jax.Array:
        before = jnp.pad(x[:, :-1], ((0, 0), (1, 0)) + ((0, 0),) * (x.ndim - 2))
        return jnp.concatenate([before, x], axis=2)

    blocks = (q, with_previous(k), with_previous(v), places, with_previous(places), segments,
              with_previous(segments))  # fmt: skip
    return tuple(x.reshape(-1, *x.shape[2:]) for x in blocks)


def _attend(
    q_BTHD: jax.Array,
    k_BSKD: jax.Array,
    v_BSKD: jax.Array,
    q_places_BT: jax.Array,
    k_places_BS: jax.Array,
    q_segments_BT: jax.Array,
    k_segments_BS: jax.Array,
    *,
    sinks_H: jax.Array,
    window: int | None,
) -> jax.Array:
    batch, length, heads, width = q_BTHD.shape
    kv_heads = k_BSKD.shape[2]
    q_BTKGD = (q_BTHD * width**-0.5).reshape(batch, length, kv_heads, heads // kv_heads, width)
    scores_BKGTS = jnp.einsum("btkgd,bskd->bkgts", q_BTKGD, k_BSKD, preferred_element_type=jnp.float32)
    distance_BTS = q_places_BT[:, :, None] - k_places_BS[:, None, :]
    seen_BTS = (q_segments_BT[:, :, None] == k_segments_BS[:, None, :]) & (distance_BTS >= 0)
    if window is not None:
        seen_BTS &= distance_BTS < window
    scores_BKGTS = jnp.where(seen_BTS[:, None, None], scores_BKGTS, -1e9)
    sinks_KG11 = sinks_H.astype(jnp.float32).reshape(kv_heads, -1, 1, 1)
    largest = jax.lax.stop_gradient(jnp.maximum(scores_BKGTS.max(-1, keepdims=True), sinks_KG11))
    weights_BKGTS = jnp.exp(scores_BKGTS - largest)
    denominator = weights_BKGTS.sum(-1, keepdims=True) + jnp.exp(sinks_KG11 - largest)
    weights_BKGTS = (weights_BKGTS / denominator).astype(v_BSKD.dtype)
    return jnp.einsum("bkgts,bskd->btkgd", weights_BKGTS, v_BSKD).reshape(q_BTHD.shape)


class DenseMoE(MoE):
    """Applies every expert to every token, with weight 0 for those not chosen, which avoids gathering and sorting.

    `balance` holds the load-balancing loss of the last call (arXiv:2101.03961, equation 4), which is 1 for an even
    distribution.
    """

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """[B, T, D] -> [B, T, D] with the experts' output added."""
        residual_BTD, x_BTD = x_BTD, rms_norm(x_BTD, self.norm[...], self.config.rms_norm_eps)
        experts, k = self.config.num_local_experts, self.config.num_experts_per_tok
        weight_ED = self.router.weight[...].astype(jnp.float32)
        logits_BTE = x_BTD.astype(jnp.float32) @ weight_ED.T + self.router.bias[...].astype(jnp.float32)
        top_BTk, ids_BTk = jax.lax.top_k(logits_BTE, k)
        chosen_BTkE = jax.nn.one_hot(ids_BTk, experts, dtype=jnp.float32)
        weights_BTE = jnp.einsum("btk,btke->bte", jax.nn.softmax(top_BTk, axis=-1), chosen_BTkE)
        share_E = chosen_BTkE.mean((0, 1, 2))
        self.balance = nnx.Variable(experts * jnp.sum(share_E * jax.nn.softmax(logits_BTE).mean((0, 1))))

        gate_up_BTEF = jnp.einsum("btd,efd->btef", x_BTD, self.gate_up_proj[...])
        gate_up_BTEF = gate_up_BTEF.astype(jnp.float32) + self.gate_up_proj_bias[...].astype(jnp.float32)
        inner_BTEI = clamped_swiglu(gate_up_BTEF, self.config.swiglu_limit) * weights_BTE[..., None]
        y_BTD = jnp.einsum(
            "btei,edi->btd",
            inner_BTEI.astype(x_BTD.dtype),
            self.down_proj[...],
            preferred_element_type=jnp.float32,
        )
        bias_ED = self.down_proj_bias[...].astype(jnp.float32)
        return residual_BTD + (y_BTD + weights_BTE @ bias_ED).astype(x_BTD.dtype)


class Trainee(GptOss):
    """GptOss with experts and an embedding whose gradients are matrix products."""

    def __init__(self, config: ModelConfig, create: Creator) -> None:
        super().__init__(config, create)
        for index, layer in enumerate(self.layers):
            layer.mlp = DenseMoE(config, index, create)

    def embed(self, tokens_BT: jax.Array) -> jax.Array:
        """Embed tokens by a matrix product, whose gradient sums a row's tokens in float32 instead of bfloat16."""
        table = self.embed_tokens[...]
        return jax.nn.one_hot(tokens_BT, table.shape[0], dtype=table.dtype) @ table

    def balance(self) -> jax.Array:
        """The mean load-balancing loss of the layers in the last call."""
        experts = [layer.mlp for layer in self.layers if isinstance(layer.mlp, DenseMoE)]
        return jnp.mean(jnp.stack([moe.balance[...] for moe in experts]))


def packed_names(config: ModelConfig) -> frozenset[str]:
    """The weights that are stored as MXFP4."""
    return frozenset(spec.name for spec in weight_specs(config) if spec.packed)


def initial_parameters(config: ModelConfig, seed: int) -> Parameters:
    """Random master weights: small where they add to the residual stream, so that depth does not scale it."""
    draw = random_creator(jax.random.key(seed), jnp.float32)
    depth = (2 * config.num_hidden_layers) ** -0.5
    parameters: Parameters = {}
    for spec in weight_specs(config):
        weight = draw(WeightSpec(spec.name, spec.shape, spec.axes, spec.init))
        assert isinstance(weight, jax.Array)
        residual = spec.name.endswith(("o_proj.weight", "down_proj"))
        parameters[spec.name] = weight * depth if residual else weight
    return parameters


def rounding_creator(parameters: Parameters, packed: frozenset[str]) -> Creator:
    """Weights rounded as when saved, in bfloat16; gradients pass straight through the rounding."""

    def create(spec: WeightSpec) -> Weight:
        weight = parameters[spec.name]
        if spec.name in packed:
            rounded = dequantize(quantize(weight))
            # The difference is exactly 0 and carries the gradient.
            weight = jax.lax.stop_gradient(rounded) + (weight - jax.lax.stop_gradient(weight))
        return weight.astype(jnp.bfloat16)

    return create


def saving_creator(parameters: Parameters) -> Creator:
    """Weights to save: MXFP4 if the spec is packed, else bfloat16."""

    def create(spec: WeightSpec) -> jax.Array | MXFP4Tensor:
        weight = parameters[spec.name]
        return quantize(weight) if spec.packed else weight.astype(jnp.bfloat16)

    return create
