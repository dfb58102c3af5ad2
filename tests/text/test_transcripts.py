from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptoss_jax.checkpoints.loading import EMBEDDED
from gptoss_jax.text.tokenizer import Tokenizer
from gptoss_jax.text.transcripts import ChatTranscript, StopMatcher, TextDelta
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
    transcript = ChatTranscript(TOKENIZER, stop, tools)
    deltas: list[TextDelta] = []
    for token in tokens_of(TOKENIZER, text):
        deltas += transcript.push(token)
        if transcript.stopped:
            break
    return transcript, deltas + transcript.finish()


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
    transcript, deltas = pushed(f"{header}<|message|>one STOP two<|return|>", ["STOP"])
    assert transcript.stopped
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
    if "nothing" not in kinds:
        assert streamed("call") == calls
    if "answer" in kinds:
        assert transcript.text == streamed("answer").removeprefix("\n\n")
        assert not any(string in answer for string in stop for answer in transcript.text.split("\n\n"))
    elif "tool_calls" not in message:
        assert transcript.text == (message["content"] or "")
