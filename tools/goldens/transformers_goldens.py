"""Generates tests/golden/: random checkpoints with the results of Hugging Face transformers.

Needs a separate environment with packages that the project does not depend on:

    python -m venv goldens && goldens/bin/pip install torch transformers safetensors ml_dtypes numpy
    goldens/bin/python tools/goldens/transformers_goldens.py tests/golden

Each case is computed in float32 and eager mode, with weights that are exact in bfloat16 (packed experts in MXFP4).
Sequences are drawn until no router decision and no greedy choice is close to a tie that rounding could flip.
"""

# ruff: noqa: D102, D103
from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
from safetensors.numpy import save_file
from transformers import GptOssConfig, GptOssForCausalLM

YARN = {"rope_type": "yarn", "beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "truncate": False}
S, F = "sliding_attention", "full_attention"
CASES: dict[str, dict[str, Any]] = {
    # Narrow heads, an odd number of experts, queries wider than hidden, unordered layer types, newer field names.
    "narrow": {
        "config": {
            "vocab_size": 96,
            "hidden_size": 64,
            "intermediate_size": 32,
            "head_dim": 16,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "num_local_experts": 5,
            "num_experts_per_tok": 3,
            "sliding_window": 7,
            "layer_types": [F, F, S],
            "rope": {**YARN, "original_max_position_embeddings": 4096, "rope_theta": 150000.0},
        },
        "packed": True,
        "newer_rope_fields": True,
        "lengths": (7, 40),
    },
    # Released head_dim and window, experts in bfloat16, YaRN that truncates, the released field names.
    "floats": {
        "config": {
            "vocab_size": 128,
            "hidden_size": 96,
            "intermediate_size": 64,
            "head_dim": 64,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "num_local_experts": 3,
            "num_experts_per_tok": 1,
            "sliding_window": 128,
            "layer_types": [S, F],
            "rope": {
                **YARN,
                "truncate": True,
                "factor": 8.0,
                "original_max_position_embeddings": 256,
                "rope_theta": 10000.0,
            },
        },
        "packed": False,
        "newer_rope_fields": False,
        "lengths": (7, 150),
    },
}
ROUTER_GAP, GREEDY_GAP, GREEDY_TOKENS = 0.003, 0.003, 24


def random_experts(rng: np.random.Generator, shape: tuple[int, int, int], packed: bool) -> tuple[np.ndarray, dict]:
    """Values [E, out, in] in float32, and the tensors that store them in a file."""
    experts, rows, columns = shape
    if not packed:
        values = (rng.standard_normal(shape) / np.sqrt(columns)).astype(ml_dtypes.bfloat16)
        return values.astype(np.float32), {"": np.ascontiguousarray(values.swapaxes(1, 2))}
    blocks = rng.integers(0, 256, (experts, rows, columns // 32, 16), dtype=np.uint8)
    scales = rng.integers(122, 125, (experts, rows, columns // 32), dtype=np.uint8)
    nibbles = np.stack([blocks & 0xF, blocks >> 4], axis=-1).reshape(*scales.shape, 32)
    values = (
        nibbles.view(ml_dtypes.float4_e2m1fn).astype(np.float32)
        * np.exp2(scales.astype(np.float32) - 127)[..., None]
    )
    return values.reshape(shape), {"_blocks": blocks, "_scales": scales}


def build(case: dict[str, Any], rng: np.random.Generator) -> tuple[GptOssForCausalLM, dict[str, np.ndarray]]:
    """The transformers model, and its tensors as stored in the checkpoint."""
    fields = dict(case["config"])
    rope = fields.pop("rope")
    config = GptOssConfig(**fields, num_hidden_layers=len(fields["layer_types"]), rope_parameters=rope)
    config._attn_implementation = "eager"
    model = GptOssForCausalLM(config).float().eval()
    tensors: dict[str, np.ndarray] = {}
    for name, parameter in model.named_parameters():
        if name.endswith(("gate_up_proj", "down_proj")):
            experts, inputs, outputs = parameter.shape
            values, stored = random_experts(rng, (experts, outputs, inputs), case["packed"])
            tensors |= {name + suffix: tensor for suffix, tensor in stored.items()}
            value = values.swapaxes(1, 2)
        else:
            scale = 1.0 if name.endswith("norm.weight") else 1.5 / np.sqrt(parameter.shape[-1])
            drawn = rng.standard_normal(tuple(parameter.shape)) * scale * (0.2 if "norm" in name else 1)
            stored_value = (drawn + ("norm" in name)).astype(ml_dtypes.bfloat16)
            tensors[name] = stored_value
            value = stored_value.astype(np.float32)
        parameter.data = torch.from_numpy(np.ascontiguousarray(value))
    return model, tensors


class Recorder:
    """Records layer outputs, and the smallest gap of router logits between the last chosen expert and the next."""

    def __init__(self, model: GptOssForCausalLM) -> None:
        self.outs: dict[str, np.ndarray] = {}
        self.k = model.config.num_experts_per_tok
        self.gap = np.inf
        model.model.embed_tokens.register_forward_hook(self.keep("embed"))
        for i, layer in enumerate(model.model.layers):
            layer.register_forward_hook(self.keep(f"layer_out.{i}"))
            layer.mlp.router.register_forward_hook(self.router)

    def keep(self, name: str) -> Any:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            output = output[0] if isinstance(output, tuple) else output
            self.outs[name] = output.detach().numpy().reshape(-1, output.shape[-1])

        return hook

    def router(self, module: Any, inputs: Any, output: Any) -> None:
        logits = torch.nn.functional.linear(
            inputs[0].reshape(-1, module.weight.shape[1]), module.weight, module.bias
        )
        ordered = logits.sort(dim=-1, descending=True).values
        if ordered.shape[-1] > self.k:
            self.gap = min(self.gap, float((ordered[:, self.k - 1] - ordered[:, self.k]).min()))


@torch.no_grad()
def numbers(model: GptOssForCausalLM, lengths: tuple[int, ...], rng: np.random.Generator) -> dict[str, np.ndarray]:
    """The arrays of golden.npz: see tests/golden/README.md."""
    recorder, vocab = Recorder(model), model.config.vocab_size
    out: dict[str, np.ndarray] = {}

    def run(tokens: np.ndarray) -> np.ndarray:
        recorder.gap = np.inf
        return model(torch.from_numpy(tokens)[None].long(), use_cache=False).logits[0].numpy()

    for index, length in enumerate(lengths):
        while True:
            tokens = rng.integers(0, vocab, length).astype(np.int32)
            logits = run(tokens)
            if recorder.gap >= ROUTER_GAP / (1 + length // 50):
                break
        positions = np.arange(length) if length <= 40 else np.arange(length - 8, length)
        out |= {
            f"seq{index}_tokens": tokens,
            f"seq{index}_positions": positions,
            f"seq{index}_logits": logits[positions],
        }
        if length <= 40:
            out |= {f"inter{index}/{name}": value for name, value in recorder.outs.items()}
        out |= greedy(f"greedy{index}", tokens, run)
    rope = model.model.rotary_emb
    return out | {
        "rope_inv_freq": rope.inv_freq.numpy(),
        "rope_attention_scaling": np.float32(rope.attention_scaling),
    }


def greedy(name: str, prompt: np.ndarray, run: Any) -> dict[str, np.ndarray]:
    """Continue a prompt greedily; stops before a choice that is close to a tie."""
    tokens = list(prompt)
    for _ in range(GREEDY_TOKENS):
        best = np.sort(logits := run(np.asarray(tokens, np.int32))[-1])[::-1]
        if best[0] - best[1] < GREEDY_GAP:
            break
        tokens.append(int(np.argmax(logits)))
    return {f"{name}_prompt": prompt, f"{name}_tokens": np.asarray(tokens[len(prompt) :], np.int32)}


def config_json(model: GptOssForCausalLM, case: dict[str, Any]) -> dict[str, Any]:
    fields = {k: v for k, v in case["config"].items() if k != "rope"}
    rope = dict(case["config"]["rope"])
    theta = rope.pop("rope_theta")
    fields |= (
        {"rope_parameters": {**rope, "rope_theta": theta}}
        if case["newer_rope_fields"]
        else {"rope_theta": theta, "rope_scaling": rope}
    )
    fields |= {"num_hidden_layers": model.config.num_hidden_layers, "model_type": "gpt_oss", "rms_norm_eps": 1e-5}
    return fields | ({"quantization_config": {"quant_method": "mxfp4"}} if case["packed"] else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path, help="directory in which each case gets a folder")
    for index, (name, case) in enumerate(CASES.items()):
        directory = parser.parse_args().directory / name
        directory.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(index)
        model, tensors = build(case, rng)
        (directory / "config.json").write_text(json.dumps(config_json(model, case), indent=2) + "\n")
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        np.savez_compressed(directory / "golden.npz", **numbers(model, case["lengths"], rng))
        print(name, sum(t.nbytes for t in tensors.values()), "bytes of weights")


if __name__ == "__main__":
    main()
