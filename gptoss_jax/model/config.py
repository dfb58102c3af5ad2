"""The shape of a gpt-oss model, read from a checkpoint's config.json."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from gptoss_jax.errors import CheckpointError

LayerType = Literal["sliding_attention", "full_attention"]
LAYER_TYPES: tuple[str, ...] = ("sliding_attention", "full_attention")

GENERATION_FILE = "generation_config.json"

_YARN: Mapping[str, Any] = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "original_max_position_embeddings": 4096,
    "truncate": False,
}
"""The defaults of transformers' GptOssConfig for a config.json without rotary settings."""

_ROPE_SETTINGS: Mapping[str, frozenset[str]] = {
    "default": frozenset(),
    "yarn": frozenset(_YARN.keys() | {"attention_factor", "mscale", "mscale_all_dim"}),
}
"""The supported settings of each rope_type, besides rope_theta, which every type has."""

_OTHER_ROPE_SETTINGS = frozenset(
    {"low_freq_factor", "high_freq_factor", "short_factor", "long_factor", "mrope_section"}
)
"""Settings of rope types that gpt-oss does not use."""


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding settings; `rope_type` "default" uses only `theta`.

    `original_max_position_embeddings` is the trained context length, which YaRN (arXiv:2309.00071) extends by
    `factor`. `truncate` rounds the bounds of the correction range outwards. `attention_factor` scales cos and sin;
    None derives it from `factor`.
    """

    theta: float = 150000.0
    rope_type: Literal["yarn", "default"] = "yarn"
    factor: float = 32.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    original_max_position_embeddings: int = 4096
    truncate: bool = False
    attention_factor: float | None = None

    def correction_range(self, head_dim: int) -> tuple[float, float]:
        """YaRN's range of dimensions to interpolate: those that turn `beta_fast` to `beta_slow` times in the context.

        It may reach beyond the head's dimensions. `theta` must be above 1.
        """

        def dimension_that_turns(times: float) -> float:
            wavelengths = self.original_max_position_embeddings / (times * 2 * math.pi)
            return head_dim * math.log(wavelengths) / (2 * math.log(self.theta))

        low, high = dimension_that_turns(self.beta_fast), dimension_that_turns(self.beta_slow)
        return (math.floor(low), math.ceil(high)) if self.truncate else (low, high)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The dimensions of a gpt-oss model, under their Hugging Face names; the defaults are gpt-oss-20b.

    `quantization` is the experts' storage format: "mxfp4", or None for plain floats.
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
        """The attention window of `layer` in tokens, the query's own included; None for full attention."""
        return self.sliding_window if self.layer_types[layer] == "sliding_attention" else None

    @classmethod
    def from_file(cls, path: str | Path) -> ModelConfig:
        """Read a config.json, or the one in a directory. Raises CheckpointError."""
        path = Path(path)
        try:
            if path.is_dir():
                path = path / "config.json"
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
        fields = _read_json(path)
        if fields is None:
            raise CheckpointError(f"{path}: no such file")
        return cls.from_dict(fields, source=str(path))

    def with_generation_file(self, directory: Path) -> ModelConfig:
        """This config with the `eos_token_id` of the directory's generation_config.json, if that file sets it.

        It replaces config.json's, as in transformers. Raises CheckpointError, also for ids outside the vocabulary.
        """
        path = directory / GENERATION_FILE
        fields = _read_json(path)
        if fields is None:
            return self
        if not isinstance(fields, Mapping):
            raise CheckpointError(f"{path}: expected a JSON object, found {type(fields).__name__}")
        eos = _Reader(fields, str(path)).eos(self.vocab_size)
        return dataclasses.replace(self, eos_token_id=eos) if eos else self

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any], source: str = "config") -> ModelConfig:
        """Build from the fields of a config.json in Hugging Face's or OpenAI's format.

        Raises CheckpointError, whose message begins with `source`.
        """
        if not isinstance(fields, Mapping):
            raise CheckpointError(f"{source}: expected a JSON object, found {type(fields).__name__}")
        names = {name: old for name, old in _OPENAI_NAMES.items() if name not in fields and old in fields}
        if "num_experts" in fields and "model_type" not in fields:
            fields = _from_openai_names(fields)
        return _Reader(fields, source, names).config()

    def to_dict(self) -> dict[str, Any]:
        """The fields of a Hugging Face config.json from which `from_dict` rebuilds this config."""
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
            # transformers reads an absent or null value as YaRN.
            "rope_scaling": rope if self.rope.rope_type == "yarn" else {"rope_type": "default"},
            "hidden_act": "silu",
            "attention_bias": True,
            "tie_word_embeddings": False,
            **({"quantization_config": {"quant_method": "mxfp4"}} if self.quantization else {}),
        }


