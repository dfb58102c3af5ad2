"""Structured output: the answer follows the grammar for any model output, and no other message can replace it."""

import json
import random
import re
import sys
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import openai_harmony
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gptoss_jax import LLM, SamplingParams, StructuredOutputsParams
from gptoss_jax.checkpoints.loading import EMBEDDED, random_model
from gptoss_jax.engine.engine import Engine
from gptoss_jax.engine.options import EngineOptions
from gptoss_jax.engine.outputs import Load
from gptoss_jax.errors import UsageError
from gptoss_jax.model.config import ModelConfig
from gptoss_jax.model.gpt_oss import GptOss
from gptoss_jax.text.harmony import function_tools, parse, to_openai
from gptoss_jax.text.structured import GrammarCompiler, check
from gptoss_jax.text.tokenizer import Tokenizer
from gptoss_jax.types import ChatScope, Scope, TokenConstraint
from tests.engine.schedules import overcommit
from tools.goldens.harmony_goldens import load_oracle
from tools.goldens.o200k import install

SCHEMA = {
    "type": "object",
    "properties": {"sum": {"type": "integer", "minimum": 0, "maximum": 999}, "sure": {"type": "boolean"}},
    "required": ["sum", "sure"],
    "additionalProperties": False,
}
GRAMMARS = {
    "json": ({"json": SCHEMA}, lambda text: set(json.loads(text)) == {"sum", "sure"}),
    "json text": ({"json": json.dumps(SCHEMA)}, lambda text: 0 <= json.loads(text)["sum"] <= 999),
    "regex": ({"regex": "[a-f]{2,5}-[0-9]{1,3}é"}, re.compile("[a-f]{2,5}-[0-9]{1,3}é").fullmatch),
    "choice": ({"choice": ['yes "sir"', "no\n", "<|end|>"]}, ['yes "sir"', "no\n", "<|end|>"].__contains__),
    "lark": ({"grammar": 'start: "It is " /[0-9]{2}/ "."'}, re.compile(r"It is \d\d\.").fullmatch),
    "gbnf": ({"grammar": 'root ::= "x" [0-9] ("," "y" [a-c])?'}, re.compile(r"x\d(,y[a-c])?").fullmatch),
}
VOCABULARY = 1064
NO_CALLS, ANY_CALLS = ChatScope("none"), ChatScope()
QUESTION = [{"role": "user", "content": "What is 17 + 25?"}]


def constrained(grammar: dict, **more: object) -> SamplingParams:
    return SamplingParams(
        **{"max_tokens": 100, "temperature": 0, "structured_outputs": StructuredOutputsParams(**grammar)} | more
    )


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer.from_dir(EMBEDDED)


@cache
def compiler() -> GrammarCompiler:
    # The model has more outputs than the tokenizer has tokens.
    return GrammarCompiler(tokenizer(), VOCABULARY, eos())


def eos() -> list[int]:
    return [tokenizer().encode_special(name) for name in ("<|return|>", "<|call|>")]


@cache
def model() -> GptOss:
    config = ModelConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        num_local_experts=3,
        num_experts_per_tok=2,
        layer_types=("full_attention",),
        max_position_embeddings=512,
        eos_token_id=(),
    )
    return random_model(config, dtype="float32")


def run(requests: list[SamplingParams], **options: object) -> tuple[list[list[list[int]]], Load]:
    """The completions of similar prompts, run in one batch."""
    settings = {
        "max_num_seqs": 4,
        "page_size": 16,
        "long_prefill_token_threshold": 64,
        "max_num_batched_tokens": 64,
    } | options
    engine = overcommit(Engine(model(), EngineOptions(**settings), eos_token_ids=eos(), constrain=compiler()))
    tokens = [[[] for _ in range(params.n)] for params in requests]
    for name, params in enumerate(requests):
        # A scope without calls would constrain a free request as well.
        scope = NO_CALLS if name % 2 and params.structured_outputs else "text"
        engine.add(str(name), range(1, 42 + name), params, scope)
    while engine.unfinished:
        for event in engine.step():
            tokens[int(event.request_id)][event.index].append(event.token_id)
    assert engine.load.pages_used == 0
    return tokens, engine.load


