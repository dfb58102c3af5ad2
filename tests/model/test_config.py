"""config.json and generation_config.json are read as transformers reads them, or rejected by name.

The expected values were printed by `AutoConfig.from_pretrained` of transformers 5.24.0 on the same fields. Those
derived from mscale follow the formula of its `_compute_yarn_parameters`.
"""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gptoss_jax import LLM, SamplingParams
from gptoss_jax.checkpoints.conversion import Layout, convert
from gptoss_jax.checkpoints.loading import EMBEDDED, load_model
from gptoss_jax.checkpoints.reader import open_checkpoint
from gptoss_jax.engine.options import EngineOptions
from gptoss_jax.engine.outputs import TokenEvent
from gptoss_jax.errors import CheckpointError
from gptoss_jax.model.config import ModelConfig, RopeConfig
from gptoss_jax.serving.client import Request, _RunningRequest
from gptoss_jax.text.tokenizer import Tokenizer
from tests.checkpoints.files import OPENAI_FIELDS

BARE: dict[str, Any] = {
    "model_type": "gpt_oss",
    "vocab_size": 1024,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_hidden_layers": 3,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "num_experts_per_tok": 4,
}
YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "original_max_position_embeddings": 4096,
    "truncate": False,
}
RELEASED = RopeConfig(150000.0, "yarn", 32.0, 32.0, 1.0, 4096, False, None)
PLAIN = RopeConfig(150000.0, "default", 1.0, 32.0, 1.0, 4096, False, None)


def read(**fields: Any) -> ModelConfig:
    return ModelConfig.from_dict(BARE | fields, "config.json")


def test_absent_fields_have_the_defaults_of_transformers() -> None:
    config = read()
    assert config.head_dim == 64
    assert config.sliding_window == 128
    assert config.layer_types == ("sliding_attention", "full_attention", "sliding_attention")
    assert config.rms_norm_eps == 1e-5
    assert config.swiglu_limit == 7.0
    assert config.max_position_embeddings == 131072
    assert config.eos_token_id == ()
    assert config.quantization is None
    assert config.rope == RELEASED
    assert read(layer_types=None, eos_token_id=None, quantization_config=None) == config


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"rope_scaling": None}, RELEASED),
        ({"rope_parameters": None}, RELEASED),
        ({"rope_scaling": None, "rope_parameters": None}, RELEASED),
        ({"rope_scaling": {}}, RELEASED),
        ({"rope_scaling": YARN}, RELEASED),
        ({"rope_parameters": {**YARN, "rope_theta": 150000}}, RELEASED),
        ({"rope_scaling": {}, "rope_theta": 7.0}, RopeConfig(7.0)),
        ({"rope_theta": 10000.0}, RopeConfig(10000.0)),
        ({"rope_parameters": {}}, PLAIN),
        ({"rope_scaling": {"rope_type": "default"}}, PLAIN),
        ({"rope_scaling": {"rope_theta": 5.0}}, RopeConfig(5.0, "default", 1.0)),
        ({"rope_parameters": {}, "rope_theta": 7.0}, RopeConfig(7.0, "default", 1.0)),
        # The settings' own rope_theta takes precedence, as does rope_scaling over rope_parameters as a whole.
        ({"rope_theta": 10.0, "rope_scaling": {**YARN, "rope_theta": 500.0}}, RopeConfig(500.0)),
        (
            {"rope_scaling": {**YARN, "factor": 16.0}, "rope_parameters": {**YARN, "rope_theta": 7.0}},
            RopeConfig(150000.0, factor=16.0),
        ),
        ({"rope_scaling": {}, "rope_parameters": {**YARN, "rope_theta": 500.0}}, RopeConfig(500.0)),
        ({"rope_scaling": {"rope_type": "default"}, "rope_parameters": {**YARN, "rope_theta": 7.0}}, PLAIN),
        # The original context length defaults to max_position_embeddings, and truncate to true.
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 32.0}, "initial_context_length": 512},
            RopeConfig(original_max_position_embeddings=131072, truncate=True),
        ),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 2}, "max_position_embeddings": 8192},
            RopeConfig(factor=2.0, original_max_position_embeddings=8192, truncate=True),
        ),
        ({"rope_scaling": {**YARN, "factor": None}}, RopeConfig(factor=131072 / 4096)),
        ({"rope_scaling": {**YARN, "beta_fast": None, "beta_slow": None}}, RELEASED),
        (
            {"rope_scaling": {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}},
            RopeConfig(factor=2.0, original_max_position_embeddings=64, truncate=True),
        ),
        ({"rope_scaling": {**YARN, "type": "linear"}}, RELEASED),
        ({"rope_scaling": {**YARN, "attention_factor": 1.5}}, RopeConfig(attention_factor=1.5)),
        ({"rope_scaling": {**YARN, "mscale": 0.7}}, RELEASED),
        (
            {"rope_scaling": {**YARN, "attention_factor": 1.5, "mscale": 0.7, "mscale_all_dim": 1.0}},
            RopeConfig(attention_factor=1.5),
        ),
        (
            {"rope_scaling": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.0}},
            RopeConfig(attention_factor=(0.07 * math.log(32) + 1) / (0.1 * math.log(32) + 1)),
        ),
        ({"original_max_position_embeddings": 4096, "partial_rotary_factor": 1.0}, RELEASED),
    ],
)
def test_rotary_settings_are_read_as_in_transformers(fields: dict[str, Any], expected: RopeConfig) -> None:
    rope = read(**fields).rope
    if expected.attention_factor is not None:
        assert rope.attention_factor == pytest.approx(expected.attention_factor, rel=1e-12)
        expected = RopeConfig(**{**vars(expected), "attention_factor": rope.attention_factor})
    assert rope == expected
    assert ModelConfig.from_dict(read(**fields).to_dict()).rope == expected


