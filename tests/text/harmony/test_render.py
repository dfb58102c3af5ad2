import json
from pathlib import Path
from typing import Any

import openai_harmony
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptoss_jax.errors import UsageError
from gptoss_jax.text import harmony
from gptoss_jax.text.harmony.json_messages import read_messages
from gptoss_jax.text.tokenizer import Tokenizer
from tools.goldens.harmony_goldens import parse_case, render_case

CASES = [json.loads(line) for line in (Path(__file__).parent / "golden" / "render.jsonl").open()]

texts = st.one_of(st.text(max_size=12), st.sampled_from(["<|end|>", "<|start|>assistant", "a\nb", "a\r\nb\n", ""]))
names = st.sampled_from(["query", "x y", "日", "content-type", "b", "a"])


# serde_json may round the last digit of a long decimal; it reads these exactly.
FLOATS = st.sampled_from([0.5, 1e-5, 1.5e-5, 1e15, 1e16, 1e-7, -1e22, 123.25, 1.0, -0.0, 1e300])


def schemas() -> st.SearchStrategy[Any]:
    """Mostly sensible schemas with every keyword that is rendered, and some keywords of wrong types."""
    scalars = st.one_of(st.none(), st.booleans(), st.integers(-9, 9), FLOATS, texts)
    notes = {
        "description": texts,
        "title": texts,
        "default": st.one_of(scalars, st.lists(scalars, max_size=2), st.dictionaries(texts, scalars, max_size=2)),
        "nullable": st.booleans(),
        "examples": st.lists(scalars, max_size=3),
    }
    kinds = st.sampled_from(["string", "number", "integer", "boolean", "array", "object", "null"])
    leaf = st.fixed_dictionaries(
        {},
        optional=notes
        | {
            "type": st.one_of(kinds, kinds, st.lists(kinds, max_size=3)),
            "enum": st.lists(st.one_of(texts, st.integers()), max_size=3),
        },
    )

    def deeper(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
        properties = st.dictionaries(names, inner, max_size=4)
        required = st.lists(names, max_size=3)
        return st.one_of(
            st.fixed_dictionaries({"type": st.just("array"), "items": inner}, optional=notes),
            st.fixed_dictionaries(
                {"type": st.just("object"), "properties": properties}, optional=notes | {"required": required}
            ),
            st.fixed_dictionaries({"oneOf": st.lists(inner, max_size=3)}, optional=notes),
        )

    return st.recursive(leaf, deeper, max_leaves=8)


functions = st.builds(
    lambda name, description, parameters: {"name": name, "description": description, "parameters": parameters},
    st.sampled_from(["f", "get_weather", "übersetzen"]),
    texts,
    st.one_of(st.none(), schemas()),
)
namespaces = st.dictionaries(
    st.sampled_from(["functions", "db"]),
    st.tuples(st.one_of(st.none(), texts), st.lists(functions, max_size=2)),
    max_size=2,
).map(
    lambda spaces: {name: {"name": name, "description": d, "tools": t} for name, (d, t) in spaces.items()} or None
)
text_parts = st.lists(st.builds(lambda text: {"type": "text", "text": text}, texts), max_size=2)
messages = st.one_of(
    st.builds(
        lambda identity, effort, date, cutoff, channels, tools: {
            "role": "system",
            "content": [
                {
                    "type": "system_content",
                    "model_identity": identity,
                    "reasoning_effort": effort,
                    "conversation_start_date": date,
                    "knowledge_cutoff": cutoff,
                    "channel_config": channels,
                    "tools": tools,
                }
            ],
        },
        st.one_of(st.none(), texts),
        st.sampled_from([None, "Low", "Medium", "High"]),
        st.one_of(st.none(), texts),
        st.one_of(st.none(), texts),
        st.one_of(
            st.none(),
            st.builds(
                lambda valid, required: {"valid_channels": valid, "channel_required": required},
                st.lists(texts, max_size=3),
                st.booleans(),
            ),
        ),
        namespaces,
    ),
    st.builds(
        lambda instructions, tools: {
            "role": "developer",
            "content": [{"type": "developer_content", "instructions": instructions, "tools": tools}],
        },
        st.one_of(st.none(), texts),
        namespaces,
    ),
    st.builds(
        lambda role, name, content, channel, recipient, kind: {
            "role": role,
            "name": name,
            "content": content,
            "channel": channel,
            "recipient": recipient,
            "content_type": kind,
        },
        st.sampled_from(["user", "assistant", "assistant", "assistant", "tool", "developer", "system"]),
        st.sampled_from([None, "functions.f", "bob"]),
        text_parts,
        st.sampled_from([None, "analysis", "analysis", "commentary", "final"]),
        st.sampled_from([None, None, "all", "functions.f", "assistant"]),
        st.sampled_from([None, None, "<|constrain|>json", "<|constrain|>", "code"]),
    ),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])
