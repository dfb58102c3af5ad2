"""Classification of messages with well-formed and malformed headers, and round trips through OpenAI-style messages."""

import openai_harmony
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gptoss_jax.text import harmony
from gptoss_jax.text.tokenizer import Tokenizer
from tests.text.harmony.test_parse import MARKS, tokens_of

TOOLS = frozenset({"bash", "get", "json", "python", "browser.search"})
BEFORE = "<|channel|>analysis<|message|>t<|end|><|start|>"
USER = {"role": "user", "content": "hi"}
WORDS = [
    *("assistant", "user", "tool", "functions.bash", "bash", "analysis", "commentary", "final", "Final"),
    *("json", "code", " json", " ", "\n", "\xa0", "to=", " to=functions.get", " to=functions.", " to=user"),
    *(" to=assistant", " to=final", "x", ".", "é", '{"q":1}'),
]
ANYTHING = st.lists(st.sampled_from([*MARKS, *WORDS, "<|start|>assistant", "<|message|>hi<|end|>"]), max_size=16)


def read(text: str, tokenizer: Tokenizer, tools: frozenset[str] | None) -> tuple[dict, list[str]]:
    found = harmony.parse(tokens_of(tokenizer, text), tokenizer)
    return harmony.to_openai(found.messages, call_id=str, tools=tools), found.malformed


def kind_of(header: str, tokenizer: Tokenizer, tools: frozenset[str] | None, end: str = "<|end|>") -> str:
    """The kind of a message with this header after reasoning: "call NAME", "content", "thinking" or "nothing"."""
    message, _ = read(f"{BEFORE}{header}<|message|>TEXT{end}", tokenizer, tools)
    calls = [call["function"] for call in message.get("tool_calls", [])]
    assert all(call["arguments"] == "TEXT" for call in calls)
    found = [f"call {call['name']}" for call in calls]
    found += ["content"] if message["content"] is not None else []
    found += ["thinking"] if message["thinking"] != "t" else []
    assert len(found) < 2
    return found[0] if found else "nothing"