@pytest.mark.parametrize(
    ("named", "fields"),
    [
        *(
            ("rope_scaling.rope_type", {"rope_scaling": {"rope_type": kind, "factor": 2.0}})
            for kind in ("linear", "dynamic", "llama3", "longrope", "proportional", "nonsense", None, 3, ["yarn"])
        ),
        ("rope_scaling.rope_type", {"rope_scaling": {"type": "linear", "factor": 2.0}}),
        ("rope_scaling.beta_fast", {"rope_scaling": {k: v for k, v in YARN.items() if k != "rope_type"}}),
        ("rope_scaling.factor", {"rope_scaling": {"rope_type": "default", "factor": 32.0}}),
        ("rope_scaling.short_factor", {"rope_scaling": {**YARN, "short_factor": [1.0]}}),
        ("rope_scaling.full_attention", {"rope_scaling": {"full_attention": YARN}}),
        (
            "rope_parameters.full_attention",
            {"rope_parameters": {"full_attention": YARN, "sliding_attention": {"rope_type": "default"}}},
        ),
        ("rope_parameters.sliding_attention", {"rope_parameters": {**YARN, "sliding_attention": None}}),
        ("rope_parameters.other", {"rope_parameters": {**YARN, "other": {}}}),
        *(("rope_scaling", {"rope_scaling": value}) for value in ("yarn", [YARN], 1, False, "")),
        *(("rope_parameters", {"rope_parameters": value}) for value in ("yarn", [], 0)),
        ("factor", {"rope_scaling": {"rope_type": "yarn", "original_max_position_embeddings": 4096}}),
        ("factor", {"rope_scaling": {**YARN, "factor": None}, "max_position_embeddings": 64}),
        *(
            (name, {"rope_scaling": {**YARN, name: value}})
            for name in ("factor", "beta_fast", "beta_slow", "attention_factor", "rope_theta")
            for value in (0, -1, "8", True, float("nan"), float("inf"), 10**400, [])
        ),
        ("factor", {"rope_scaling": {**YARN, "factor": 0.5}}),
        ("beta_fast", {"rope_scaling": {**YARN, "beta_fast": 1.0, "beta_slow": 2.0}}),
        ("mscale", {"rope_scaling": {**YARN, "mscale": "0.7", "mscale_all_dim": 1.0}}),
        ("truncate", {"rope_scaling": {**YARN, "truncate": 1}}),
        ("truncate", {"rope_scaling": {**YARN, "truncate": None}}),
        *(
            ("original_max_position_embeddings", {"rope_scaling": {**YARN, name: value}})
            for name in ("original_max_position_embeddings",)
            for value in (None, 0, 4096.0, "4096", 4)
        ),
        # transformers would compute the frequencies with this value.
        ("original_max_position_embeddings", {"rope_scaling": YARN, "original_max_position_embeddings": 1024}),
        ("rope_theta", {"rope_theta": None}),
        ("rope_theta", {"rope_theta": 1}),
        ("rope_theta", {"rope_scaling": {**YARN, "rope_theta": None}}),
        ("partial_rotary_factor", {"partial_rotary_factor": 0.5}),
        ("partial_rotary_factor", {"rope_scaling": {**YARN, "partial_rotary_factor": 0.5}}),
    ],
)
def test_unsupported_rotary_settings_are_rejected(named: str, fields: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=rf"^config\.json: {named}: expected .*, found .*$"):
        read(**fields)