@pytest.mark.parametrize("key", ["messages", "harmony_json"])
def test_golden(case: dict, key: str, o200k: Tokenizer) -> None:
    given_messages = case["messages"] if key == "messages" else case["harmony_json"]["messages"]
    options = {"next_role": case["next_role"], "auto_drop_analysis": case["auto_drop_analysis"]}
    if "error" in case:
        with pytest.raises(UsageError, match=r"messages\[0\].content"):
            harmony.render_conversation(read_messages(given_messages), o200k, **options)
    else:
        tokens = harmony.render_conversation(read_messages(given_messages), o200k, **options)
        assert tokens == case["tokens"]
        assert o200k.decode(tokens) == case["text"]


def test_goldens_match_openai_harmony(oracle: openai_harmony.HarmonyEncoding) -> None:
    parse_cases = [json.loads(line) for line in (Path(__file__).parent / "golden" / "parse.jsonl").open()]
    assert [render_case(case, oracle) for case in CASES] == CASES
    assert [parse_case(case, oracle) for case in parse_cases] == parse_cases


@given(
    conversation=st.lists(messages, max_size=6),
    next_role=st.sampled_from(["assistant", "tool", "user"]),
    drop=st.booleans(),
)
@settings(max_examples=400)
def test_agrees_with_openai_harmony(
    conversation: list[dict], next_role: str, drop: bool, o200k: Tokenizer, oracle: openai_harmony.HarmonyEncoding
) -> None:
    case = {"harmony_json": {"messages": conversation}, "next_role": next_role, "auto_drop_analysis": drop}
    expected = render_case(case, oracle)
    if "error" in expected:
        with pytest.raises(UsageError, match=r"^messages\[\d\]"):
            harmony.render_conversation(read_messages(conversation), o200k, next_role=next_role)
        return
    tokens = harmony.render_conversation(
        read_messages(conversation), o200k, next_role=next_role, auto_drop_analysis=drop
    )
    assert o200k.decode(tokens) == expected["text"]
    assert tokens == expected["tokens"]


BEYOND_64_BITS = st.sampled_from([2**63, 2**64 - 1, 2**64, -(2**63), -(2**63) - 1, 10**20, -(10**22), 2**80])