def babble(
    grammar: dict | None, scope: Scope, seed: int, most: int = 150, likely: str = ""
) -> tuple[list[int], bool]:
    """The output of a model that samples allowed tokens, preferring special ones, and whether it ended.

    It also prefers the characters in `likely`.
    """
    rng, marks = random.Random(seed), set(tokenizer().special_tokens.values())
    marks |= {tokenizer().encode(character)[0] for character in likely}
    constraint = compiler()(None if grammar is None else StructuredOutputsParams(**grammar), scope)
    tokens: list[int] = []
    while len(tokens) < most:
        words = np.full(-(-VOCABULARY // 32), 0xFFFFFFFF, np.uint32)
        constraint.fill(words)
        allowed = np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")).tolist()
        assert allowed
        assert max(allowed) < tokenizer().vocab_size
        special = [token for token in allowed if token in marks]
        tokens.append(rng.choice(special if special and rng.random() < 0.3 else allowed))
        constraint.accept(tokens[-1])
        if tokens[-1] in eos():
            return tokens, True
    return tokens, False


@settings(max_examples=60)
@given(st.sampled_from(sorted(GRAMMARS)), st.sampled_from([NO_CALLS, ANY_CALLS]), st.integers(0, 10**9))
def test_no_output_can_violate_the_grammar(name: str, scope: ChatScope, seed: int) -> None:
    grammar, fits = GRAMMARS[name]
    tokens, ended = babble(grammar, scope, seed)
    result = parse(tokens, tokenizer())
    assert all(message.channel != "final" for message in result.messages[:-1])
    if not ended:
        return
    assert not [problem for problem in result.malformed if "UTF-8" not in problem]
    assert {message.channel for message in result.messages} <= {"analysis", "commentary", "final"}
    assert {message.role for message in result.messages} == {"assistant"}
    last = result.messages[-1]
    if last.stop == "<|call|>":
        assert scope == ANY_CALLS
        [call] = to_openai([last])["tool_calls"]
        assert call["function"]["name"]
        return
    assert last.channel == "final"
    assert last.stop == "<|return|>"
    assert fits(last.text)
    assert scope != NO_CALLS or "tool_calls" not in to_openai(result.messages)


@settings(max_examples=20)
@given(st.sampled_from(sorted(GRAMMARS)), st.integers(0, 10**9))
def test_text_scope_constrains_from_the_first_token(name: str, seed: int) -> None:
    grammar, fits = GRAMMARS[name]
    tokens, ended = babble(grammar, "text", seed)
    assert not ended or fits(tokenizer().decode(tokens[:-1]))


def masked(text: str, scope: ChatScope = ANY_CALLS) -> str:
    """The rest of `text` from the first token that the mask of a chat does not allow."""
    parts = re.split(r"(<\|[a-z_]+\|>)", text)
    marks = tokenizer().special_tokens
    tokens = [token for part in parts for token in ([marks[part]] if part in marks else tokenizer().encode(part))]
    constraint = compiler()(StructuredOutputsParams(json_object=True), scope)
    return tokenizer().decode(tokens[allowed(constraint, tokens) :])


def allowed(constraint: TokenConstraint, tokens: list[int]) -> int:
    """The number of leading tokens that the masks allow."""
    for index, token in enumerate(tokens):
        words = np.full(-(-VOCABULARY // 32), 0xFFFFFFFF, np.uint32)
        constraint.fill(words)
        if not words[token // 32] >> (token % 32) & 1:
            return index
        constraint.accept(token)
    return len(tokens)


@given(st.from_regex(r"[\w.-]+", fullmatch=True).filter(lambda name: not name.startswith("functions.")))
@example("größe")
@example("天気")
@example("𝒙½")
@example(".")
@example("user")
@example("analysis")
def test_any_valid_tool_name_can_be_called(name: str) -> None:
    function_tools([{"name": name}])
    for header in (
        f" to=functions.{name}<|channel|>commentary <|constrain|>json",
        f"<|channel|>commentary to=functions.{name} <|constrain|>json",
        f"<|channel|>analysis to=functions.{name} code",
    ):
        for scope in (ANY_CALLS, ChatScope("required", ((f"functions.{name}", None),))):
            assert masked(f"{header}<|message|>{{}}<|call|>", scope) == ""


@pytest.mark.parametrize("name", ["browser.search", "browser.open", "browser.find", "python"])
def test_built_in_tools_can_be_called(name: str) -> None:
    assert masked(f"<|channel|>analysis to={name} code<|message|>1<|call|>") == ""


@pytest.mark.parametrize(
    "name",
    [
        "",
        "functions",
        "functions.",
        "browser.",
        "python.",
        "all",
        "user",
        "assistant",
        "f(",
        "functions.a/b",
        "a\x00",
        "a\x85b",
        "a\u3000b",
    ],
)
def test_invalid_tool_names_cannot_be_called(name: str) -> None:
    assert masked(f" to={name}<|channel|>commentary<|message|>{{}}<|call|>").endswith("{}<|call|>")
    assert masked(f"<|channel|>commentary to={name} <|constrain|>json<|message|>{{}}<|call|>").endswith(
        "{}<|call|>"
    )


WEATHER = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city"],
    "additionalProperties": False,
}
ARGUMENTS = {
    "functions.weather": json.dumps(WEATHER),
    "functions.weather_now": json.dumps({"type": "object"}),
    "functions.größe.2": None,
    "browser.search": json.dumps(
        {"type": "object", "properties": {"query": {"type": "string", "maxLength": 3}}, "required": ["query"]}
    ),
    "python": None,
}
SCOPES = st.builds(
    lambda calls, names, parallel: ChatScope(calls, tuple((name, ARGUMENTS[name]) for name in names), parallel),
    st.sampled_from(["none", "auto", "required"]),
    st.lists(st.sampled_from(sorted(ARGUMENTS)), min_size=1, unique=True),
    st.booleans(),
)


def assert_arguments(recipient: str, text: str) -> None:
    """The content of a call follows the tool's schema."""
    if ARGUMENTS[recipient] is None:
        return
    arguments = json.loads(text)
    assert isinstance(arguments, dict)
    if recipient == "functions.weather":
        assert arguments.keys() - {"days"} == {"city"}
        assert arguments["city"] in ("Paris", "Rome")
        assert arguments.get("days", 1) in range(1, 10)
    elif recipient == "browser.search":
        assert len(arguments["query"]) <= 3


@cache
def oracle() -> openai_harmony.HarmonyEncoding:
    with tempfile.TemporaryDirectory() as directory:
        install(Path(directory))
        return load_oracle()


def read(tokens: list[int]) -> list[openai_harmony.Message]:
    """The messages of a completion as openai-harmony reads them, from the released vocabulary's tokens."""
    text = tokenizer().decode(tokens)
    return oracle().parse_messages_from_completion_tokens(
        oracle().encode(text, allowed_special="all"), openai_harmony.Role.ASSISTANT
    )


@settings(max_examples=150)
@given(SCOPES, st.sampled_from([None, "json", "regex"]), st.integers(0, 10**9))
def test_no_output_can_violate_the_scope(scope: ChatScope, name: str | None, seed: int) -> None:
    grammar, fits = GRAMMARS[name] if name else (None, lambda text: True)
    tokens, ended = babble(grammar, scope, seed, most=400, likely='{}"')
    result = parse(tokens, tokenizer())
    messages = result.messages if ended else result.messages[:-1]
    called = [message.recipient is not None for message in messages]
    for message in messages:
        assert message.channel in ("analysis", "commentary", "final")
        assert message.recipient is None or message.recipient in dict(scope.tools)
        if message.recipient is not None:
            assert_arguments(message.recipient, message.text)
    assert scope.calls != "none" or not any(called)
    assert scope.parallel or not any(called[:-1])
    assert all(message.channel != "final" for message in messages[:-1])
    before = [message.channel for message in messages[: called.index(True) if any(called) else None]]
    assert scope.calls != "required" or sorted(before) in (
        [],
        ["analysis"],
        ["commentary"],
        ["analysis", "commentary"],
    )
    if not ended:
        return
    assert not [problem for problem in result.malformed if "UTF-8" not in problem]
    assert scope.calls != "required" or any(called)
    assert messages[-1].stop == ("<|call|>" if called[-1] else "<|return|>")
    assert called[-1] or (messages[-1].channel == "final" and fits(messages[-1].text))
    assert [message.recipient for message in read(tokens)] == [message.recipient for message in messages]


@pytest.mark.parametrize("calls", ["auto", "required"])
@pytest.mark.parametrize("parallel", [False, True])
def test_most_outputs_end(calls: str, parallel: bool) -> None:
    """The properties above are thus not those of truncated outputs alone."""
    scope = ChatScope(calls, tuple(ARGUMENTS.items()), parallel)
    runs = [babble(None, scope, seed, most=400, likely='{}"') for seed in range(20)]
    assert sum(ended for _, ended in runs) >= 12
    recipients = {message.recipient for tokens, _ in runs for message in parse(tokens, tokenizer()).messages}
    assert len(recipients - {None}) > 3


CALL = '<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{"city": "Rome"}'
THOUGHT = "<|channel|>analysis<|message|>Let me see.<|end|><|start|>assistant"
PREAMBLE = "<|channel|>commentary<|message|>I'll look.<|end|><|start|>assistant"
ANSWER = "<|channel|>final<|message|>{}<|return|>"


@pytest.mark.parametrize(
    ("calls", "parallel", "text", "rest"),
    [
        ("none", True, f"{THOUGHT}{PREAMBLE}{ANSWER}", ""),
        ("none", True, CALL, " to=functions.weather"),
        ("auto", True, f"{THOUGHT}{ANSWER}", ""),
        ("auto", True, f"{THOUGHT}{CALL}<|end|><|start|>assistant{CALL}<|call|>", ""),
        ("auto", False, f"{THOUGHT}{CALL}<|call|>", ""),
        ("auto", False, f"{THOUGHT}{CALL}<|end|>", "<|end|>"),
        ("required", True, f"{THOUGHT}{PREAMBLE}{CALL}<|call|>", ""),
        ("required", True, f"{PREAMBLE}{THOUGHT}{CALL}<|call|>", ""),
        ("required", True, f"{THOUGHT}{THOUGHT}", "<|message|>Let"),
        ("required", True, f"{PREAMBLE}{PREAMBLE}", "<|message|>I"),
        ("required", True, f"{THOUGHT}{PREAMBLE}{ANSWER}", "final<|message|>"),
        ("required", True, f"{CALL}<|end|><|start|>assistant{THOUGHT}{THOUGHT}{ANSWER}", ""),
        ("auto", True, f"{THOUGHT}{THOUGHT}{PREAMBLE}{PREAMBLE}{ANSWER}", ""),
        ("required", True, f"{THOUGHT}{ANSWER}", "final<|message|>"),
        ("required", True, f"{PREAMBLE}{ANSWER}", "final<|message|>"),
        ("required", True, f"{THOUGHT}{CALL}<|end|><|start|>assistant{ANSWER}", ""),
        ("required", True, f"{THOUGHT}{CALL}<|return|>", "<|return|>"),
        ("required", True, CALL.replace("Rome", "Oslo"), "Oslo"),
        ("required", True, CALL.replace("}", ', "days": 0}'), "0}"),
        ("required", True, CALL.replace("weather", "weatherman"), "man"),
        ("required", True, CALL.replace("functions.", ""), "weather"),
        ("required", True, CALL.replace("json", "code"), "code"),
        ("required", True, CALL.replace(" <|constrain|>json", ""), "<|message|>"),
        ("required", True, CALL.replace('{"city": "Rome"}', "<|call|>"), "<|call|>"),
        ("required", True, " to=functions.weather<|channel|>commentary<|constrain|>json<|message|>{", ""),
        ("required", True, "<|channel|>analysis to=python code<|message|>1 + 1<|call|>", ""),
        ("required", True, '<|channel|>analysis to=browser.search code<|message|>{"query": "a"}<|call|>', ""),
        ("required", True, '<|channel|>analysis to=browser.search code<|message|>{"query": "abcd"}', "d"),
    ],
)
def test_what_a_scope_allows(calls: str, parallel: bool, text: str, rest: str) -> None:
    stopped = masked(text, ChatScope(calls, tuple(ARGUMENTS.items()), parallel))
    # A token of the vocabulary may join characters before or after the first that is not allowed.
    assert stopped.startswith(rest) if rest else not stopped


def test_a_schema_that_cannot_be_enforced_is_rejected_by_the_name_of_the_tool() -> None:
    scope = ChatScope(tools=(("functions.f", json.dumps({"type": "object", "not": {"required": ["a"]}})),))
    with pytest.raises(UsageError, match=r"^tools: functions\.f: .*not"):
        compiler()(None, scope)


@pytest.mark.slow
def test_answer_follows_the_grammar_after_unchanged_reasoning() -> None:
    # Fixed sizes, so that few step shapes are compiled.
    llm = LLM(engine=EngineOptions(max_num_seqs=1, page_size=256, enable_prefix_caching=False))
    params = [SamplingParams(max_tokens=100, temperature=0)]
    params += [constrained(grammar) for grammar, _ in GRAMMARS.values()]
    free, *bound = (output.outputs[0] for output in llm.chat([QUESTION] * len(params), params))
    for completion, (_, fits) in zip(bound, GRAMMARS.values(), strict=True):
        assert completion.finish_reason == "stop"
        assert fits(completion.text)
        assert completion.message["thinking"] == free.message["thinking"]
        assert not completion.malformed
    [output] = llm.generate("What is 17 + 25?", constrained({"regex": "[0-9]{3}"}))
    assert re.fullmatch("[0-9]{3}", output.outputs[0].text)
    assert output.outputs[0].finish_reason == "stop"


BATCH = [
    constrained(GRAMMARS["json"][0], n=3, temperature=2.0, seed=5),
    constrained(GRAMMARS["regex"][0], temperature=1.0, seed=1, max_tokens=50),
    constrained(GRAMMARS["json"][0], temperature=2.0, seed=6),
    SamplingParams(max_tokens=40, temperature=0),
]


@pytest.mark.slow
def test_constraints_hold_through_preemption() -> None:
    together, load = run(BATCH, kv_cache_memory=30_000, enable_prefix_caching=False)
    for completion in together[0] + together[2]:
        assert GRAMMARS["json"][1](tokenizer().decode(completion[:-1]))
    assert load.preemptions > 0


@pytest.mark.long
def test_answer_does_not_depend_on_the_batch() -> None:
    together, _ = run(BATCH)
    tokens, load = run(BATCH, kv_cache_memory=30_000, enable_prefix_caching=False, num_speculative_tokens=3)
    assert tokens == together
    assert load.preemptions > 0
    assert load.drafted > 0
    for name, params in enumerate(BATCH):
        others = [SamplingParams(max_tokens=1)] * name
        assert run([*others, params])[0][name] == together[name]


@pytest.mark.parametrize(
    ("grammar", "named"),
    [
        ({}, "found none"),
        ({"regex": "a", "json_object": True}, "regex and json_object"),
        ({"regex": 5}, "structured_outputs.regex"),
        ({"choice": []}, "structured_outputs.choice"),
        ({"choice": "abc"}, "structured_outputs.choice"),
        ({"regex": "(a"}, "unclosed group"),
        ({"json": "{"}, "not valid JSON"),
        ({"json": "[]"}, "found list"),
        ({"json": {"type": "strange"}}, "strange"),
        ({"json": {"type": "string", "contains": 3}}, "contains"),
        ({"json": {"enum": {1}}}, "structured_outputs.json"),
        ({"grammar": "start: nothing"}, "nothing"),
        ({"grammar": "root ::= ("}, "structured_outputs.grammar"),
    ],
)
def test_invalid_grammar_is_rejected_in_one_line(grammar: dict, named: str) -> None:
    with pytest.raises(UsageError, match=re.escape(named)) as caught:
        check(StructuredOutputsParams(**grammar))
    assert "\n" not in str(caught.value)


# Formats of pydantic 2.14, of JSON Schema that llguidance lacks, of OpenAPI, and made-up ones.
ANNOTATIONS = [
    "password",
    "path",
    "file-path",
    "directory-path",
    "json-string",
    "uuid1",
    "uuid4",
    "binary",
    "base64",
    "base64url",
    "ipvanyaddress",
    "ipvanynetwork",
    "ipv4network",
    "ipv6network",
    "ipv4interface",
    "ipv6interface",
    "multi-host-uri",
    "name-email",
    "regex",
    "iri",
    "iri-reference",
    "uri-reference",
    "uri-template",
    "idn-email",
    "idn-hostname",
    "json-pointer",
    "relative-json-pointer",
    "byte",
    "int32",
    "int64",
    "float",
    "double",
    "x-ours",
    "",
    "Straße",
    'a"b',
]
PASSWORD = {"type": "string", "format": "password"}
PLACES = {
    "properties": {"type": "object", "properties": {"a": PASSWORD, "format": PASSWORD, "enum": PASSWORD}},
    "items": {"type": "array", "items": PASSWORD},
    "prefixItems": {"type": "array", "prefixItems": [PASSWORD], "items": False},
    "items and additionalItems": {"type": "array", "items": [PASSWORD], "additionalItems": PASSWORD},
    "additionalProperties": {"type": "object", "additionalProperties": PASSWORD},
    "patternProperties": {"type": "object", "patternProperties": {"^a$": PASSWORD}},
    "anyOf": {"anyOf": [PASSWORD, {"type": "null"}]},
    "oneOf": {"oneOf": [PASSWORD, {"type": "null"}]},
    "allOf": {"allOf": [PASSWORD, {"minLength": 2}]},
    "types": {"type": ["string", "null"], "format": "password"},
    "no type": {"format": "password"},
    "another type": {"type": "integer", "format": "int32"},
    "enum": {"type": "string", "enum": ["a", "b"], "format": "password"},
    "$defs": {"$ref": "#/$defs/format", "$defs": {"format": PASSWORD}},
    "definitions": {"$ref": "#/definitions/const", "definitions": {"const": PASSWORD}},
    "anywhere": {"$ref": "#/components/schemas/enum", "components": {"schemas": {"enum": PASSWORD}}},
    "a list": {"$ref": "#/ours/0", "ours": [PASSWORD]},
    "default": {"type": "object", "default": {"format": "password"}, "examples": [{"format": "password"}]},
}


@pytest.mark.parametrize("name", ANNOTATIONS)
def test_unknown_format_is_not_a_constraint(name: str) -> None:
    schema = {"type": "string", "format": name, "maxLength": 9}
    check(StructuredOutputsParams(json=schema))
    assert fits(schema, '"any text"')
    assert not fits(schema, '"more than nine"')
    assert fits({"type": "integer", "format": name}, "12")


@pytest.mark.parametrize("place", PLACES)
def test_unknown_format_is_ignored_anywhere_in_a_schema(place: str) -> None:
    check(StructuredOutputsParams(json=PLACES[place]))
    check(StructuredOutputsParams(json=json.dumps(PLACES[place])))
    check(StructuredOutputsParams(json=PLACES[place] | {"x-guidance": {"whitespace_flexible": False}}))
    with pytest.raises(UsageError, match="not"):
        # Other keywords that llguidance cannot enforce are still rejected.
        check(StructuredOutputsParams(json=PLACES[place] | {"not": {"minLength": 3}}))


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("date", "2024-02-29", "2024-13-01"),
        ("ipv4", "127.0.0.1", "127.0.0.256"),
        ("uuid", "123e4567-e89b-12d3-a456-426614174000", "123e4567"),
        ("email", "a@example.org", "a"),
    ],
)
def test_known_format_is_a_constraint(name: str, good: str, bad: str) -> None:
    schema = {
        "type": "object",
        "properties": {"format": {"type": "string", "format": name}},
        "required": ["format"],
    }
    for wrapped in (schema, {"anyOf": [schema]}, {"$ref": "#/$defs/a", "$defs": {"a": schema}}):
        assert fits(wrapped, f'{{"format": "{good}"}}')
        assert not fits(wrapped, f'{{"format": "{bad}"}}')


def test_values_that_look_like_a_format_are_kept() -> None:
    value = {"format": "password"}
    for schema in ({"const": value}, {"enum": [value]}, {"type": "object", "properties": {"a": {"const": value}}}):
        text = json.dumps(value if "properties" not in schema else {"a": value})
        assert fits(schema, text)
        assert not fits(schema, text.replace(json.dumps(value), "{}"))


def fits(schema: dict, text: str) -> bool:
    tokens = [*tokenizer().encode(text), tokenizer().encode_special("<|return|>")]
    return allowed(compiler()(StructuredOutputsParams(json=schema), "text"), tokens) == len(tokens)


@pytest.mark.parametrize(
    "more", [{"ignore_eos": True}, {"min_tokens": 5}, {"structured_outputs": {"regexp": "a"}}]
)
def test_settings_that_contradict_structured_outputs(more: dict) -> None:
    with pytest.raises(UsageError, match=r"min_tokens|ignore_eos|structured_outputs.regexp"):
        constrained({"regex": "a"}, **more)


def test_missing_library_is_reported_with_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(UsageError, match=r"gptoss-jax\[structured\]"):
        check(StructuredOutputsParams(regex="a"))
