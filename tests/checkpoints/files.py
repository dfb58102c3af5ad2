"""Small checkpoints, and functions to pad and shard their weights, shared by several tests."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors.numpy
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from numpy.typing import DTypeLike

from gptoss_jax.checkpoints.layouts import SINGLE_FILE
from gptoss_jax.model.config import ModelConfig
from gptoss_jax.model.weights import WeightSpec

CONFIG = ModelConfig(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    num_local_experts=4,
    num_experts_per_tok=2,
    layer_types=("sliding_attention", "full_attention"),
)
PLAIN_CONFIG = ModelConfig(**{**vars(CONFIG), "quantization": None})
OPENAI_FIELDS = {
    "num_hidden_layers": 2,
    "num_experts": 4,
    "experts_per_token": 2,
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "swiglu_limit": 7.0,
    "head_dim": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "sliding_window": 128,
    "initial_context_length": 4096,
    "rope_theta": 150000,
    "rope_scaling_factor": 32.0,
    "rope_ntk_alpha": 1,
    "rope_ntk_beta": 32,
}


def write_openai(source: Path, directory: Path, norm_dtype: DTypeLike | None = None) -> Path:
    """Write the checkpoint in OpenAI's layout: OpenAI's names, fused q, k and v, and plain experts transposed.

    `norm_dtype`, if given, is the dtype of the norms before attention.
    """
    tensors = safetensors.numpy.load_file(source / SINGLE_FILE)
    renamed = {
        "embedding.weight": tensors["model.embed_tokens.weight"],
        "norm.scale": tensors["model.norm.weight"],
        "unembedding.weight": tensors["lm_head.weight"],
    }
    for i in range(CONFIG.num_hidden_layers):
        layer = f"model.layers.{i}."
        attention, mlp, block = layer + "self_attn.", layer + "mlp.", f"block.{i}."
        for kind in ("weight", "bias"):
            qkv = [tensors[f"{attention}{part}_proj.{kind}"] for part in "qkv"]
            renamed[f"{block}attn.qkv.{kind}"] = np.concatenate(qkv)
            renamed[f"{block}attn.out.{kind}"] = tensors[f"{attention}o_proj.{kind}"]
            renamed[f"{block}mlp.gate.{kind}"] = tensors[f"{mlp}router.{kind}"]
        renamed[f"{block}attn.sinks"] = tensors[attention + "sinks"]
        norm = tensors[layer + "input_layernorm.weight"]
        renamed[f"{block}attn.norm.scale"] = norm if norm_dtype is None else norm.astype(norm_dtype)
        renamed[f"{block}mlp.norm.scale"] = tensors[layer + "post_attention_layernorm.weight"]
        for theirs, ours in (("mlp1", "gate_up_proj"), ("mlp2", "down_proj")):
            name = f"{mlp}experts.{ours}"
            renamed[f"{block}mlp.{theirs}_bias"] = tensors[f"{name}_bias"]
            if name in tensors:
                renamed[f"{block}mlp.{theirs}_weight"] = tensors[name].swapaxes(1, 2).copy()
            else:
                renamed[f"{block}mlp.{theirs}_weight.blocks"] = tensors[f"{name}_blocks"]
                renamed[f"{block}mlp.{theirs}_weight.scales"] = tensors[f"{name}_scales"]
    directory.mkdir()
    safetensors.numpy.save_file(renamed, directory / SINGLE_FILE)
    (directory / "config.json").write_text(json.dumps(OPENAI_FIELDS))
    if (source / "tokenizer.json").exists():
        shutil.copy(source / "tokenizer.json", directory)
    return directory


def padded(spec: WeightSpec) -> WeightSpec:
    """A spec whose experts' intermediate dimension is padded from 96 to 128, as for tensor parallelism of 4."""
    padded_sizes = {"expert_gate_up": 256, "expert_intermediate": 128}
    shape = tuple(padded_sizes.get(axis or "", n) for n, axis in zip(spec.shape, spec.axes, strict=True))
    return spec if shape == spec.shape else dataclasses.replace(spec, shape=shape, stored_shape=spec.shape)


def assert_padded(found: Any, expected: Any) -> None:
    """Assert that arrays have the expected values, followed by zeros in each dimension."""
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        part = tuple(slice(0, n) for n in theirs.shape)
        ours, theirs = np.array(ours), np.asarray(theirs)
        np.testing.assert_array_equal(ours[part], theirs)
        ours[part] = 0
        assert not ours.any()


def sharding_of(mesh: Mesh) -> Callable[[WeightSpec], NamedSharding]:
    """Shardings of experts over `expert`, and of rows, heads or vocabulary over `tensor`."""
    axes = {"experts": "expert", "heads": "tensor", "vocab": "tensor"}

    def sharding(spec: WeightSpec) -> NamedSharding:
        if "experts.gate_up" in spec.name:
            return NamedSharding(mesh, PartitionSpec("expert", "tensor"))
        if spec.name.endswith("experts.down_proj") and spec.packed:
            return NamedSharding(mesh, PartitionSpec("expert"))
        if spec.name.endswith("experts.down_proj"):
            return NamedSharding(mesh, PartitionSpec("expert", None, "tensor"))
        return NamedSharding(mesh, PartitionSpec(*(axes.get(axis or "") for axis in spec.axes)))

    return sharding