@pytest.mark.parametrize("tools", [None, TOOLS, frozenset()])
@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        # Well-formed headers.
        (["assistant<|channel|>final", "assistant<|channel|>commentary", "assistant"], "content"),
        (["assistant<|channel|>analysis"], "thinking"),
        (
            ["functions.get to=assistant<|channel|>commentary", "user", "user<|channel|>final", "developer"],
            "nothing",
        ),
        (["assistant to=functions.get<|channel|>commentary <|constrain|>json"], "call get"),
        (["assistant<|channel|>commentary to=functions.get <|constrain|>json"], "call get"),
        (["assistant<|channel|>commentary to=functions.get", "assistant to=functions.get"], "call get"),
        (["assistant<|channel|>commentary to=functions.get code"], "call get"),
        (
            ["assistant to=python<|channel|>analysis code", "assistant<|channel|>analysis to=python code"],
            "call python",
        ),
        (["assistant<|channel|>analysis to=browser.search code"], "call browser.search"),
        (["assistant<|channel|>commentary to=functions.größe <|constrain|>json"], "call größe"),
        (["assistant<|channel|>commentary to=functions.json <|constrain|>json"], "call json"),
        # Channels that are repeated, misplaced, in another case, or recipients.
        (["assistant<|channel|>commentary<|channel|>commentary to=functions.bash <|constrain|>json"], "call bash"),
        (["assistant<|channel|>commentary to=functions.bash<|channel|>commentary <|constrain|>json"], "call bash"),
        (["assistant<|channel|>bash<|channel|>commentary to=functions.bash <|constrain|>json"], "call bash"),
        (
            ["commentary to=functions.bash", "assistant commentary to=functions.bash <|constrain|>json"],
            "call bash",
        ),
        (["assistant<|channel|>final<|channel|>final", "assistant<|channel|>analysis<|channel|>final"], "content"),
        (["final", "commentary", "assistant final", "assistant<|channel|> final"], "content"),
        (
            ["assistant<|channel|>Final", "Assistant<|channel|>final", "assistant<|channel|>commentary to=final"],
            "content",
        ),
        (["analysis", "assistant analysis", "assistant<|channel|>analysis<|channel|>analysis"], "thinking"),
        (["assistant<|channel|>answer", "foo<|channel|>final"], "content"),
        # Words joined without a separator.
        (["assistantcommentary to=functions.get <|constrain|>json"], "call get"),
        (
            ["assistantto=functions.get<|channel|>commentary <|constrain|>json", "to=functions.get code"],
            "call get",
        ),
        (["assistantcommentaryto=functions.get", "assistant<|channel|>commentaryto=functions.get"], "call get"),
        (["assistantfinal", "assistantfinaljson", "assistantassistantfinal", "assistantcommentary"], "content"),
        (["assistantanalysis", "assistant<|channel|>analysiscode"], "thinking"),
        (["assistant<|channel|>analysisassistant<|channel|>final", "assistantanalysisassistantfinal"], "content"),
        # Only content types.
        (["assistant<|channel|>commentary <|constrain|>json", "assistant<|channel|>commentary code"], "content"),
        (["assistant<|channel|>commentary<|constrain|>response", "assistant<|constrain|>json"], "content"),
        (["assistant<|channel|>final <|constrain|>json", "assistant<|channel|>final json"], "content"),
        (["assistant<|channel|>final text", "assistantfinal json", "assistant<|channel|>final get"], "content"),
        (["assistant<|channel|>analysis code", "assistant<|channel|>analysis <|constrain|>json"], "thinking"),
        # Recipients that cannot be called.
        (
            ["assistant<|channel|>final to=user", "assistant<|channel|>commentary to=user", "assistant to=all"],
            "content",
        ),
        (["assistant<|channel|>commentary to=assistant", "assistant<|channel|>final to=bob"], "content"),
        (["assistant<|channel|>analysis to=user", "assistant<|channel|>analysis to=assistant"], "thinking"),
        (["assistant<|channel|>commentary to=functions.", "assistant<|channel|>commentary to= json"], "content"),
        (["assistant<|channel|>commentary to=functions <|constrain|>json", "assistant to="], "content"),
        # Two recipients.
        (
            ["assistant to=functions.bash<|channel|>commentary to=functions.get", "assistant to=user to=get"],
            "call get",
        ),
        # Misplaced spaces.
        (["assistant<|channel|>commentary to= functions.get json"], "call get"),
        (["assistant<|channel|>commentary to=functions. get <|constrain|>json"], "call get"),
        (["assistant<|channel|>commentary to=functions.get\xa0now <|constrain|>json"], "call get"),
        # A function's qualified name is a call without to= and on any channel.
        (
            ["assistant<|channel|>commentary functions.get <|constrain|>json", "assistant functions.get"],
            "call get",
        ),
        (
            ["assistant<|channel|>functions.get <|constrain|>json", "functions.get<|channel|>commentary json"],
            "call get",
        ),
        (["assistant<|channel|>final to=functions.get <|constrain|>json"], "call get"),
    ],
    ids=str,
)
def test_kinds(headers: list[str], expected: str, tools: frozenset[str] | None, small: Tokenizer) -> None:
    assert {header: kind_of(header, small, tools) for header in headers} == dict.fromkeys(headers, expected)


@pytest.mark.parametrize(
    ("header", "unknown", "known", "none"),
    [
        ("assistant<|channel|>commentary bash <|constrain|>json", "call bash", "call bash", "content"),
        ("assistant<|channel|>commentary bash", "call bash", "call bash", "content"),
        ("assistant<|channel|>commentary other <|constrain|>json", "call other", "content", "content"),
        ("assistant<|channel|>commentary to=other", "call other", "call other", "call other"),
        ("assistant<|channel|>analysis other", "thinking", "thinking", "thinking"),
        ("assistant<|channel|>bash", "content", "call bash", "content"),
        ("bash<|channel|>commentary <|constrain|>json", "call bash", "call bash", "nothing"),
        ("assistant<|channel|>final to=bash", "content", "call bash", "content"),
        ("assistant to=functions.getjson<|channel|>commentary", "call getjson", "call get", "call getjson"),
        ("assistant to=functions.getcommentary", "call getcommentary", "call get", "call getcommentary"),
    ],
)
def test_kind_depends_on_the_available_tools(
    header: str, unknown: str, known: str, none: str, small: Tokenizer
) -> None:
    assert [kind_of(header, small, tools) for tools in (None, TOOLS, frozenset())] == [unknown, known, none]


