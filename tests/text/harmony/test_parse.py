import json
import time
from pathlib import Path

import openai_harmony
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gptoss_jax.text import harmony
from gptoss_jax.text.tokenizer import Tokenizer
from tools.goldens.harmony_goldens import message_fields

CASES = [json.loads(line) for line in (Path(__file__).parent / "golden" / "parse.jsonl").open()]
FIELDS = ("role", "name", "channel", "recipient", "content_type", "text")
MARKS = ["<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|constrain|>", "<|return|>", "<|call|>"]
WORDS = ["assistant", "user", "final", "analysis", " to=functions.f", " to=a", " json", "x", " ", "\n", "{}", "é"]
HEADERS = st.lists(
    st.sampled_from([*WORDS, "<|channel|>", "<|channel|>final", "<|constrain|>", "tool"]), max_size=5
)
CONTENTS = st.lists(st.sampled_from([*WORDS, "<|message|>", "<|channel|>", "<|start|>"]), max_size=4)
MESSAGES = st.tuples(
    st.sampled_from(["", "<|start|>", "<|start|>assistant"]), HEADERS, CONTENTS, st.sampled_from(MARKS[1::4])
).map(lambda m: f"{m[0]}{''.join(m[1])}<|message|>{''.join(m[2])}{m[3]}")
VALID = (
    "<|channel|>analysis<|message|>Hmm é🦄.<|end|><|start|>assistant<|channel|>commentary to=functions.f "
    '<|constrain|>json<|message|>{"a": 1}<|call|><|start|>assistant<|channel|>final<|message|>ok<|return|>'
)


def tokens_of(tokenizer: Tokenizer, text: str) -> list[int]:
    """The tokens of text in which MARKS are special tokens."""
    for mark in MARKS:
        text = text.replace(mark, f"\x00{mark}\x00")
    pieces = text.split("\x00")
    return [
        token
        for piece in pieces
        for token in ([tokenizer.encode_special(piece)] if piece in MARKS else tokenizer.encode(piece))
    ]


def fields(completion: harmony.ParsedCompletion) -> list[dict]:
    return [{field: getattr(message, field) for field in FIELDS} for message in completion.messages]


def check_invariants(tokens: list[int], tokenizer: Tokenizer, role: str | None, strict: bool) -> None:
    """Deltas add up to texts between a message's start and end, every token is in a message or stray, and stray
    tokens are reported.
    """
    parser = harmony.StreamParser(tokenizer, role, strict=strict)
    texts, text = [], ""
    events = [event for token in tokens for event in parser.push(token)] + parser.finish()
    in_message = False
    for event in events:
        assert in_message != isinstance(event, harmony.MessageStart)
        in_message = not isinstance(event, harmony.MessageEnd)
        if isinstance(event, harmony.Delta):
            text += event.text
        elif isinstance(event, harmony.MessageEnd):
            assert event.message.text == text
            texts.append(text)
            text = ""
    assert text == ""
    result = parser.result
    assert texts == [message.text for message in result.messages]
    spans = sorted([message.span for message in result.messages] + result.stray)
    covered = [position for start, end in spans for position in range(start, end)]
    assert covered == list(range(len(tokens)))
    assert len(result.malformed) >= len(result.stray)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])
def test_golden_messages_and_stream(case: dict, o200k: Tokenizer) -> None:
    parser = harmony.StreamParser(o200k, case["role"], strict=case["strict"])
    for token, state in zip(case["tokens"], case["stream"], strict=False):
        parser.push(token)
        mine = {"delta": parser.last_delta, "channel": parser.channel}
        assert mine | {"recipient": parser.recipient, "role": parser.role} == state
    completion = harmony.parse(case["tokens"], o200k, case["role"], strict=case["strict"])
    if "error" in case:
        assert completion.malformed
    else:
        assert fields(completion) == case["messages"]
    odd = (
        {"malformed", "invalid_utf8"} & set(case["tags"])
        or "token_in" in case["id"]
        or "_in_content" in case["id"]
    )
    assert bool(completion.malformed) == bool(odd)


@given(
    parts=st.one_of(st.lists(st.sampled_from(MARKS + WORDS), max_size=14), st.lists(MESSAGES, max_size=3)),
    role=st.sampled_from(["assistant", None]),
    strict=st.booleans(),
)
@settings(max_examples=400)
def test_agrees_with_openai_harmony_where_it_does_not_raise(
    parts: list[str], role: str | None, strict: bool, o200k: Tokenizer, oracle: openai_harmony.HarmonyEncoding
) -> None:
    tokens = tokens_of(o200k, "".join(parts))
    parser = openai_harmony.StreamableParser(oracle, role and openai_harmony.Role(role), strict=strict)
    mine = harmony.StreamParser(o200k, role, strict=strict)
    starts = 0
    try:
        for token in tokens:
            # By default <|start|> ends the message or header it occurs in, and messages of any role are kept.
            starts += token == o200k.encode_special("<|start|>")
            in_header = parser.state == openai_harmony.StreamState.HEADER
            if not strict and (starts > 0 or (in_header and parser.current_role is None)):
                return
            parser.process(token)
            mine.push(token)
            assert mine.last_delta == parser.last_content_delta
            assert mine.channel == parser.current_channel
            assert mine.recipient == parser.current_recipient
            assert mine.content_type == parser.current_content_type
            assert mine.role == (parser.current_role and parser.current_role.value)
        parser.process_eos()
    except openai_harmony.HarmonyError:
        completion = harmony.parse(tokens, o200k, role, strict=strict)
        assert completion.malformed
        return
    mine.finish()
    assert fields(mine.result) == [message_fields(message) for message in parser.messages]


