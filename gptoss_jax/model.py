"""The gpt-oss model: a transformer whose layers alternate sliding and full attention, each followed by experts.

Shapes are named by suffix: B batch, T tokens, D hidden, H query heads, K key/value heads, C head_dim, E experts,
k experts of a token, V vocabulary.
"""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from gptoss_jax.config import ModelConfig, RopeConfig
from gptoss_jax.kv_cache import KeyValues, WholeSequence
from gptoss_jax.placement import partition_for
from gptoss_jax.weights import Creator, WeightSpec
from pallas_kernels.mxfp4_matmul import expert_mlp
from sharding import Partition, constrain, lookup, on_shards, run_experts

RESIDUAL = ("batch", None, "hidden")
"""Logical axes of the residual stream [B, T, D]."""


def linear(x: jax.Array, weight_OI: jax.Array, bias_O: jax.Array | None = None) -> jax.Array:
    """x [..., I] times the transposed weight, plus the bias; float32, as the sums are."""
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    y = jnp.einsum("...i,oi->...o", x, weight_OI, precision=precision, preferred_element_type=jnp.float32)
    return y if bias_O is None else y + bias_O.astype(jnp.float32)


def rope_frequencies(rope: RopeConfig, head_dim: int) -> tuple[jax.Array, float]:
    """Inverse frequencies float32 [head_dim / 2], and the factor on cos and sin.

    YaRN (arXiv:2309.00071, sections 3.2-3.4): dimensions that turn more than `beta_fast` times within the
    original context keep their frequency, those under `beta_slow` are slowed by `factor`, between is a ramp.
    """
    exponent = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    frequency = 1.0 / rope.theta**exponent
    if rope.rope_type == "default":
        return frequency, 1.0

    def dimension_that_turns(times: float) -> float:
        wavelengths = rope.original_max_position_embeddings / (times * 2 * math.pi)
        return head_dim * math.log(wavelengths) / (2 * math.log(rope.theta))

    low, high = dimension_that_turns(rope.beta_fast), dimension_that_turns(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = (jnp.arange(head_dim // 2, dtype=jnp.float32) - low) / max(high - low, 0.001)
    slowed = jnp.clip(ramp, 0, 1)
    concentration = rope.attention_factor
    if concentration is None:
        concentration = 0.1 * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0
    return frequency * (1 - slowed) + frequency / rope.factor * slowed, concentration


def rotate(x_BTHC: jax.Array, positions_BT: jax.Array, rope: RopeConfig) -> jax.Array:
    """Rotary embedding in float32 on the two halves of head_dim; exact positions, no table to outgrow."""
    frequency, concentration = rope_frequencies(rope, x_BTHC.shape[-1])
    angle = positions_BT.astype(jnp.float32)[..., None, None] * frequency
    cos, sin = jnp.cos(angle) * concentration, jnp.sin(angle) * concentration
    first, second = jnp.split(x_BTHC.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def choose_experts(router_NE: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The k likeliest experts int32 [N, k] of each token, and their weights: a softmax over these k alone."""
    top_Nk, ids_Nk = lax.top_k(router_NE, k)
    return ids_Nk, jax.nn.softmax(top_Nk, axis=-1)


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * weight, in float32, cast back."""

    def __init__(self, config: ModelConfig, name: str, create: Creator) -> None:
        self.eps = config.rms_norm_eps
        spec = WeightSpec(f"{name}.weight", (config.hidden_size,), ("hidden",), init="ones")
        self.weight = nnx.Param(create(spec))

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., D] -> [..., D]."""
        x32 = x.astype(jnp.float32)
        scale = lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        return (x32 * scale * self.weight[...].astype(jnp.float32)).astype(x.dtype)


class Projection(nnx.Module):
    """A linear layer with bias."""

    def __init__(
        self, name: str, create: Creator, outputs: int, inputs: int, axes: tuple[str | None, str | None]
    ) -> None:
        self.weight = nnx.Param(create(WeightSpec(f"{name}.weight", (outputs, inputs), axes)))
        self.bias = nnx.Param(create(WeightSpec(f"{name}.bias", (outputs,), axes[:1], init="zeros")))

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., inputs] -> float32 [..., outputs]."""
        return linear(x, self.weight[...], self.bias[...])


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions and a sink in every head."""

    def __init__(self, config: ModelConfig, layer: int, create: Creator) -> None:
        self.config, self.layer = config, layer
        name = f"model.layers.{layer}.self_attn"
        hidden, width = config.hidden_size, config.head_dim
        queries, keys = config.num_attention_heads * width, config.num_key_value_heads * width
        self.q_proj = Projection(f"{name}.q_proj", create, queries, hidden, ("heads", "hidden"))
        self.k_proj = Projection(f"{name}.k_proj", create, keys, hidden, ("kv_heads", "hidden"))
        self.v_proj = Projection(f"{name}.v_proj", create, keys, hidden, ("kv_heads", "hidden"))
        self.o_proj = Projection(f"{name}.o_proj", create, hidden, queries, ("hidden", "heads"))
        sinks = WeightSpec(f"{name}.sinks", (config.num_attention_heads,), ("heads",))
        self.sinks = nnx.Param(create(sinks))

    def __call__[KV: KeyValues](self, x_BTD: jax.Array, positions_BT: jax.Array, kv: KV) -> tuple[jax.Array, KV]:
        """[B, T, D] -> [B, T, D], and the keys and values with this layer's added."""
        heads = (*x_BTD.shape[:2], -1, self.config.head_dim)
        q_BTHC = rotate(self.q_proj(x_BTD).reshape(heads), positions_BT, self.config.rope)
        k_BTKC = rotate(self.k_proj(x_BTD).reshape(heads), positions_BT, self.config.rope)
        v_BTKC = self.v_proj(x_BTD).reshape(heads)
        out_BTHC, kv = kv.attend(
            self.layer,
            q_BTHC.astype(x_BTD.dtype),
            k_BTKC.astype(x_BTD.dtype),
            v_BTKC.astype(x_BTD.dtype),
            self.sinks[...],
            positions_BT,
            self.config.window(self.layer),
        )
        return self.o_proj(out_BTHC.reshape(*x_BTD.shape[:2], -1)).astype(x_BTD.dtype), kv


class MoE(nnx.Module):
    """A router that picks k experts a token, and the experts: clamped SwiGLU MLPs in packed MXFP4."""

    def __init__(self, config: ModelConfig, layer: int, create: Creator) -> None:
        self.config = config
        name = f"model.layers.{layer}.mlp"
        experts, hidden, inner = config.num_local_experts, config.hidden_size, config.intermediate_size
        packed = config.quantization == "mxfp4"
        self.router = Projection(f"{name}.router", create, experts, hidden, (None, "hidden"))

        def parameter(suffix: str, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> nnx.Param:
            full_name = f"{name}.experts.{suffix}"
            if suffix.endswith("bias"):
                return nnx.Param(create(WeightSpec(full_name, shape, axes, init="zeros")))
            return nnx.Param(create(WeightSpec(full_name, shape, axes, packed=packed)))

        self.gate_up_proj = parameter(
            "gate_up_proj", (experts, 2 * inner, hidden), ("experts", "expert_gate_up", "hidden")
        )
        self.gate_up_proj_bias = parameter(
            "gate_up_proj_bias", (experts, 2 * inner), ("experts", "expert_gate_up")
        )
        self.down_proj = parameter(
            "down_proj", (experts, hidden, inner), ("experts", "hidden", "expert_intermediate")
        )
        self.down_proj_bias = parameter("down_proj_bias", (experts, hidden), ("experts", "hidden"))

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """[B, T, D] -> [B, T, D]; the router in float32, its softmax over the chosen experts only."""
        x_ND = x_BTD.reshape(-1, x_BTD.shape[-1])
        router_NE = linear(
            x_ND.astype(jnp.float32),
            self.router.weight[...].astype(jnp.float32),
            self.router.bias[...],
        )
        ids_Nk, weights_Nk = on_shards(
            partial(choose_experts, k=self.config.num_experts_per_tok),
            {"router_NE": (router_NE, ("batch", None))},
            (("batch", None), ("batch", None)),
            batch=len(x_ND),
        )
        y_ND = run_experts(
            partial(expert_mlp, swiglu_limit=self.config.swiglu_limit),
            x_ND,
            ids_Nk,
            weights_Nk,
            self.gate_up_proj.get_value(),
            self.gate_up_proj_bias[...],
            self.down_proj.get_value(),
            self.down_proj_bias[...],
        )
        return y_ND.reshape(x_BTD.shape)


class Block(nnx.Module):
    """Attention and experts, each on the normed residual stream and added to it."""

    def __init__(self, config: ModelConfig, layer: int, create: Creator) -> None:
        name = f"model.layers.{layer}"
        self.input_layernorm = RMSNorm(config, f"{name}.input_layernorm", create)
        self.self_attn = Attention(config, layer, create)
        self.post_attention_layernorm = RMSNorm(config, f"{name}.post_attention_layernorm", create)
        self.mlp = MoE(config, layer, create)

    def __call__[KV: KeyValues](self, x_BTD: jax.Array, positions_BT: jax.Array, kv: KV) -> tuple[jax.Array, KV]:
        """[B, T, D] -> [B, T, D], and the keys and values with this layer's added."""
        attended_BTD, kv = self.self_attn(self.input_layernorm(x_BTD), positions_BT, kv)
        x_BTD = constrain(x_BTD + attended_BTD, RESIDUAL)
        return constrain(x_BTD + self.mlp(self.post_attention_layernorm(x_BTD)), RESIDUAL), kv


class GptOss(nnx.Module):
    """The whole model.

    `create` makes each weight from its definition: see `gptoss_jax.weights`. `partition` is the mesh that the weights
    lie on; None is one device.
    """

    def __init__(self, config: ModelConfig, create: Creator, partition: Partition | None = None) -> None:
        self.config = config
        self.partition = partition or partition_for(config)
        table = (config.vocab_size, config.hidden_size)
        self.embed_tokens = nnx.Param(create(WeightSpec("model.embed_tokens.weight", table, ("vocab", "hidden"))))
        self.layers = nnx.List([Block(config, i, create) for i in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config, "model.norm", create)
        self.lm_head = nnx.Param(create(WeightSpec("lm_head.weight", table, ("vocab", "hidden"))))

    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        """Tokens int32 [B, T] -> logits float32 [B, T, V], positions from 0."""
        positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1], dtype=jnp.int32), tokens_BT.shape)
        x_BTD, _ = self.hidden(tokens_BT, positions_BT, WholeSequence())
        return self.unembed(x_BTD)

    def hidden[KV: KeyValues](self, tokens_BT: jax.Array, positions_BT: jax.Array, kv: KV) -> tuple[jax.Array, KV]:
        """The normed last hidden state [B, T, D] of tokens at given positions, and the keys and values after."""
        with self.partition.active():
            x_BTD = self.embed(tokens_BT)
            for layer in self.layers:
                x_BTD, kv = layer(x_BTD, positions_BT, kv)
            return self.norm(x_BTD), kv

    def embed(self, tokens_BT: jax.Array) -> jax.Array:
        """Tokens int32 [B, T] -> [B, T, D]."""
        with self.partition.active():
            return constrain(lookup(self.embed_tokens[...], tokens_BT), RESIDUAL)

    def unembed(self, x: jax.Array) -> jax.Array:
        """Hidden states [B, ..., D] -> logits float32 [B, ..., V]."""
        inner = (None,) * (x.ndim - 2)
        with self.partition.active():
            x = constrain(x, ("samples", *inner, "hidden"))
            return constrain(linear(x, self.lm_head[...]), ("samples", *inner, "vocab"))


def weight_specs(config: ModelConfig) -> list[WeightSpec]:
    """The definition of every weight of a model, in the order in which it asks for them."""
    specs: list[WeightSpec] = []

    def record(spec: WeightSpec) -> jax.Array:
        specs.append(spec)
        return jax.ShapeDtypeStruct(spec.shape, jnp.float32)  # type: ignore[return-value]

    GptOss(config, record)
    return specs
