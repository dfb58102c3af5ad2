"""The shape of a gpt-oss model, read from a checkpoint's config.json."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from gptoss_jax.errors import CheckpointError

LayerType = Literal["sliding_attention", "full_attention"]
LAYER_TYPES: tuple[str, ...] = ("sliding_attention", "full_attention")


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding; `rope_type` is "yarn" or "default" (then only `theta` matters).

    `original_max_position_embeddings` is the trained context that YaRN (arXiv:2309.00071) stretches by
    `factor`; `truncate` floors and ceils the correction range.
    """

    theta: float = 150000.0
    rope_type: Literal["yarn", "default"] = "yarn"
    factor: float = 32.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    original_max_position_embeddings: int = 4096
    truncate: bool = False
    attention_factor: float | None = None


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Every size of a gpt-oss model under its Hugging Face name; the defaults are gpt-oss-20b.

    `quantization` tells how the experts are stored: "mxfp4" packed, or None for plain floats.
    """

    vocab_size: int = 201088
    hidden_size: int = 2880
    intermediate_size: int = 2880
    num_hidden_layers: int = 24
    num_attention_heads: int = 64
    num_key_value_heads: int = 8
    head_dim: int = 64
    num_local_experts: int = 32
    num_experts_per_tok: int = 4
    sliding_window: int = 128
    layer_types: tuple[str, ...] = ("sliding_attention", "full_attention") * 12
    rms_norm_eps: float = 1e-5
    swiglu_limit: float = 7.0
    max_position_embeddings: int = 131072
    rope: RopeConfig = RopeConfig()
    eos_token_id: tuple[int, ...] = (200002, 200012)
    quantization: Literal["mxfp4"] | None = "mxfp4"

    def window(self, layer: int) -> int | None:
        """How many keys a query of `layer` sees, itself included; None when it sees all before it."""
        return self.sliding_window if self.layer_types[layer] == "sliding_attention" else None

    @classmethod
    def from_file(cls, path: str | Path) -> ModelConfig:
        """Read config.json, or a directory that holds one. Raises CheckpointError."""
        path = Path(path)
        try:
            if path.is_dir():
                path = path / "config.json"
            fields = json.loads(path.read_text(encoding="utf-8-sig"))
        except FileNotFoundError:
            raise CheckpointError(f"{path}: no such file") from None
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{path}: cannot be read: {error}") from None
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path}: not valid JSON: {error}") from None
        return cls.from_dict(fields, source=str(path))

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any], source: str = "config") -> ModelConfig:
        """Build from config.json's fields, Hugging Face's or OpenAI's. Raises CheckpointError naming `source`."""
        if not isinstance(fields, Mapping):
            raise CheckpointError(f"{source}: expected a JSON object, found {type(fields).__name__}")
        if "num_experts" in fields and "model_type" not in fields:
            fields = _from_openai_names(fields)
        return _Reader(fields, source).config()

    def to_dict(self) -> dict[str, Any]:
        """The fields of a Hugging Face config.json that reads back as this config."""
        rope = dataclasses.asdict(self.rope)
        theta = rope.pop("theta")
        if rope["attention_factor"] is None:
            del rope["attention_factor"]
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        for name in ("rope", "quantization", "eos_token_id"):
            del fields[name]
        return {
            "architectures": ["GptOssForCausalLM"],
            "model_type": "gpt_oss",
            **fields,
            "layer_types": list(self.layer_types),
            "eos_token_id": list(self.eos_token_id),
            "rope_theta": theta,
            "rope_scaling": rope if self.rope.rope_type == "yarn" else None,
            "hidden_act": "silu",
            "attention_bias": True,
            "tie_word_embeddings": False,
            **({"quantization_config": {"quant_method": "mxfp4"}} if self.quantization else {}),
        }


def _from_openai_names(fields: Mapping[str, Any]) -> dict[str, Any]:
    """OpenAI's original config.json in Hugging Face's names.

    It has no `layer_types`: even layers slide, as in openai/gpt-oss `gpt_oss/torch/model.py`.
    """
    names = {"num_local_experts": "num_experts", "num_experts_per_tok": "experts_per_token"}
    translated = {name: value for name, value in fields.items() if name not in names.values()}
    translated |= {name: fields[old] for name, old in names.items() if old in fields}
    layers = fields.get("num_hidden_layers")
    if isinstance(layers, int) and not isinstance(layers, bool) and 0 < layers < 10_000:
        translated["layer_types"] = [LAYER_TYPES[i % 2] for i in range(layers)]
    original = fields.get("initial_context_length", 4096)
    factor = fields.get("rope_scaling_factor", 32.0)
    translated["rope_scaling"] = {
        "rope_type": "yarn",
        "factor": factor,
        "beta_fast": fields.get("rope_ntk_beta", 32.0),
        "beta_slow": fields.get("rope_ntk_alpha", 1.0),
        "original_max_position_embeddings": original,
        "truncate": False,
    }
    if isinstance(original, int) and isinstance(factor, int | float):
        translated.setdefault("max_position_embeddings", int(original * factor))
    translated.setdefault("quantization_config", {"quant_method": "mxfp4"})
    return translated