@given(
    tokens=st.lists(st.one_of(st.integers(-5, 201_100), st.integers(199_990, 200_020)), max_size=60),
    role=st.sampled_from([None, "assistant", "tool"]),
    strict=st.booleans(),
)
@settings(max_examples=300)
def test_any_tokens(tokens: list[int], role: str | None, strict: bool, o200k: Tokenizer) -> None:
    check_invariants(tokens, o200k, role, strict)


@given(data=st.data(), strict=st.booleans(), role=st.sampled_from([None, "assistant"]))
@settings(max_examples=300)
def test_mutated_completions(data: st.DataObject, strict: bool, role: str | None, small: Tokenizer) -> None:
    tokens = tokens_of(small, VALID)
    for _ in range(data.draw(st.integers(0, 4))):
        at = data.draw(st.integers(0, len(tokens) - 1))
        cut = data.draw(st.integers(0, 3))
        put = data.draw(st.lists(st.integers(0, small.vocab_size), max_size=3))
        tokens[at : at + cut] = put
        tokens = tokens or [0]
    check_invariants(tokens, small, role, strict)


@given(pieces=st.lists(st.binary(max_size=6), max_size=20))
@example(pieces=[b"\xf0\x9f\xa6", b" after"])
@example(pieces=[b"\xff" * 5] * 20)
def test_bytes_split_at_any_position(pieces: list[bytes], small: Tokenizer) -> None:
    by_value = {small.token_bytes(token): token for token in range(len(MARKS), small.vocab_size)}
    content = [by_value[bytes([value])] for piece in pieces for value in piece]
    tokens = [*tokens_of(small, "<|channel|>final<|message|>"), *content]
    completion = harmony.parse(tokens, small)
    assert completion.messages[0].text == b"".join(pieces).decode("utf-8", "replace")
    check_invariants(tokens, small, "assistant", False)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<|channel|>analysis<|message|>a<|start|>assistant<|channel|>final<|message|>b<|return|>", ["a", "b"]),
        ("<|channel|>analysis a b<|end|><|start|>assistant<|channel|>final<|message|>c<|return|>", ["a b", "c"]),
        ("<|channel|>analysis<|message|>a<|end|><|channel|>final<|message|>b<|return|>", ["a", "b"]),
        ("<|message|>a<|end|><|message|>b<|return|>", ["a", "b"]),
        ("<|channel|>final<|message|>a<|return|><|return|>", ["a"]),
        ("<|channel|>final<|message|>a<|end|><|start|>assistant", ["a"]),
        ("<|channel|>final<|message|>a<|end|><|start|>assistant<|channel|>analysis b<|end|>", ["a", "b"]),
        ("<|channel|>commentary to=functions.f", []),
        ("<|start|>assistant<|channel|>final<|message|>a<|return|>", ["a"]),
    ],
)
def test_malformed_completions_are_parsed_as_far_as_possible(
    text: str, expected: list[str], small: Tokenizer
) -> None:
    tokens = tokens_of(small, text)
    completion = harmony.parse(tokens, small)
    assert [message.text for message in completion.messages] == expected
    assert completion.malformed or text.startswith(("<|message|>a<|end|><|m", "<|start|>"))
    assert all("\n" not in problem and len(problem) < 200 for problem in completion.malformed)
    check_invariants(tokens, small, "assistant", False)


def test_user_name_in_header(small: Tokenizer) -> None:
    tokens = tokens_of(small, "<|start|>user:bob<|message|>hi<|end|>")
    completion = harmony.parse(tokens, small, None)
    assert (completion.messages[0].role, completion.messages[0].name) == ("user", "bob")
    assert completion.malformed == []


@pytest.mark.parametrize(
    "unit", ["x ", ". ", "assistantfinal ", "<|channel|>", "<|constrain|>", " to=", "<|start|>", "<", "\n", ":"]
)
@pytest.mark.parametrize("strict", [False, True])
def test_a_huge_header_takes_linear_time(unit: str, strict: bool, small: Tokenizer) -> None:
    tokens = tokens_of(small, unit) * 50_000
    started = time.perf_counter()
    completion = harmony.parse([*tokens, *tokens_of(small, "<|message|>x")], small, strict=strict)
    assert time.perf_counter() - started < 10
    assert all(len(problem) < 200 for problem in completion.malformed)


def test_invalid_bytes_take_linear_time(small: Tokenizer) -> None:
    by_value = {small.token_bytes(token): token for token in range(len(MARKS), small.vocab_size)}
    tokens = [*tokens_of(small, "<|message|>"), *[by_value[b"\xff"], by_value[b"\xe2"]] * 100_000]
    started = time.perf_counter()
    completion = harmony.parse(tokens, small)
    assert time.perf_counter() - started < 10
    assert completion.messages[0].text == "\ufffd" * 200_000
    assert len(completion.malformed) == 1
