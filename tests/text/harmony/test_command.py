import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from gptoss_jax.commands.running import run_command
from gptoss_jax.harmony import main
from gptoss_jax.text.tokenizer import Tokenizer
from tests.text.harmony.test_parse import tokens_of

HI = {"role": "user", "content": "hi"}
GOLDEN = Path(__file__).parent / "golden"


def run(
    arguments: list[str], lines: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[int, list[Any], str]:
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    with pytest.raises(SystemExit) as ended:
        run_command(lambda: main(arguments))
    out, err = capsys.readouterr()
    return ended.value.code, [json.loads(line) for line in out.splitlines()], err


def test_golden_lines(
    o200k_files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = [json.loads(line) for line in (GOLDEN / "render.jsonl").open()]
    cases = [case for case in cases if "error" not in case]
    for left_out in ("messages", "harmony_json"):
        fields = {"id", "harmony_json", "messages", "next_role", "auto_drop_analysis"} - {left_out}
        lines = [{key: value for key, value in case.items() if key in fields} for case in cases]
        code, out, err = run(["render", "--tokenizer", "o200k_harmony"], lines, monkeypatch, capsys)
        assert (code, err) == (0, "")
        assert out == [{key: case[key] for key in ("id", "tokens", "text")} for case in cases]
    cases = [json.loads(line) for line in (GOLDEN / "parse.jsonl").open()]
    lines = [{key: case[key] for key in ("id", "tokens", "role", "strict", "text")} for case in cases]
    code, out, err = run(["parse", "--tokenizer", "o200k_harmony"], lines, monkeypatch, capsys)
    assert (code, err) == (0, "")
    for case, line in zip(cases, out, strict=True):
        assert line["id"] == case["id"]
        assert line["malformed"] if "error" in case else line["messages"] == case["messages"]


def test_openai_lines_with_options(
    small_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = {
        "id": 1,
        "messages": [{"role": "system", "content": "Hi."}, {"role": "user", "content": "x"}],
        "tools": [{"type": "function", "function": {"name": "f"}}],
        "reasoning_effort": "low",
        "current_date": "2025-06-28",
        "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {}}},
        "next_role": None,
    }
    code, (out,), _ = run(["render", "--tokenizer", str(small_dir)], [line, ""], monkeypatch, capsys)
    assert code == 0
    for part in ("Reasoning: low", "2025-06-28", "type f = () => any;", "## n", "# Instructions\n\nHi."):
        assert part in out["text"]
    assert out["text"].endswith("x<|end|>")


@pytest.mark.parametrize(
    ("command", "line", "expected"),
    [
        ("render", "{", "line 2: not valid JSON: "),
        ("render", '{"messages": [], "id": NaN}', "line 2: not valid JSON: expected a finite number, found NaN"),
        (
            "render",
            '{"messages": [], "id": 1e999}',
            "line 2: not valid JSON: expected a finite number, found 1e999",
        ),
        ("render", "[]", "line 2: expected a JSON object, found a JSON list"),
        ("render", "\xff", "line 2"),
        ("render", "[" * 100_000, "line 2"),
        ("render", {}, "line 2: messages"),
        ("render", {"messages": 3}, "line 2: messages"),
        ("render", {"messages": [{"role": "robot"}]}, "line 2: messages[0].role"),
        ("render", {"messages": [{"role": "x", "channel": "y"}]}, "line 2: messages[0].role"),
        ("render", {"harmony_json": []}, "line 2: harmony_json"),
        ("render", {"harmony_json": {"messages": [{}]}}, "line 2: harmony_json: messages[0].role"),
        ("render", {"harmony_json": "{"}, "line 2: harmony_json: not valid JSON: "),
        ("render", {"harmony_json": "\ud800"}, "line 2: harmony_json: not valid JSON: "),
        (
            "render",
            {"harmony_json": {"messages": [{"role": "tool"}]}},
            "line 2: harmony_json: messages[0].content",
        ),
        ("render", {"messages": [], "reasoning_efort": "low"}, "line 2: reasoning_efort: unknown field"),
        (
            "render",
            {"messages": [HI | {"channel": "final", "thinking": "t"}]},
            "line 2: messages[0].thinking: unknown",
        ),
        (
            "render",
            {"messages": [HI | {"text": "t"}]},
            "line 2: messages[0]: expected content or text, found both",
        ),
        (
            "render",
            {"messages": [{"role": "system", "content": {"type": "system", "reasoning_efort": "low"}}]},
            "line 2: messages[0].content.reasoning_efort: unknown field",
        ),
        ("render", {"messages": [HI], "tools": {}}, "line 2: tools: expected a list, found dict"),
        ("render", {"messages": [HI], "tools": ""}, "line 2: tools: expected a list, found str"),
        ("render", {"messages": [], "next_role": "x"}, "line 2: next_role"),
        ("render", {"messages": [], "auto_drop_analysis": 1}, "line 2: auto_drop_analysis"),
        ("render", {"messages": [], "tools": "x"}, "line 2: tools"),
        ("render", '{"messages": [], "id": ' + "1" * 5000 + "}", "line 2: not valid JSON: "),
        ("parse", {}, "line 2: tokens"),
        ("parse", {"tokens": ["x"]}, "line 2: tokens[0]"),
        ("parse", {"tokens": [True]}, "line 2: tokens[0]"),
        ("parse", {"tokens": [-1]}, "line 2: tokens[0]: token -1 is outside the vocabulary of {size}"),
        (
            "parse",
            {"tokens": [0, 10**30]},
            f"line 2: tokens[1]: token {10**29} is outside the vocabulary of {{size}}",
        ),
        ("parse", {"tokens": [], "rôle": "user"}, "line 2: rôle: unknown field"),
        ("parse", {"tokens": [], "role": "x"}, "line 2: role"),
        ("parse", {"tokens": [], "strict": None}, "line 2: strict"),
    ],
)
def test_a_bad_line_is_one_line_on_stderr(
    command: str,
    line: Any,
    expected: str,
    small_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    good = {"messages": []} if command == "render" else {"tokens": []}
    code, out, err = run([command, "--tokenizer", str(small_dir)], [good, line, good], monkeypatch, capsys)
    assert code == 2
    assert len(out) == 1
    size = Tokenizer.from_dir(small_dir).vocab_size
    assert err.startswith(f"error: {expected.replace('{size}', str(size))}")
    assert err.count("\n") == 1


def test_what_parse_writes_can_be_rendered(
    small_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = (
        "<|start|>user<|message|>hi<|end|><|start|>assistant<|channel|>analysis<|message|>t<|end|><|start|>assistant"
        " to=functions.f<|channel|>commentary <|constrain|>json<|message|>{}<|call|><|start|>functions.f to=assistant"
        "<|channel|>commentary<|message|>1<|end|>"
    )
    tokenizer = Tokenizer.from_dir(small_dir)
    for text in (said, "<|start|>user<|message|>hi<|end|>"):
        line = {"tokens": tokens_of(tokenizer, text), "role": None}
        _, parsed, _ = run(["parse", "--tokenizer", str(small_dir)], [line], monkeypatch, capsys)
        code, (rendered,), err = run(["render", "--tokenizer", str(small_dir)], parsed, monkeypatch, capsys)
        assert (code, err, rendered["text"]) == (0, "", text + "<|start|>assistant")
        # What render writes can be parsed, too.
        assert run(["parse", "--tokenizer", str(small_dir)], [rendered], monkeypatch, capsys)[0] == 0


def test_null_header_fields_leave_a_message_openai_style(
    small_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    call = {"function": {"name": "f", "arguments": "{}"}}
    message = {"role": "assistant", "content": None, "channel": None, "thinking": "t", "tool_calls": [call]}
    _, (out,), _ = run(["render", "--tokenizer", str(small_dir)], [{"messages": [message]}], monkeypatch, capsys)
    assert "<|channel|>analysis<|message|>t<|end|>" in out["text"]
    assert "to=functions.f" in out["text"]


def test_a_bad_tokenizer_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, expected in (
        (str(tmp_path), "tokenizer.json: cannot be read"),
        ("nothing", "found 'nothing'"),
        ("x" * 300, "xxx"),
    ):
        code, out, err = run(["parse", "--tokenizer", name], [], monkeypatch, capsys)
        assert (code, out, err.count("\n")) == (2, [], 1)
        assert expected in err


def test_help_is_quick_and_needs_no_jax() -> None:
    command = [sys.executable, "-m", "gptoss_jax.harmony", "--help"]
    took = []
    for _ in range(3):
        started = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        took.append(time.perf_counter() - started)
    assert min(took) < 1.0
    check = "import gptoss_jax.text.harmony, sys; sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True)


def test_a_closed_pipe_is_no_error(small_dir: Path) -> None:
    command = [sys.executable, "-m", "gptoss_jax.harmony", "parse", "--tokenizer", str(small_dir)]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ
    )
    assert process.stdout is not None
    process.stdout.close()
    _, err = process.communicate(b'{"tokens": [1]}\n' * 10)
    assert err == b""
    assert process.returncode == 0


def test_lines_that_cannot_be_written_are_no_success(small_dir: Path) -> None:
    command = [sys.executable, "-m", "gptoss_jax.harmony", "parse", "--tokenizer", str(small_dir)]
    with open("/dev/full", "wb") as full:
        ended = subprocess.run(command, input=b'{"tokens": [1]}', stdout=full, stderr=subprocess.PIPE)
    assert ended.returncode == 2
    assert ended.stderr == b"error: standard output: No space left on device\n"