@pytest.mark.parametrize(
    ("named", "fields"),
    [
        ("model_type", {"model_type": "llama"}),
        ("model_type", {"model_type": None}),
        ("hidden_act", {"hidden_act": "gelu"}),
        ("hidden_act", {"hidden_act": None}),
        ("swiglu_alpha", {"swiglu_alpha": 2.0}),
        ("attention_bias", {"attention_bias": False}),
        ("attention_bias", {"attention_bias": 1}),
        ("attention_bias", {"attention_bias": None}),
        ("tie_word_embeddings", {"tie_word_embeddings": True}),
        ("tie_word_embeddings", {"tie_word_embeddings": None}),
        ("tie_word_embeddings", {"tie_word_embeddings": "false"}),
        ("layer_types", {"layer_types": ["full_attention"]}),
        ("layer_types", {"layer_types": []}),
        ("layer_types", {"layer_types": ["chunked_attention"] * 3}),
        ("layer_types", {"layer_types": [["full_attention"]] * 3}),
        ("layer_types", {"layer_types": "full_attention"}),
        ("sliding_window", {"sliding_window": None}),
        ("sliding_window", {"sliding_window": 0}),
        ("swiglu_limit", {"swiglu_limit": None}),
        ("rms_norm_eps", {"rms_norm_eps": 0}),
        ("head_dim", {"head_dim": None}),
        ("head_dim", {"head_dim": 63}),
        ("num_experts", {"num_experts": 8}),
        ("experts_per_token", {"experts_per_token": 2}),
        ("quantization_config", {"quantization_config": "mxfp4"}),
        (r"quantization_config\.quant_method", {"quantization_config": {}}),
        (r"quantization_config\.quant_method", {"quantization_config": {"quant_method": "bitsandbytes"}}),
        ("compression_config", {"compression_config": {"quant_method": "compressed-tensors"}}),
        *(("eos_token_id", {"eos_token_id": value}) for value in ("a", -1, True, [1, None], 1.0, 2**31)),
        *((name, {name: value}) for name in BARE if name != "model_type" for value in (None, 0, 8.0, "8", True)),
    ],
)
def test_unsupported_values_are_rejected(named: str, fields: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=rf"^config\.json: {named}: expected .*, found .*$"):
        read(**fields)


@pytest.mark.parametrize("name", [name for name in BARE if name != "model_type"])
def test_dimensions_are_required(name: str) -> None:
    fields = {key: value for key, value in BARE.items() if key != name}
    with pytest.raises(
        CheckpointError, match=f"^config.json: {name}: expected a positive integer, found nothing$"
    ):
        ModelConfig.from_dict(fields, "config.json")


