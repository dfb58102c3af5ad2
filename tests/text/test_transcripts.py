from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptoss_jax.checkpoints.loading import EMBEDDED
from gptoss_jax.text.items import ChatItems, ItemText
from gptoss_jax.text.stop import StopMatcher
from gptoss_jax.text.tokenizer import Tokenizer
from gptoss_jax.text.transcripts import ChatTranscript, TextDelta
from gptoss_jax.types import TokenLogprobs
from tests.text.harmony.test_parse import MARKS, tokens_of

TOKENIZER = Tokenizer.from_dir(EMBEDDED)

PIECES = st.lists(st.text("ab<", max_size=3), max_size=12)
STOPS = st.lists(st.text("ab<", min_size=1, max_size=3), max_size=3)


@given(PIECES, STOPS)
def test_stops_at_the_first_match_for_any_split_of_the_text(pieces: list[str], stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    got, seen = "", ""
    for piece in pieces:
        got += matcher.push(piece)
        seen += piece
        if any(stop in seen for stop in stops):
            assert matcher.stopped
            break
        assert seen.startswith(got)
    got += matcher.finish()
    at = min((seen.find(stop) for stop in stops if stop in seen), default=len(seen))
    assert got == seen[:at]
    found = [stop for stop in stops if seen.find(stop) == at < len(seen)]
    assert matcher.matched in found if found else matcher.matched is None


def test_of_stop_strings_that_begin_together_the_shorter_one_matches() -> None:
    matcher = StopMatcher(["abc", "ab"])
    assert matcher.push("xabc") == "x"
    assert matcher.matched == "ab"


def test_no_match_while_not_looking() -> None:
    matcher = StopMatcher(["b"])
    matcher.looking = False
    assert matcher.push("abc") == "abc"
    matcher.looking = True
    assert matcher.push("cba") == "c"
    assert matcher.stopped


def test_text_is_withheld_only_while_it_may_match() -> None:
    matcher = StopMatcher(["END"])
    assert matcher.push("the E") == "the "
    assert matcher.push("xit") == "Exit"


def pushed(
    text: str, stop: Sequence[str] = (), tools: frozenset[str] | None = None
) -> tuple[ChatTranscript, list[TextDelta]]:
    """The transcript of a completion up to the first stop string, and its deltas."""
    turn = ChatItems(TOKENIZER, stop, tools)
    transcript = ChatTranscript(turn)
    deltas: list[TextDelta] = []
    for token in tokens_of(TOKENIZER, text):
        deltas += transcript.deltas(turn.push([token]))
        if turn.stopped:
            break
    return transcript, deltas + transcript.deltas(turn.finish())


@pytest.mark.parametrize(
    ("completion", "text", "content"),
    [
        ("Plain answer<|return|>", "Plain answer", "Plain answer"),
        ("<|message|>hello<|return|>", "hello", "hello"),
        (
            "<|channel|>final<|message|>a<|end|><|start|>assistant<|channel|>final<|message|>b<|return|>",
            "a\n\nb",
            "a\n\nb",
        ),
        ("<|channel|>commentary<|message|><|end|><|start|>assistant<|message|>b<|return|>", "b", "b"),
        ("<|channel|>commentary<|message|>a<|end|><|start|>assistant<|message|>b<|return|>", "b", "a\n\nb"),
        ("<|channel|>commentary<|message|>a<|return|>", "a", "a"),
        ("<|channel|>final<|message|>a<|end|><|start|>assistantfinal<|message|><|return|>", "a", "a"),
        ("<|channel|>commentary to=user<|message|>a<|return|>", "a", "a"),
        (
            "<|channel|>commentary<|message|>a<|end|><|start|>assistant to=functions.f<|message|>{}<|call|>",
            "",
            "a",
        ),
        ("<|channel|>analysis<|message|>t<|end|>", "", None),
    ],
)
def test_text_is_the_text_of_the_answers(completion: str, text: str, content: str | None) -> None:
    transcript, _ = pushed(completion)
    assert (transcript.text, transcript.message["content"]) == (text, content)


@pytest.mark.parametrize(
    "header",
    [
        "",
        "<|channel|>final",
        "final",
        "<|channel|>final json",
        "<|channel|>answer",
        "<|channel|>commentary to=user",
    ],
)
def test_a_stop_string_ends_any_answer(header: str) -> None:
    transcript, deltas = pushed(f"{header}<|message|>one STOP two<|return|>", ["two", "STOP"])
    assert [item.stop_string for item in transcript._turn.items] == ["STOP"]
    assert transcript._turn.stopped
    assert "".join(delta.text for delta in deltas) == transcript.text == transcript.message["content"] == "one "


def test_messages_before_a_stopped_answer_are_kept() -> None:
    before = "<|channel|>commentary<|message|>STOP me<|end|><|start|>assistant"
    transcript, _ = pushed(f"{before}<|channel|>final<|message|>one STOP two", ["STOP"])
    assert (transcript.text, transcript.message["content"]) == ("one ", "STOP me\n\none ")
    before = "<|channel|>final<|message|>one ST<|end|><|start|>assistant"
    transcript, _ = pushed(f"{before}<|channel|>final<|message|>OP STOP", ["STOP"])
    assert transcript.text == transcript.message["content"] == "one ST\n\nOP "


WORDS = [
    "assistant",
    "user",
    "functions.f",
    "analysis",
    "commentary",
    "final",
    " json",
    " to=functions.f",
    " to=user",
    "ST",
    "OP",
    "é",
    "f",
]
FRAGMENTS = [
    "<|start|>assistant",
    "<|message|>",
    "<|message|>hi",
    "<|end|>",
    "<|channel|>analysis",
    "<|channel|>final",
    "<|channel|>commentary",
]


@given(
    parts=st.lists(st.sampled_from([*MARKS, *WORDS, *FRAGMENTS]), max_size=20),
    stop=st.sampled_from([(), ("STOP",), ("hi", "é")]),
    tools=st.sampled_from([None, frozenset({"f"}), frozenset()]),
)
@settings(max_examples=400)
def test_deltas_concatenate_to_the_message(
    parts: list[str], stop: tuple[str, ...], tools: frozenset[str] | None
) -> None:
    transcript, deltas = pushed("".join(parts), stop, tools)
    message = transcript.message

    def streamed(*kinds: str) -> str:
        return "".join(delta.text for delta in deltas if delta.kind in kinds)

    assert streamed("answer", "preamble") == (message["content"] or "")
    assert streamed("reasoning") == message.get("thinking", "")
    kinds = {delta.kind for delta in deltas}
    calls = "".join(call["function"]["arguments"] for call in message.get("tool_calls", []))
    assert streamed("call") == calls
    if "answer" in kinds:
        assert transcript.text == streamed("answer").removeprefix("\n\n")
        assert not any(string in answer for string in stop for answer in transcript.text.split("\n\n"))
    elif "tool_calls" not in message:
        assert transcript.text == (message["content"] or "")


@given(
    parts=st.lists(st.sampled_from([*MARKS, *WORDS, *FRAGMENTS, "\u00e9\u4e2d\U0001f600 words"]), max_size=20),
    broken=st.lists(st.integers(0, 1100), max_size=5),
    cuts=st.lists(st.integers(1, 6), min_size=1, max_size=20),
)
@settings(max_examples=400)
def test_tokens_pushed_together_make_the_same_items(parts: list[str], broken: list[int], cuts: list[int]) -> None:
    tokens = list(tokens_of(TOKENIZER, "".join(parts)))
    for token in broken:
        tokens.insert(token % (len(tokens) + 1), token)
    single, several = ChatItems(TOKENIZER), ChatItems(TOKENIZER)
    for token in tokens:
        single.push([token])
    at, rest = 0, iter(cuts)
    while at < len(tokens):
        size = next(rest, 3)
        several.push(tokens[at : at + size])
        at += size
    single.finish()
    several.finish()
    assert several.malformed == single.malformed
    assert several.parser.result == single.parser.result
    assert [(i.kind, i.tool, i.text, i.complete) for i in several.items] == [
        (i.kind, i.tool, i.text, i.complete) for i in single.items
    ]


@given(
    text=st.text("ab\u00e9\U0001f600 ST", max_size=30), sizes=st.lists(st.integers(1, 4), min_size=1, max_size=40)
)
@settings(max_examples=200)
def test_reported_tokens_join_to_the_text(text: str, sizes: list[int]) -> None:
    completion = (
        f"<|channel|>analysis<|message|>no<|end|><|start|>assistant<|channel|>final<|message|>{text}<|return|>"
    )
    tokens = list(tokens_of(TOKENIZER, completion))
    turn, at, rest = ChatItems(TOKENIZER, ("ST",)), 0, iter(sizes)
    events = []
    while at < len(tokens) and not turn.stopped:
        own = tokens[at : at + next(rest, 1)]
        events += turn.push(own, [TokenLogprobs(token, -1.0, {}) for token in own])
        at += len(own)
    events += turn.finish()
    answer = turn.items[-1]
    assert answer.text == text.partition("ST")[0]
    data = b"".join(token.data for token in answer.tokens)
    # A token may contain the beginning of the stop string.
    assert data[: len(answer.text.encode())] == answer.text.encode()
    assert answer.tokens == [token for event in events if isinstance(event, ItemText) for token in event.tokens]
    assert len(data) <= len(text.encode())
    if not turn.stopped:
        assert data == text.encode()