def _read_json(path: Path) -> Any:
    """The contents of a JSON file, or None if the file does not exist. Raises CheckpointError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from None
    if value is None:
        raise CheckpointError(f"{path}: expected a JSON object, found null")
    return value


_OPENAI_NAMES: Mapping[str, str] = {
    "num_local_experts": "num_experts",
    "num_experts_per_tok": "experts_per_token",
    "factor": "rope_scaling_factor",
    "beta_fast": "rope_ntk_beta",
    "beta_slow": "rope_ntk_alpha",
    "original_max_position_embeddings": "initial_context_length",
}
"""The names of OpenAI's original config.json by those of Hugging Face."""


def _from_openai_names(fields: Mapping[str, Any]) -> dict[str, Any]:
    """OpenAI's original config.json translated to Hugging Face's names.

    The original has no `layer_types`: even layers use sliding attention, as in openai/gpt-oss
    `gpt_oss/torch/model.py`.
    """
    translated = dict(fields)
    for name in ("num_local_experts", "num_experts_per_tok"):
        if (old := _OPENAI_NAMES[name]) in fields:
            translated[name] = translated.pop(old)
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
    # An integer beyond the range of floats cannot be multiplied with one.
    plausible = isinstance(original, int) and 0 < original < 2**31 and isinstance(factor, int | float)
    if plausible and 0 < original * factor < 2**31:
        translated.setdefault("max_position_embeddings", int(original * factor))
    translated.setdefault("quantization_config", {"quant_method": "mxfp4"})
    return translated


_FIXED: Mapping[str, Any] = {
    "model_type": "gpt_oss",
    "hidden_act": "silu",
    "swiglu_alpha": 1.702,
    "attention_bias": True,
    "tie_word_embeddings": False,
}
"""Fields with a single supported value, which is also transformers' default."""


_LEAST_NUMBER, _MOST_NUMBER = 2.0**-126, 2.0**127
"""The range of normal float32 numbers: the model uses its settings as float32."""


class _Absent:
    """A placeholder for an absent field; error messages show it as "nothing"."""

    def __repr__(self) -> str:
        return "nothing"


_ABSENT = _Absent()