def test_aliases_and_a_null_sliding_window() -> None:
    fields = {key: value for key, value in BARE.items() if not key.startswith(("num_local", "num_experts"))}
    config = ModelConfig.from_dict(fields | {"num_experts": 8, "experts_per_token": 2})
    assert (config.num_local_experts, config.num_experts_per_tok) == (8, 2)
    assert read(sliding_window=None, layer_types=["full_attention"] * 3).window(0) is None


@given(
    st.dictionaries(
        st.sampled_from(
            [*BARE, *YARN, "rope_theta", "rope_scaling", "rope_parameters", "num_experts", "head_dim"]
        ),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
            lambda inner: (
                st.lists(inner, max_size=2)
                | st.dictionaries(st.sampled_from([*YARN, "rope_theta", "mscale"]), inner, max_size=4)
            ),
            max_leaves=6,
        ),
        max_size=4,
    )
)
@example({"rope_scaling": {**YARN, "beta_fast": 1e38, "beta_slow": 1e-38}})
@example({"rope_scaling": {**YARN, "rope_theta": 1.0000001, "truncate": True}})
def test_any_fields_are_read_or_rejected_in_one_line(fields: dict[str, Any]) -> None:
    openai = OPENAI_FIELDS | fields
    for given_ in (BARE | fields, openai):
        config, refused = None, ""
        try:
            config = ModelConfig.from_dict(given_, "config.json")
        except CheckpointError as error:
            refused = str(error)
        assert len(refused.splitlines()) == (config is None)
        assert config is None or ModelConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("num_experts", "x", "num_experts: expected a positive integer, found 'x'"),
        ("experts_per_token", 64, "experts_per_token: expected at most num_local_experts"),
        ("initial_context_length", 10**400, "initial_context_length: expected a positive integer, found 1000"),
        ("rope_scaling_factor", "x", "rope_scaling_factor: expected a number from 1, found 'x'"),
    ],
)
def test_errors_have_the_names_of_the_file(name: str, value: Any, shown: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        ModelConfig.from_dict(OPENAI_FIELDS | {name: value}, "config.json")
    assert str(caught.value).startswith(f"config.json: {shown}")
    fields = {key: value for key, value in BARE.items() if key != "num_local_experts"}
    with pytest.raises(
        CheckpointError, match=r"^config.json: num_experts: expected a positive integer, found 'x'$"
    ):
        ModelConfig.from_dict(fields | {"num_experts": "x"}, "config.json")


def test_a_directory_named_config_json(tmp_path: Path) -> None:
    (tmp_path / "config.json").mkdir()
    for read_ in (ModelConfig.from_file, open_checkpoint):
        with pytest.raises(CheckpointError) as caught:
            read_(tmp_path)
        assert str(caught.value) == f"{tmp_path / 'config.json'}: cannot be read: Is a directory"


# End tokens. The shipped model's: <|return|> 1017 and <|call|> 1023; its <|endoftext|> is 1016.

END = 1016


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (tmp_path / name).symlink_to(EMBEDDED / name)
    return tmp_path


def ends(directory: Path, text: str | None) -> tuple[int, ...]:
    path = directory / "generation_config.json"
    path.unlink(missing_ok=True)
    if text is not None:
        path.write_text(text)
    return ModelConfig.from_file(directory).with_generation_file(directory).eos_token_id


def test_generation_config_replaces_the_eos_tokens(checkpoint: Path) -> None:
    """Its eos_token_id replaces that of config.json, as in transformers; without one, config.json's applies."""
    assert ends(checkpoint, '{"eos_token_id": [1017, 1016, 1023]}') == (1017, 1016, 1023)
    assert ends(checkpoint, '{"eos_token_id": 5}') == (5,)
    assert ends(checkpoint, '\ufeff{"eos_token_id": 5}') == (5,)
    for without in (None, "{}", '{"eos_token_id": null}', '{"eos_token_id": []}', '{"temperature": 1.0}'):
        assert ends(checkpoint, without) == (1017, 1023)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ('{"eos_token_id": 1024}', "eos_token_id: expected ids below config.json's vocab_size 1024, found 1024"),
        ('{"eos_token_id": [5, 200002]}', "eos_token_id: .* found 200002"),
        ('{"eos_token_id": "5"}', "eos_token_id: expected a token id or a list of them, found '5'"),
        ('{"eos_token_id": [-1]}', "eos_token_id: expected a token id"),
        ('{"eos_token_id": true}', "eos_token_id: expected a token id"),
        ("[5]", "expected a JSON object, found list"),
        ("null", "expected a JSON object, found null"),
        ("", "not valid JSON"),
        ("{", "not valid JSON"),
    ],
)
def test_a_broken_generation_config_is_one_line(checkpoint: Path, text: str, named: str) -> None:
    (checkpoint / "generation_config.json").write_text(text)
    with pytest.raises(CheckpointError, match=rf"^{checkpoint}/generation_config\.json: {named}[^\n]*$"):
        load_model(checkpoint)