def loose_schemas() -> st.SearchStrategy[Any]:
    """Schemas of any draft: booleans, nulls for absent values, and values that are invalid in some or all drafts."""
    scalars = st.one_of(st.none(), st.booleans(), st.integers(-9, 9), BEYOND_64_BITS, FLOATS, texts)
    anything = st.recursive(
        scalars,
        lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(texts, inner, max_size=2)),
        max_leaves=3,
    )
    kinds = st.sampled_from(["string", "number", "integer", "boolean", "array", "object", "null", "any", "file"])
    annotations = {
        key: st.one_of(strategy, st.none(), anything)
        for key, strategy in {
            "description": texts,
            "title": texts,
            "default": scalars,
            "nullable": st.booleans(),
            "examples": st.lists(texts, max_size=2),
            "enum": st.lists(texts, max_size=3),
            "format": texts,
        }.items()
    }

    def deeper(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
        several, named = st.lists(inner, max_size=3), st.dictionaries(names, inner, max_size=3)
        required = st.one_of(st.none(), st.booleans(), st.lists(st.one_of(names, anything), max_size=3))
        shapes = {
            "properties": st.one_of(named, st.none()),
            "items": st.one_of(inner, several),
            "oneOf": st.one_of(several, st.none()),
        }
        others = {"anyOf": several, "allOf": several, "not": inner, "prefixItems": several, "$defs": named}
        optional = annotations | others | {"required": required, "additionalProperties": inner}
        return st.one_of(
            *(
                st.fixed_dictionaries({"type": kind, key: shapes[key]}, optional=optional)
                for key, kind in (("properties", "object"), ("items", "array"), ("oneOf", "string"))
                for kind in (st.just(kind), st.one_of(st.none(), anything))
            ),
            st.fixed_dictionaries({}, optional=optional | shapes | {"type": st.one_of(kinds, anything)}),
        )

    leaf = st.fixed_dictionaries({"type": st.one_of(kinds, st.lists(kinds, max_size=3))}, optional=annotations)
    return st.recursive(st.one_of(st.booleans(), st.none(), leaf, leaf), deeper, max_leaves=6)


@given(parameters=loose_schemas())
@settings(max_examples=400)
def test_schema_of_any_draft_is_rendered_as_by_openai_harmony(
    parameters: Any, o200k: Tokenizer, oracle: openai_harmony.HarmonyEncoding
) -> None:
    assert shown(parameters, o200k) == shown_by_oracle(parameters, oracle)


def conversation_with(parameters: Any) -> list[dict]:
    tools = {
        "functions": {"name": "functions", "tools": [{"name": "f", "description": "", "parameters": parameters}]}
    }
    return [{"role": "developer", "content": [{"type": "developer_content", "tools": tools}]}]


def shown(parameters: Any, tokenizer: Tokenizer) -> str:
    return tokenizer.decode(harmony.render_conversation(read_messages(conversation_with(parameters)), tokenizer))


def shown_by_oracle(parameters: Any, oracle: openai_harmony.HarmonyEncoding) -> str:
    case = {"harmony_json": {"messages": conversation_with(parameters)}}
    return render_case(case | {"next_role": "assistant", "auto_drop_analysis": True}, oracle)["text"]


@pytest.mark.parametrize(
    ("level", "deepest"),
    [
        (lambda inner: {"type": "array", "items": inner}, 117),
        (lambda inner: {"type": "object", "properties": {"a": inner}, "required": ["a"]}, 58),
        (lambda inner: {"oneOf": [inner, {"type": "number"}]}, 58),
    ],
)
def test_schema_depth_limit_is_that_of_openai_harmony(
    level: Any, deepest: int, o200k: Tokenizer, oracle: openai_harmony.HarmonyEncoding
) -> None:
    schema: Any = {"type": "string"}
    for _ in range(deepest):
        schema = level(schema)
    assert shown(schema, o200k) == shown_by_oracle(schema, oracle)


@pytest.mark.parametrize(
    ("message", "field"),
    [
        ({"role": "robot", "content": "x"}, "messages[0].role"),
        ({"role": "user"}, "messages[0].content"),
        ({"role": "user", "content": 3}, "messages[0].content"),
        ({"role": "user", "content": [{"type": "image"}]}, "messages[0].content[0].type"),
        ({"role": "user", "content": "x", "channel": 1}, "messages[0].channel"),
        ({"role": "system", "content": {"type": "system", "reasoning_effort": "max"}}, "reasoning_effort"),
        (
            {"role": "system", "content": {"type": "system", "tools": [{"namespace": "x", "builtin": True}]}},
            "tools[0]",
        ),
        (
            {"role": "developer", "content": {"type": "developer", "tools": [{"name": "f", "tools": [1]}]}},
            "tools[0]",
        ),
        ("x", "messages[0]"),
    ],
)
def test_bad_messages_name_the_field(message: Any, field: str) -> None:
    with pytest.raises(UsageError) as error:
        read_messages([message])
    assert field in str(error.value)
    assert "\n" not in str(error.value)