def test_tool_name_as_role_is_a_call_if_the_message_ends_with_call(small: Tokenizer) -> None:
    for header in ("functions.get", "functions.get<|channel|>commentary"):
        assert kind_of(header, small, None, "<|call|>") == "call get"
        assert kind_of(header, small, None, "<|end|>") == "nothing"
    assert kind_of("functions.get to=assistant<|channel|>commentary", small, None, "<|call|>") == "nothing"


@pytest.mark.parametrize(
    "completion",
    [
        "assistant<|channel|>commentary<|channel|>commentary to=functions.bash <|constrain|>json<|message|>{}<|call|>",
        "assistantfinal<|message|>hello<|return|>",
        "final<|message|>hello<|return|>",
        "assistantcommentary to=functions.get<|message|>{}<|call|>",
        "assistant<|channel|>commentary to=functions.<|message|>{}<|call|>",
        "assistant<|channel|>commentary to= <|message|>{}<|call|>",
        "assistant<|channel|>commentary foo<|message|>{}<|call|>",
        "assistant<|channel|>answer<|message|>hello<|return|>",
        "assistant<|channel|>commentary<|message|>{}<|call|>",
        "assistant to=functions.a\xa0b<|channel|>commentary<|message|>{}<|call|>",
        "user<|message|>hello<|end|>",
        "functions.f to=assistant<|channel|>commentary<|message|>{}<|end|>",
        "bash<|message|>{}<|end|>",
    ],
)
def test_format_violations_are_reported(completion: str, small: Tokenizer) -> None:
    assert read(BEFORE + completion, small, None)[1]


def test_tool_names() -> None:
    def get() -> None: ...

    tools = [get, {"name": "bash"}, {"type": "function", "function": {"name": "json"}}]
    names = harmony.tool_names(tools, ["python", "browser"])
    assert names == TOOLS | {"browser.open", "browser.find"}
    assert harmony.tool_names() == frozenset()


def test_messages_without_header_text_are_classified_by_their_fields() -> None:
    message = harmony.ParsedMessage("assistant", "{}", None, "functions.f", "commentary", "<|constrain|>json")
    assert harmony.meaning(message) == harmony.Meaning("call", "f")
    assert harmony.is_tool_call(message)
    assert harmony.meaning(harmony.ParsedMessage("assistant", "x", channel="analysis")).kind == "reasoning"
    assert harmony.meaning(harmony.ParsedMessage("tool", "x", "functions.f", "assistant")).kind == "nothing"


@pytest.mark.parametrize(
    "header",
    [
        "assistant to=functions.get<|channel|>commentary <|constrain|>json",
        " to=functions.get<|channel|>commentary <|constrain|>json",
        "<|channel|>commentary to=functions.get <|constrain|>json",
        "assistantcommentary to=functions.get",
    ],
)
def test_call_truncated_at_any_token_has_no_content(header: str, small: Tokenizer) -> None:
    before = BEFORE if header.startswith("assistant") else ""
    tokens = tokens_of(small, f'{before}{header}<|message|>{{"q":1}}<|call|>')
    for count in range(len(tokens) + 1):
        found = harmony.parse(tokens[:count], small)
        message = harmony.to_openai(found.messages)
        assert message["content"] is None
        for call in message.get("tool_calls", []):
            assert call["function"]["name"] == "get"
            assert '{"q":1}'.startswith(call["function"]["arguments"])
        harmony.render([USER, message, USER], small)
    assert message["tool_calls"][0]["function"]["arguments"] == '{"q":1}'


CHANNELS = st.sampled_from([None, "analysis", "commentary", "final"])
NAMES = st.from_regex(r"[a-z_]{1,8}", fullmatch=True)


