"""The gpt-oss model: a transformer whose layers alternate sliding and full attention, each followed by experts.

Shapes are named by suffix: B batch, T tokens, D hidden, H query heads, K key/value heads, C head_dim, E experts,
k experts of a token, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from gptoss_jax.model.config import ModelConfig, RopeConfig
from gptoss_jax.model.kv_cache import HEADS, KEYS, QUERIES, KeyValues, Rotation, WholeSequence
from gptoss_jax.model.placement import partition_for
from gptoss_jax.model.weights import Creator, WeightSpec
from gptoss_jax.runtime.xla_options import in_order, may_have_options
from pallas_kernels import dispatch_settings
from pallas_kernels.linear import linear
from pallas_kernels.mxfp4_matmul import expert_mlp
from pallas_kernels.routing import route
from sharding import Partition, constrain, lookup, on_shards, run_experts, sum_over_shards

RESIDUAL = ("batch", None, "hidden")
"""Logical axes of the residual stream [B, T, D]."""

TOKENS = ("batch", None, None)
"""Logical axes of the residual stream as an op's argument, which needs the whole hidden dimension."""


def rope_frequencies(rope: RopeConfig, head_dim: int) -> tuple[jax.Array, float]:
    """Frequencies float32 [head_dim / 2] in radians per position, and the factor on cos and sin.

    YaRN (arXiv:2309.00071, sections 3.2-3.4): dimensions that turn more than `beta_fast` times within the original
    context keep their frequency, those that turn fewer than `beta_slow` times have it divided by `factor`, and
    dimensions in between are interpolated linearly.
    """
    exponent = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    frequency = 1.0 / rope.theta**exponent
    if rope.rope_type == "default":
        return frequency, 1.0

    low, high = rope.correction_range(head_dim)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = (jnp.arange(head_dim // 2, dtype=jnp.float32) - low) / max(high - low, 0.001)
    slowed = jnp.clip(ramp, 0, 1)
    concentration = rope.attention_factor
    if concentration is None:
        concentration = 0.1 * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0
    return frequency * (1 - slowed) + frequency / rope.factor * slowed, concentration


def norm_weight(config: ModelConfig, name: str, create: Creator) -> nnx.Param:
    """The weight [D] of an RMSNorm; the norm itself is fused into the op that follows it."""
    return nnx.Param(create(WeightSpec(f"{name}.weight", (config.hidden_size,), ("hidden",), init="ones")))


class Projection(nnx.Module):
    """The weight [outputs, inputs] and bias [outputs] of a linear layer."""

    def __init__(
        self, name: str, create: Creator, outputs: int, inputs: int, axes: tuple[str | None, str | None]
    ) -> None:
        self.weight = nnx.Param(create(WeightSpec(f"{name}.weight", (outputs, inputs), axes)))
        self.bias = nnx.Param(create(WeightSpec(f"{name}.bias", (outputs,), axes[:1], init="zeros")))


def project_heads(
    x_BTD: jax.Array,
    norm_D: jax.Array,
    weights_OD: tuple[jax.Array, ...],
    biases_O: tuple[jax.Array, ...],
    *,
    eps: float,
    head_dim: int,
) -> tuple[jax.Array, ...]:
    """RMSNorm, then one linear layer per weight: heads float32 [B, T, O / C, C] for each weight [O, D]."""
    x_ND = x_BTD.reshape(-1, x_BTD.shape[-1])
    outs_NO = linear(x_ND, weights_OD, biases_O, norm_I=norm_D, eps=eps)
    return tuple(y_NO.reshape(*x_BTD.shape[:2], -1, head_dim) for y_NO in outs_NO)


def project_back(
    heads_BTHC: jax.Array,
    weight_DI: jax.Array,
    bias_D: jax.Array,
    residual_BTD: jax.Array | None = None,
    *,
    out_dtype: DTypeLike,
) -> jax.Array:
    """Attention's output projection [B, T, H, C] -> [B, T, D], with the residual added if given."""
    heads_NI = heads_BTHC.reshape(-1, weight_DI.shape[1])
    residual_ND = None if residual_BTD is None else residual_BTD.reshape(-1, len(weight_DI))
    (y_ND,) = linear(heads_NI, (weight_DI,), (bias_D,), residual_TO=residual_ND, out_dtype=out_dtype)
    return y_ND.reshape(*heads_BTHC.shape[:2], -1)


class Attention(nnx.Module):
    """Grouped-query attention with rotary embedding and one attention sink per head, preceded by RMSNorm."""

    def __init__(self, config: ModelConfig, layer: int, create: Creator) -> None:
        self.config, self.layer = config, layer
        self.norm = norm_weight(config, f"model.layers.{layer}.input_layernorm", create)
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
        """[B, T, D] -> [B, T, D] with the attention output added, and `kv` with this call's keys and values."""
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q_BTHC, k_BTKC, v_BTKC = on_shards(
            partial(project_heads, eps=self.config.rms_norm_eps, head_dim=self.config.head_dim),
            {
                "x_BTD": (x_BTD, TOKENS),
                "norm_D": (self.norm[...], (None,)),
                "weights_OD": (tuple(p.weight[...] for p in projections), tuple((h, None) for h in HEADS)),
                "biases_O": (tuple(p.bias[...] for p in projections), tuple((h,) for h in HEADS)),
            },
            (QUERIES, KEYS, KEYS),
            batch=len(x_BTD),
        )
        rotation = Rotation(*rope_frequencies(self.config.rope, self.config.head_dim))
        window = self.config.window(self.layer)
        out_BTHC, kv = kv.attend(
            self.layer, q_BTHC, k_BTKC, v_BTKC, self.sinks[...], positions_BT, rotation, window, x_BTD.dtype
        )
        y_BTD = sum_over_shards(
            project_back,
            {
                "heads_BTHC": (out_BTHC, QUERIES),
                "weight_DI": (self.o_proj.weight[...], (None, "heads")),
                "bias_D": (self.o_proj.bias[...], (None,)),
                "residual_BTD": (x_BTD, TOKENS),
            },
            TOKENS,
            batch=len(x_BTD),
            over="heads",
            once=("bias_D",),
            residual="residual_BTD",
        )
        return y_BTD, kv


class MoE(nnx.Module):
    """Mixture of experts, preceded by RMSNorm: a top-k router and clamped SwiGLU experts in packed MXFP4."""

    def __init__(self, config: ModelConfig, layer: int, create: Creator) -> None:
        self.config = config
        self.norm = norm_weight(config, f"model.layers.{layer}.post_attention_layernorm", create)
        name = f"model.layers.{layer}.mlp"
        experts, hidden, inner = config.num_local_experts, config.hidden_size, config.intermediate_size
        packed = config.quantization == "mxfp4"
        self.router = Projection(f"{name}.router", create, experts, hidden, (None, "hidden"))

        def parameter(suffix: str, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> nnx.Param:
            full_name = f"{name}.experts.{suffix}"
            if suffix.endswith("bias"):
                return nnx.Param(create(WeightSpec(full_name, shape, axes, init="zeros")))
            parts = 2 if "expert_gate_up" in axes else 1
            return nnx.Param(create(WeightSpec(full_name, shape, axes, packed=packed, parts=parts)))

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
        """[B, T, D] -> [B, T, D] with the experts' weighted output added."""
        x_ND = x_BTD.reshape(-1, x_BTD.shape[-1])
        rows = ("batch", None)
        normed_ND, ids_Nk, weights_Nk = on_shards(
            partial(route, k=self.config.num_experts_per_tok, eps=self.config.rms_norm_eps),
            {
                "x_TD": (x_ND, rows),
                "norm_D": (self.norm[...], (None,)),
                "weight_ED": (self.router.weight[...], (None, None)),
                "bias_E": (self.router.bias[...], (None,)),
            },
            (rows, rows, rows),
            batch=len(x_BTD),
        )
        y_ND = run_experts(
            partial(expert_mlp, swiglu_limit=self.config.swiglu_limit),
            normed_ND,
            ids_Nk,
            weights_Nk,
            self.gate_up_proj.get_value(),
            self.gate_up_proj_bias[...],
            self.down_proj.get_value(),
            self.down_proj_bias[...],
            residual_TD=x_ND,
        )
        return y_ND.reshape(x_BTD.shape)


class Block(nnx.Module):
    """A transformer layer: attention, then the experts, each added to the residual stream."""

    def __init__(self, config: ModelConfig, layer: int, create: Creator) -> None:
        self.self_attn = Attention(config, layer, create)
        self.mlp = MoE(config, layer, create)

    def __call__[KV: KeyValues](self, x_BTD: jax.Array, positions_BT: jax.Array, kv: KV) -> tuple[jax.Array, KV]:
        """[B, T, D] -> [B, T, D], and `kv` with this layer's keys and values."""
        x_BTD, kv = self.self_attn(x_BTD, positions_BT, kv)
        x_BTD = constrain(x_BTD, RESIDUAL)
        return constrain(self.mlp(x_BTD), RESIDUAL), kv


class GptOss(nnx.Module):
    """The gpt-oss language model.

    `create` makes each weight from its `WeightSpec` (see `gptoss_jax.model.weights`). `partition` holds the mesh and
    the sharding rules; None runs on one device.
    """

    def __init__(self, config: ModelConfig, create: Creator, partition: Partition | None = None) -> None:
        self.config = config
        self.partition = partition or partition_for(config)
        table = (config.vocab_size, config.hidden_size)
        self.embed_tokens = nnx.Param(create(WeightSpec("model.embed_tokens.weight", table, ("vocab", "hidden"))))
        self.layers = nnx.List([Block(config, i, create) for i in range(config.num_hidden_layers)])
        self.norm = norm_weight(config, "model.norm", create)
        self.lm_head = nnx.Param(create(WeightSpec("lm_head.weight", table, ("vocab", "hidden"))))

    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        """Tokens int32 [B, T] -> logits float32 [B, T, V]; positions start at 0.

        Each shape compiles once for all models of the same config and mesh. Inside a caller's transformation, the call
        is traced as part of it. The call is pure: changes to a module's state during the call are discarded.
        """
        options = in_order(self.partition.mesh) if may_have_options() else None
        return _compiled(tuple((options or {}).items()))(self, tokens_BT, dispatch_settings())

    def hidden[KV: KeyValues](self, tokens_BT: jax.Array, positions_BT: jax.Array, kv: KV) -> tuple[jax.Array, KV]:
        """The last hidden state [B, T, D] of tokens int32 [B, T] at these positions, and the updated `kv`."""
        with self.partition.active():
            x_BTD = self.embed(tokens_BT)
            for layer in self.layers:
                x_BTD, kv = layer(x_BTD, positions_BT, kv)
            return x_BTD, kv

    def embed(self, tokens_BT: jax.Array) -> jax.Array:
        """Tokens int32 [B, T] -> [B, T, D]."""
        with self.partition.active():
            return constrain(lookup(self.embed_tokens[...], tokens_BT), RESIDUAL)

    def unembed(self, x: jax.Array) -> jax.Array:
        """Final norm and output projection: hidden states [B, ..., D] -> logits float32 [B, ..., V]."""
        with self.partition.active():
            return unembed(x, self.norm[...], self.lm_head[...], eps=self.config.rms_norm_eps)


def unembed(x: jax.Array, norm_D: jax.Array, weight_VD: jax.Array, *, eps: float) -> jax.Array:
    """RMSNorm and the output projection: hidden states [B, ..., D] -> logits float32 [B, ..., V]."""
    inner = (None,) * (x.ndim - 2)

    def logits(x: jax.Array, norm_D: jax.Array, weight_VD: jax.Array) -> jax.Array:
        (y_NV,) = linear(x.reshape(-1, x.shape[-1]), (weight_VD,), (None,), norm_I=norm_D, eps=eps)
        return y_NV.reshape(*x.shape[:-1], -1)

    args = {
        "x": (x, ("samples", *inner, None)),
        "norm_D": (norm_D, (None,)),
        "weight_VD": (weight_VD, ("vocab", None)),
    }
    return on_shards(logits, args, ("samples", *inner, "vocab"), batch=len(x))


@cache
def _compiled(
    options: tuple[tuple[str, str | bool], ...],
) -> Callable[[GptOss, jax.Array, tuple[str, str | None]], jax.Array]:
    """The jitted function behind `GptOss.__call__`, with these XLA options.

    The weights are arguments, so each call uses their current values and the program keeps no copy. The settings of
    `use_backend` and `platform` change what is traced, so they are a static argument.
    """

    @partial(jax.jit, static_argnames="settings", compiler_options=dict(options) or None)
    def gpt_oss(model: GptOss, tokens_BT: jax.Array, settings: tuple[str, str | None]) -> jax.Array:
        positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1], dtype=jnp.int32), tokens_BT.shape)
        x_BTD, _ = model.hidden(tokens_BT, positions_BT, WholeSequence())
        return model.unembed(x_BTD)

    return gpt_oss


def weight_specs(config: ModelConfig) -> list[WeightSpec]:
    """The specs of all weights of a model, in creation order."""
    specs: list[WeightSpec] = []

    def record(spec: WeightSpec) -> jax.Array:
        specs.append(spec)
        return jax.ShapeDtypeStruct(spec.shape, jnp.float32)  # type: ignore[return-value]

    GptOss(config, record)
    return specs
