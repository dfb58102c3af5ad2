"""What the commands show of a completion, whatever its form: the model is replaced by given texts."""

import json
from collections.abc import Iterable
from pathlib import Path

import pytest

from gptoss_jax import LLM, chat, generate
from gptoss_jax.checkpoints.loading import EMBEDDED
from gptoss_jax.engine.outputs import TokenEvent
from gptoss_jax.text.tokenizer import Tokenizer
from tests.text.harmony.test_parse import tokens_of


class ScriptedEngine:
    """Returns the tokens of these completions, one per request, and records the prompts."""

    failures = programs = 0

    def __init__(self, tokenizer: Tokenizer, completions: Iterable[str]) -> None:
        self._tokenizer = tokenizer
        self.prompts: list[str] = []
        self._left = [tokens_of(tokenizer, completion) for completion in completions]
        self._events: list[TokenEvent] = []

    def check(self, *request: object) -> None:
        """Accepts every request."""

    def add(self, request_id: str, prompt: list[int], *settings: object) -> None:
        self.prompts.append(self._tokenizer.decode(prompt))
        tokens = self._left.pop(0)
        self._events += [TokenEvent(request_id, 0, token) for token in tokens]
        # A completion without <|return|> or <|call|> at its end was truncated.
        stops = self._tokenizer.decode(tokens[-1:]) in ("<|return|>", "<|call|>")
        self._events[-1].finish_reason = "stop" if stops else "length"

    @property
    def busy(self) -> bool:
        return bool(self._events)

    def step(self) -> list[TokenEvent]:
        return [self._events.pop(0)]

    def stop(self, request_id: str, index: int) -> None:
        self._events.clear()

    def cancel(self, request_id: str) -> None:
        self._events.clear()


class Scripted(LLM):
    """An LLM with such an engine."""

    def __init__(self, *completions: str) -> None:
        self.tokenizer = Tokenizer.from_dir(EMBEDDED)
        engine = ScriptedEngine(self.tokenizer, completions)
        self.prompts = engine.prompts
        self._own(engine)  # type: ignore[arg-type]


def scripted(monkeypatch: pytest.MonkeyPatch, *completions: str) -> Scripted:
    llm = Scripted(*completions)
    monkeypatch.setattr("gptoss_jax.commands.processes.load_llm", lambda options, **more: llm)
    return llm


THOUGHT = "<|channel|>analysis<|message|>t<|end|><|start|>"


ODD_CALL = (
    "assistant<|channel|>commentary<|channel|>commentary to=functions.bash <|constrain|>json<|message|>{}<|call|>"
)


@pytest.mark.parametrize(
    ("said", "shown", "problem"),
    [
        ('<|channel|>final <|constrain|>json<|message|>{"a":1}<|return|>', '{"a":1}', "without to="),
        ('<|channel|>final json<|message|>{"a":1}<|return|>', '{"a":1}', "without to="),
        ("<|channel|>final to=user<|message|>hello<|return|>", "hello", ""),
        ("<|channel|>commentary to=user<|message|>hello<|return|>", "hello", ""),
        ("<|channel|>commentary<|constrain|>response<|message|>hello<|return|>", "hello", "without to="),
        (f"{THOUGHT}assistantfinal<|message|>hello<|return|>", "hello", "assistantfinal"),
        ("Plain answer<|return|>", "Plain answer", "no <|message|>"),
        (
            "<|channel|>final<|message|>one<|end|><|start|>assistant<|channel|>final<|message|>two<|return|>",
            "one\n\ntwo",
            "",
        ),
        (f"{THOUGHT}user<|message|>hello<|return|>", "", "a message of 'user'"),
    ],
)
def test_all_commands_show_the_same_answer(
    command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str, shown: str, problem: str
) -> None:
    scripted(monkeypatch, said, said, said, said)
    _, out, err = command(chat.main, "--hide-analysis", stdin="hi\n")
    assert out == shown + "\n" * bool(shown)
    assert problem in err
    assert ("malformed: " in err) == bool(problem)
    _, out, err = command(generate.main, "hi")
    assert out == shown + "\n" * bool(shown)
    assert ("malformed: " in err) == bool(problem)
    results = [json.loads(command(generate.main, "hi", "--json")[1])]
    (tmp_path / "in.jsonl").write_text('{"prompt": "hi"}')
    assert command(generate.main, "--batch", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl")[0] == 0
    results.append(json.loads((tmp_path / "out.jsonl").read_text()))
    for result in results:
        assert result["text"] == (result["messages"][0]["content"] or "") == shown
        assert result["finish_reason"] == "stop"
        assert problem in " ".join(result.get("malformed", []))
        assert ("malformed" in result) == bool(problem)


def test_calls_are_found_however_their_headers_are_written(
    command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tools.json").write_text('[{"name": "bash"}]')
    bare = "<|channel|>commentary bash <|constrain|>json<|message|>{}<|call|>"
    scripted(monkeypatch, THOUGHT + ODD_CALL, bare, bare)
    for arguments in ((), ("--tools", tmp_path / "tools.json")):
        result = json.loads(command(generate.main, "hi", "--json", *arguments)[1])
        assert result["finish_reason"] == "tool_calls"
        assert [call["function"]["name"] for call in result["messages"][0]["tool_calls"]] == ["bash"]
    # Without such a tool, nobody is called.
    result = json.loads(command(generate.main, "hi", "--json")[1])
    assert (result["finish_reason"], result["text"]) == ("stop", "{}")


@pytest.mark.parametrize(
    "empty",
    [
        "<|return|>",
        "<|channel|>",
        "<|channel|>final",
        "<|channel|>final<|message|><|return|>",
        "<|channel|>analysis<|message|>t",
        "<|channel|>commentary to=functions.<|message|><|call|>",
        '<|channel|>commentary to=functions.f<|message|>{"a"',
    ],
)
def test_a_chat_goes_on_after_an_empty_turn(command, monkeypatch: pytest.MonkeyPatch, empty: str) -> None:
    ok = "<|channel|>final<|message|>ok<|return|>"
    llm = scripted(monkeypatch, empty, ok, ok)
    code, out, err = command(chat.main, "--hide-analysis", stdin="one\ntwo\nthree\n")
    assert (code, out.replace("\n", "")) == (0, "okok")
    assert "error" not in err
    assert "(truncated" in err or "(no answer)" in err
    assert len(llm.prompts) == 3
    assert "one" in llm.prompts[2]


def test_a_chat_asks_for_the_result_of_a_whole_call_only(command, monkeypatch: pytest.MonkeyPatch) -> None:
    ok = "<|channel|>final<|message|>ok<|return|>"
    llm = scripted(monkeypatch, THOUGHT + ODD_CALL, ok)
    _, out, _ = command(chat.main, "--hide-analysis", stdin="one\ndone\n")
    assert out.startswith("bash({})\n")
    assert out.endswith("ok\n")
    assert "<|start|>functions.bash to=assistant<|channel|>commentary<|message|>done<|end|>" in llm.prompts[1]