@given(
    messages=st.lists(
        st.tuples(
            CHANNELS, st.none() | NAMES.map("functions.{}".format), st.sampled_from([None, "<|constrain|>json"])
        ),
        min_size=1,
        max_size=4,
    )
)
def test_messages_rendered_by_openai_harmony(
    messages: list, o200k: Tokenizer, oracle: openai_harmony.HarmonyEncoding
) -> None:
    written = []
    for index, (channel, recipient, content_type) in enumerate(messages):
        message = openai_harmony.Message.from_role_and_content(openai_harmony.Role.ASSISTANT, f"text {index}")
        message = message.with_channel(channel) if channel else message
        if recipient and channel != "final":
            message = message.with_recipient(recipient)
            message = message.with_content_type(content_type) if content_type else message
        written.append(message)
    conversation = openai_harmony.Conversation.from_messages(written)
    tokens = oracle.render_conversation_for_completion(conversation, openai_harmony.Role.ASSISTANT)[:-2]
    theirs = oracle.parse_messages_from_completion_tokens(tokens, None)
    found = harmony.parse(tokens, o200k, None)
    assert found.malformed == []
    is_call = [message.recipient is not None for message in theirs]
    texts = [message.content[0].text for message in theirs]
    calls = [
        (message.recipient.removeprefix("functions."), text)
        for message, text in zip(theirs, texts, strict=True)
        if message.recipient
    ]
    plain = [(m.channel, text) for m, text, call in zip(theirs, texts, is_call, strict=True) if not call]
    made = harmony.to_openai(found.messages)
    made_calls = [(c["function"]["name"], c["function"]["arguments"]) for c in made.get("tool_calls", [])]
    assert made_calls == calls
    assert made.get("thinking", "") == "\n\n".join(text for channel, text in plain if channel == "analysis")
    assert (made["content"] or "") == "\n\n".join(text for channel, text in plain if channel != "analysis")


@given(parts=ANYTHING, tools=st.sampled_from([None, TOOLS, frozenset()]), builtin=st.booleans())
@example(parts=[], tools=None, builtin=False)
@example(
    parts=["<|channel|>", "commentary", " to=functions.", "<|message|>", "{}", "<|call|>"],
    tools=None,
    builtin=False,
)
@settings(max_examples=400)
def test_any_completion_can_be_rendered_again(
    parts: list[str], tools: frozenset[str] | None, builtin: bool, small: Tokenizer
) -> None:
    message, _ = read("".join(parts), small, tools)
    results = [
        {"role": "tool", "tool_call_id": call["id"], "content": "done"} for call in message.get("tool_calls", [])
    ]
    options = {"builtin_tools": ["python", "browser"] if builtin else []}
    harmony.render([USER, message, *results, USER], small, **options)
    tokens = harmony.render([message], small, next_role=None, **options)
    again = harmony.parse(tokens, small, None)
    assert again.malformed == []
    made = harmony.to_openai(again.messages, call_id=str)
    assert made.get("tool_calls") == message.get("tool_calls")
    assert (made["content"] or "") == (message["content"] or "")


@given(parts=ANYTHING)
@settings(max_examples=400)
def test_no_text_of_a_completion_is_lost_silently(parts: list[str], small: Tokenizer) -> None:
    text = "".join(parts)
    found = harmony.parse(tokens_of(small, text), small)
    message = harmony.to_openai(found.messages)
    kept = (message["content"] or "") + message.get("thinking", "")
    kept += "".join(call["function"]["arguments"] for call in message.get("tool_calls", []))
    completion = sum(len(parsed.text) for parsed in found.messages)
    assert found.malformed or len(kept.replace("\n\n", "")) >= completion - text.count("\n")


TEXTS = st.text(alphabet=st.characters(exclude_categories=("Cs",)), min_size=1, max_size=8)


@given(
    thinking=st.none() | TEXTS,
    content=st.none() | TEXTS,
    calls=st.lists(st.tuples(NAMES, TEXTS), max_size=3),
)
def test_well_formed_messages_survive_a_round_trip(
    thinking: str | None, content: str | None, calls: list[tuple[str, str]], small: Tokenizer
) -> None:
    message: dict = {"role": "assistant", "content": content}
    if thinking is not None:
        message["thinking"] = thinking
    if calls:
        message["tool_calls"] = [
            {"id": str(index), "type": "function", "function": {"name": name, "arguments": text}}
            for index, (name, text) in enumerate(calls)
        ]
    tokens = harmony.render([message], small, next_role=None, auto_drop_analysis=False)
    found = harmony.parse(tokens, small, None)
    assert found.malformed == []
    made = harmony.to_openai(found.messages, call_id=str)
    assert made | {"content": made["content"] or None} == message


@pytest.mark.parametrize(
    "given", [{"content": None}, {"content": None, "tool_calls": []}, {"tool_calls": []}, {"thinking": ""}]
)
def test_empty_turn_is_an_empty_answer(given: dict, small: Tokenizer) -> None:
    text = small.decode(harmony.render([USER, {"role": "assistant", **given}], small, next_role=None))
    assert text.endswith("<|start|>user<|message|>hi<|end|><|start|>assistant<|channel|>final<|message|><|end|>")