def test_a_generation_config_that_cannot_be_read_is_one_line(checkpoint: Path) -> None:
    (checkpoint / "generation_config.json").mkdir()
    with pytest.raises(CheckpointError, match=r"generation_config\.json: cannot be read"):
        load_model(checkpoint)


def test_eos_tokens_outside_the_vocabulary_are_rejected(checkpoint: Path) -> None:
    fields = json.loads((EMBEDDED / "config.json").read_text()) | {"eos_token_id": [5, 200002]}
    (checkpoint / "config.json").unlink()
    (checkpoint / "config.json").write_text(json.dumps(fields))
    with pytest.raises(CheckpointError, match=r"config\.json: eos_token_id: expected ids below .*, found 200002$"):
        LLM(checkpoint)


@pytest.mark.parametrize("layout", ["hf", "orbax"])
def test_every_layout_keeps_the_eos_tokens(checkpoint: Path, tmp_path: Path, layout: Layout) -> None:
    (checkpoint / "generation_config.json").write_text(json.dumps({"eos_token_id": [1017, END]}))
    convert(checkpoint, tmp_path / "converted", layout)
    with open_checkpoint(tmp_path / "converted") as converted:
        assert converted.config.eos_token_id == (1017, END)


def test_eos_tokens_end_generation(checkpoint: Path) -> None:
    (checkpoint / "generation_config.json").write_text(json.dumps({"eos_token_id": [1017, END, 7]}))
    llm = LLM(checkpoint, engine=EngineOptions(max_num_seqs=1))
    tokenizer = llm.tokenizer
    assert tokenizer is not None

    def generated(token: int, **more: Any) -> tuple[int, str | None, str | None]:
        params = SamplingParams(temperature=0, max_tokens=2, logit_bias={token: 1000}, **more)
        output = llm.generate("x", params)[0].outputs[0]
        return len(output.token_ids), output.finish_reason, output.text

    assert generated(END) == (1, "stop", "")
    # An ordinary token that is an EOS token is not part of the text.
    assert generated(7) == generated(8, stop_token_ids=[8]) == (1, "stop", "")
    assert generated(7, ignore_eos=True) == (2, "length", tokenizer.decode([7, 7]))
    # Harmony's stop tokens still apply, although the file does not list this one.
    assert generated(1023) == (1, "stop", "")


def test_the_token_that_ends_a_chat_is_not_shown() -> None:
    tokenizer = Tokenizer.from_dir(EMBEDDED)
    special = tokenizer.special_tokens
    head = [special["<|channel|>"], *tokenizer.encode("final"), special["<|message|>"]]
    for end in (END, special["<|return|>"], *tokenizer.encode("a")):
        running = _RunningRequest(Request("r", [], SamplingParams(), chat=True), tokenizer)
        for token in (*head, *tokenizer.encode("Hi there")):
            running.push([TokenEvent("r", 0, token)])
        progress = running.push([TokenEvent("r", 0, end, finish_reason="stop")])
        assert progress.completion.text == "Hi there"
        assert progress.completion.message == {"role": "assistant", "content": "Hi there"}
        assert progress.completion.finish_reason == "stop"
        assert progress.completion.token_ids[-1] == end
        assert not progress.completion.malformed