class _Reader:
    """Checks each field's type and range, so that a wrong config is refused by name before any tensor is."""

    def __init__(self, fields: Mapping[str, Any], source: str) -> None:
        self.fields = fields
        self.source = source

    def fail(self, name: str, expected: str, found: object) -> CheckpointError:
        return CheckpointError(f"{self.source}: {name}: expected {expected}, found {found!r:.80}")

    def integer(self, name: str, default: int | None = None, most: int = 2**31 - 1) -> int:
        value = self.fields.get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= most:
            raise self.fail(name, "a positive integer", value)
        return value

    def number(self, name: str, default: float, fields: Mapping[str, Any] | None = None) -> float:
        value = (self.fields if fields is None else fields).get(name, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
            raise self.fail(name, "a positive number", value)
        return float(value)

    def config(self) -> ModelConfig:
        if self.fields.get("model_type", "gpt_oss") != "gpt_oss":
            raise self.fail("model_type", "'gpt_oss'", self.fields["model_type"])
        if self.fields.get("tie_word_embeddings"):
            raise self.fail("tie_word_embeddings", "false", self.fields["tie_word_embeddings"])
        if self.fields.get("attention_bias", True) is not True:
            raise self.fail("attention_bias", "true", self.fields["attention_bias"])
        hidden, heads = self.integer("hidden_size"), self.integer("num_attention_heads")
        config = ModelConfig(
            vocab_size=self.integer("vocab_size"),
            hidden_size=hidden,
            intermediate_size=self.integer("intermediate_size"),
            num_hidden_layers=self.integer("num_hidden_layers", most=10_000),
            num_attention_heads=heads,
            num_key_value_heads=self.integer("num_key_value_heads"),
            head_dim=self.integer("head_dim", max(hidden // heads, 1)),
            num_local_experts=self.integer("num_local_experts"),
            num_experts_per_tok=self.integer("num_experts_per_tok", self.fields.get("experts_per_token")),
            sliding_window=self.integer("sliding_window", 128),
            layer_types=self.layer_types(),
            rms_norm_eps=self.number("rms_norm_eps", 1e-5),
            swiglu_limit=self.number("swiglu_limit", 7.0),
            max_position_embeddings=self.integer("max_position_embeddings", 131072),
            rope=self.rope(),
            eos_token_id=self.eos(),
            quantization=self.quantization(),
        )
        self.check(config)
        return config

    def check(self, config: ModelConfig) -> None:
        if config.num_attention_heads % config.num_key_value_heads:
            raise self.fail(
                "num_key_value_heads",
                f"a divisor of num_attention_heads {config.num_attention_heads}",
                config.num_key_value_heads,
            )
        if config.num_experts_per_tok > config.num_local_experts:
            raise self.fail(
                "num_experts_per_tok",
                f"at most num_local_experts {config.num_local_experts}",
                config.num_experts_per_tok,
            )
        if config.head_dim % 2:
            raise self.fail("head_dim", "an even number", config.head_dim)
        if config.quantization:
            for name in ("hidden_size", "intermediate_size"):
                if getattr(config, name) % 32:
                    raise self.fail(name, "a multiple of MXFP4's group of 32", getattr(config, name))

    def layer_types(self) -> tuple[str, ...]:
        layers = self.integer("num_hidden_layers", most=10_000)
        # transformers' GptOssConfig lets even layers slide where the field is absent.
        types = self.fields.get("layer_types") or [LAYER_TYPES[i % 2] for i in range(layers)]
        if not isinstance(types, list | tuple) or any(t not in LAYER_TYPES for t in types):
            raise self.fail("layer_types", f"a list of {' or '.join(LAYER_TYPES)}", types)
        if len(types) != layers:
            raise self.fail("layer_types", f"{layers} entries (num_hidden_layers)", len(types))
        return tuple(types)

    def rope(self) -> RopeConfig:
        """transformers v5 writes everything into `rope_parameters`, the released files two fields."""
        scaling = self.fields.get("rope_parameters") or self.fields.get("rope_scaling") or {}
        if not isinstance(scaling, Mapping):
            raise self.fail("rope_parameters or rope_scaling", "an object", scaling)
        theta = self.number("rope_theta", self.number("rope_theta", 150000.0), scaling)
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        if kind == "default":
            return RopeConfig(theta=theta, rope_type="default", factor=1.0)
        if kind != "yarn":
            raise self.fail("rope_type", "'yarn' or 'default'", kind)
        original = scaling.get("original_max_position_embeddings", self.fields.get("initial_context_length", 4096))
        if not isinstance(original, int) or isinstance(original, bool) or original <= 0:
            raise self.fail("original_max_position_embeddings", "a positive integer", original)
        truncate = scaling.get("truncate", True)
        if not isinstance(truncate, bool):
            raise self.fail("truncate", "true or false", truncate)
        attention_factor = scaling.get("attention_factor")
        return RopeConfig(
            theta=theta,
            factor=self.number("factor", 32.0, scaling),
            beta_fast=self.number("beta_fast", 32.0, scaling),
            beta_slow=self.number("beta_slow", 1.0, scaling),
            original_max_position_embeddings=original,
            truncate=truncate,
            attention_factor=None if attention_factor is None else self.number("attention_factor", 1.0, scaling),
        )

    def eos(self) -> tuple[int, ...]:
        value = self.fields.get("eos_token_id")
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if any(not isinstance(i, int) or isinstance(i, bool) or i < 0 for i in ids):
            raise self.fail("eos_token_id", "a token id or a list of them", value)
        return tuple(ids)

    def quantization(self) -> Literal["mxfp4"] | None:
        quantization = self.fields.get("quantization_config")
        if quantization is None:
            return None
        method = quantization.get("quant_method") if isinstance(quantization, Mapping) else quantization
        if method != "mxfp4":
            raise self.fail("quantization_config.quant_method", "'mxfp4'", method)
        return "mxfp4"