class _Reader:
    """Reads fields as transformers' GptOssConfig does, and rejects unsupported values by name.

    Dimensions are required: GptOssConfig would default to those of gpt-oss-120b.
    """

    def __init__(self, fields: Mapping[str, Any], source: str, names: Mapping[str, str] | None = None) -> None:
        """`names` maps the names of fields to those that the file has for them, which errors show."""
        self.fields = fields
        self.source = source
        self.names = names or {}

    def fail(self, name: str, expected: str, found: object) -> CheckpointError:
        name = self.names.get(name, name)
        return CheckpointError(f"{self.source}: {name}: expected {expected}, found {found!r:.80}")

    def integer(
        self, name: str, default: int | None = None, most: int = 2**31 - 1, fields: Mapping[str, Any] | None = None
    ) -> int:
        value = (self.fields if fields is None else fields).get(name, _ABSENT if default is None else default)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= most:
            raise self.fail(name, "a positive integer", value)
        return value

    def number(
        self, name: str, default: float | None = None, fields: Mapping[str, Any] | None = None, least: float = 0.0
    ) -> float:
        """A positive number within float32's range, at least `least`."""
        value = (self.fields if fields is None else fields).get(name, _ABSENT if default is None else default)
        fine = isinstance(value, int | float) and not isinstance(value, bool)
        if not fine or not max(least, _LEAST_NUMBER) <= value <= _MOST_NUMBER:
            raise self.fail(name, f"a number from {least:g}" if least else "a positive number", value)
        return float(value)

    def fixed(self, name: str, value: Any) -> None:
        """Reject a field whose value is not the supported one."""
        found = self.fields.get(name, value)
        same_type = isinstance(found, bool) == isinstance(value, bool)
        if not same_type or found != value:
            raise self.fail(name, json.dumps(value), found)

    def same(self, name: str, value: int, of: str, fields: Mapping[str, Any] | None = None) -> None:
        """Reject a duplicate setting whose value differs from `value`; `of` says where that comes from."""
        found = (self.fields if fields is None else fields).get(name)
        if found is not None and (found != value or isinstance(found, bool)):
            raise self.fail(name, f"{value} ({of})", found)

    def config(self) -> ModelConfig:
        for name, value in _FIXED.items():
            self.fixed(name, value)
        experts = self.integer("num_local_experts", self.fields.get("num_experts"))
        chosen = self.integer("num_experts_per_tok", self.fields.get("experts_per_token"))
        self.same("num_experts", experts, "num_local_experts")
        self.same("experts_per_token", chosen, "num_experts_per_tok")
        layer_types = self.layer_types()
        head_dim = self.integer("head_dim", 64)
        longest = self.integer("max_position_embeddings", 131072)
        config = ModelConfig(
            vocab_size=self.integer("vocab_size"),
            hidden_size=self.integer("hidden_size"),
            intermediate_size=self.integer("intermediate_size"),
            num_hidden_layers=self.integer("num_hidden_layers", most=10_000),
            num_attention_heads=self.integer("num_attention_heads"),
            num_key_value_heads=self.integer("num_key_value_heads"),
            head_dim=head_dim,
            num_local_experts=experts,
            num_experts_per_tok=chosen,
            sliding_window=self.sliding_window(layer_types),
            layer_types=layer_types,
            rms_norm_eps=self.number("rms_norm_eps", 1e-5),
            swiglu_limit=self.number("swiglu_limit", 7.0),
            max_position_embeddings=longest,
            rope=self.rope(head_dim, longest),
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
                    raise self.fail(name, "a multiple of 32, the MXFP4 group size", getattr(config, name))

    def layer_types(self) -> tuple[str, ...]:
        layers = self.integer("num_hidden_layers", most=10_000)
        # As in transformers' GptOssConfig, even layers use sliding attention by default.
        types = self.fields.get("layer_types")
        if types is None:
            types = [LAYER_TYPES[i % 2] for i in range(layers)]
        if not isinstance(types, list | tuple) or any(t not in LAYER_TYPES for t in types):
            raise self.fail("layer_types", f"a list of {' or '.join(LAYER_TYPES)}", types)
        if len(types) != layers:
            raise self.fail("layer_types", f"{layers} entries (num_hidden_layers)", len(types))
        return tuple(types)

    def sliding_window(self, layer_types: Sequence[str]) -> int:
        """The window in tokens; null is accepted if no layer uses sliding attention."""
        if "sliding_attention" not in layer_types and self.fields.get("sliding_window", _ABSENT) is None:
            return ModelConfig.sliding_window
        return self.integer("sliding_window", 128)

    def rope(self, head_dim: int, longest: int) -> RopeConfig:
        """The validated rotary settings; `longest` is `max_position_embeddings`."""
        name, settings = self.rope_settings()
        theta = self.number("rope_theta", self.number("rope_theta", 150000.0), settings)
        kind = settings.get("rope_type", settings.get("type", "default"))
        if not isinstance(kind, str) or kind not in _ROPE_SETTINGS:
            raise self.fail(f"{name}.rope_type", "'yarn' or 'default'", kind)
        unused = (_OTHER_ROPE_SETTINGS | _ROPE_SETTINGS["yarn"]) - _ROPE_SETTINGS[kind] - {"rope_type"}
        for key in sorted(unused & settings.keys()):
            if settings[key] is not None:
                raise self.fail(f"{name}.{key}", f"no value for rope_type {kind!r}", settings[key])
        for fields in (self.fields, settings):
            self.same("partial_rotary_factor", 1, "heads are rotated whole", fields)
        if kind == "default":
            return RopeConfig(theta=theta, rope_type="default", factor=1.0)
        return self.yarn(settings, theta, head_dim, longest)

    def rope_settings(self) -> tuple[str, Mapping[str, Any]]:
        """The name and value of the field with the rotary settings.

        `rope_scaling` takes precedence over `rope_parameters`, as in transformers 5.24.
        """
        for name in ("rope_scaling", "rope_parameters"):
            settings = self.fields.get(name)
            if settings is not None and not isinstance(settings, Mapping):
                raise self.fail(name, "an object", settings)
            # In transformers an empty `rope_parameters` means plain rotation, an empty `rope_scaling` is ignored.
            if settings or (settings is not None and name == "rope_parameters"):
                for key, value in settings.items():
                    if key in LAYER_TYPES or isinstance(value, Mapping):
                        raise self.fail(f"{name}.{key}", "the same settings for all layers", value)
                return name, settings
        return "rope_parameters", _YARN

    def yarn(self, settings: Mapping[str, Any], theta: float, head_dim: int, longest: int) -> RopeConfig:
        original = self.integer("original_max_position_embeddings", longest, fields=settings)
        self.same("original_max_position_embeddings", original, "the rotary settings' value")
        truncate = settings.get("truncate", True)
        if not isinstance(truncate, bool):
            raise self.fail("truncate", "true or false", truncate)
        given = {key: value for key, value in settings.items() if value is not None}
        absent = settings.keys() - given.keys()
        # As in transformers, a null factor is derived from the context lengths, and an absent one is an error.
        factor = {"factor": longest / original} if "factor" in absent else given
        rope = RopeConfig(
            theta=theta,
            factor=self.number("factor", fields=factor, least=1),
            beta_fast=self.number("beta_fast", 32.0, given),
            beta_slow=self.number("beta_slow", 1.0, given),
            original_max_position_embeddings=original,
            truncate=truncate,
        )
        self.check_ramp(rope, head_dim)
        return dataclasses.replace(rope, attention_factor=self.attention_factor(given, rope.factor))

    def attention_factor(self, given: Mapping[str, Any], factor: float) -> float | None:
        """The factor on cos and sin; None for YaRN's default, which depends on `factor`."""
        scale = {name: self.number(name, fields=given) for name in ("mscale", "mscale_all_dim") if name in given}
        if "attention_factor" in given:
            return self.number("attention_factor", fields=given)
        if len(scale) < 2 or factor <= 1:
            return None
        growth = 0.1 * math.log(factor)
        return (growth * scale["mscale"] + 1) / (growth * scale["mscale_all_dim"] + 1)

    def check_ramp(self, rope: RopeConfig, head_dim: int) -> None:
        """Reject settings whose ramp between unscaled and scaled dimensions lies outside the head."""
        if rope.beta_fast < rope.beta_slow:
            raise self.fail("beta_fast", f"beta_slow {rope.beta_slow:g} or more", rope.beta_fast)
        if rope.theta <= 1:
            raise self.fail("rope_theta", "a number above 1", rope.theta)

        low, high = rope.correction_range(head_dim)
        if high < 0 or low > head_dim - 1:
            raise self.fail(
                "original_max_position_embeddings",
                "a context length in which some dimension turns between beta_slow and beta_fast times",
                rope.original_max_position_embeddings,
            )

    def eos(self, below: int | None = None) -> tuple[int, ...]:
        """The end-of-sequence token ids. Raises CheckpointError for ids not below `below`, if given."""
        value = self.fields.get("eos_token_id")
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if any(not isinstance(i, int) or isinstance(i, bool) or not 0 <= i < 2**31 for i in ids):
            raise self.fail("eos_token_id", "a token id or a list of them", value)
        for token in ids:
            if below is not None and token >= below:
                raise self.fail("eos_token_id", f"ids below config.json's vocab_size {below}", token)
        return tuple(ids)

    def quantization(self) -> Literal["mxfp4"] | None:
        if self.fields.get("compression_config") is not None:
            raise self.fail("compression_config", "nothing", self.fields["compression_config"])
        quantization = self.fields.get("quantization_config")
        if quantization is None:
            return None
        if not isinstance(quantization, Mapping):
            raise self.fail("quantization_config", "an object", quantization)
        if quantization.get("quant_method") != "mxfp4":
            raise self.fail(
                "quantization_config.quant_method", "'mxfp4'", quantization.get("quant_method", _ABSENT)
            )
        return "mxfp4"
