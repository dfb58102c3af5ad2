"""The commands, run in this process on the embedded model."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

import pallas_kernels
from gptoss_jax import chat, generate
from gptoss_jax.checkpoints.loading import EMBEDDED
from gptoss_jax.commands import batch
from gptoss_jax.commands.files import read_text
from pallas_kernels import backend
from tests.commands.test_conversations import scripted

P1 = Path(__file__).parents[1] / "golden" / "P1"
SUM = "What is 17 + 25?"


def test_an_answer_goes_to_standard_output_and_the_rest_to_standard_error(command) -> None:
    code, out, err = command(generate.main, SUM)
    assert (code, out) == (0, "17 + 25 = 42\n")
    assert "tok/s" in err.splitlines()[-1]
    assert "Ones" not in err
    assert "Ones" in command(generate.main, SUM, "--show-analysis")[2]


@pytest.mark.slow
def test_the_prompt_may_come_from_a_file(command, tmp_path: Path) -> None:
    (tmp_path / "prompt").write_text(SUM)
    assert command(generate.main, "--prompt-file", tmp_path / "prompt")[1] == "17 + 25 = 42\n"


@pytest.mark.slow
def test_the_prompt_may_come_from_standard_input(command) -> None:
    assert command(generate.main, stdin=SUM)[1] == "17 + 25 = 42\n"


def test_json_holds_everything(command) -> None:
    code, out, _ = command(generate.main, SUM, "--json", "--logprobs", "2")
    result = json.loads(out)
    assert code == 0
    assert result["messages"][0]["content"] == "17 + 25 = 42"
    assert "Ones" in result["messages"][0]["thinking"]
    assert result["finish_reason"] == "stop"
    assert result["usage"]["completion_tokens"] == len(result["token_ids"]) == len(result["logprobs"])
    assert set(result["timings"]) > {"time_to_first_token_seconds", "tokens_per_second"}
    for token, at in zip(result["token_ids"], result["logprobs"], strict=True):
        assert at["token_id"] == token
        assert len(at["top"]) == 2
        assert at["logprob"] == max(at["top"].values()) <= 0


@pytest.mark.slow
def test_token_ids_need_no_tokenizer(command) -> None:
    code, out, _ = command(
        generate.main, "--model", P1, "--prompt-tokens", "1,2,3", "--json", "--max-new-tokens", 5
    )
    result = json.loads(out)
    assert code == 0
    assert len(result["token_ids"]) == 5
    assert result["text"] is None
    assert result["finish_reason"] == "length"


@pytest.mark.slow
def test_raw_text_is_continued_without_a_chat_format(command) -> None:
    raw = json.loads(command(generate.main, SUM, "--raw", "--json", "--max-new-tokens", 3)[1])
    chat_ = json.loads(command(generate.main, SUM, "--json", "--max-new-tokens", 3)[1])
    assert raw["usage"]["prompt_tokens"] < chat_["usage"]["prompt_tokens"]
    assert raw["messages"] == []


@pytest.mark.long
def test_seed_repeats_and_stop_ends(command) -> None:
    arguments = (SUM, "--json", "--temperature", 1.5, "--top-p", 0.9, "--top-k", 50, "--min-p", 0.01)
    first, again = (json.loads(command(generate.main, *arguments, "--seed", 7)[1]) for _ in range(2))
    assert first["token_ids"] == again["token_ids"]
    stopped = json.loads(command(generate.main, SUM, "--json", "--stop", "= 4")[1])
    assert stopped["text"] == stopped["messages"][0]["content"] == "17 + 25 "
    assert stopped["finish_reason"] == "stop"


def test_a_tool_is_called(command, tmp_path: Path) -> None:
    parameters = {"type": "object", "properties": {"location": {"type": "string"}}, "required": ["location"]}
    function = {"name": "get_weather", "description": "Gets the current weather.", "parameters": parameters}
    (tmp_path / "tools.json").write_text(json.dumps([{"type": "function", "function": function}]))
    arguments = ("What is the weather in Paris?", "--tools", tmp_path / "tools.json")
    result = json.loads(command(generate.main, *arguments, "--json")[1])
    assert result["finish_reason"] == "tool_calls"
    [call] = result["messages"][0]["tool_calls"]
    assert call["function"]["name"] == "get_weather"
    assert json.loads(call["function"]["arguments"]) == {"location": "Paris"}
    assert command(generate.main, *arguments)[1].startswith("get_weather({")


def test_the_answer_matches_the_grammar(command, tmp_path: Path) -> None:
    (tmp_path / "answer.gbnf").write_text('root ::= "It is " [0-9]+ "!"')
    code, out, _ = command(generate.main, SUM, "--grammar", tmp_path / "answer.gbnf")
    assert code == 0
    assert re.fullmatch(r"It is \d+!\n", out)


@pytest.mark.slow
def test_accepted_drafts_are_counted(command) -> None:
    arguments = ("--model", P1, "--prompt-tokens", "1,2,3,1,2,3,1,2", "--json", "--max-new-tokens", 40)
    code, out, err = command(generate.main, *arguments, "--num-speculative-tokens", 2)
    usage = json.loads(out)["usage"]
    assert code == 0
    assert usage["drafted_tokens"] >= usage["accepted_tokens"]
    assert f"{usage['accepted_tokens']} of {usage['drafted_tokens']} drafts accepted" in err


def test_kernels_are_selected_and_missing_ones_reported_once(command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_warned", set())
    arguments = ("--prompt-tokens", "1,2", "--model", P1, "--json", "--max-new-tokens", 2)
    with pallas_kernels.platform("rocm"):
        code, out, err = command(generate.main, *arguments)
        assert code == 0
        warnings = [line for line in err.splitlines() if line.startswith("warning: ")]
        assert sum("expert_mlp falls back to its slow reference on rocm" in line for line in warnings) == 1
        code, same, err = command(generate.main, *arguments, "--kernels", "reference")
        assert json.loads(same)["token_ids"] == json.loads(out)["token_ids"]
        assert "warning" not in err


@pytest.mark.slow
def test_batch_resumes(command, tmp_path: Path) -> None:
    requests, results = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [{"id": f"q{i}", "prompt": f"What is {i} + 2?"} for i in range(4)]
    lines.append({"id": "m", "messages": [{"role": "user", "content": "3 - 5"}], "reasoning_effort": "low"})
    requests.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert command(generate.main, "--batch", requests, "--output", results)[0] == 0
    whole = {line["id"]: line["text"] for line in map(json.loads, results.read_text().splitlines())}
    assert whole == {f"q{i}": f"{i} + 2 = {i + 2}" for i in range(4)} | {"m": "3 - 5 = -2"}
    # The file ends as if the command had been interrupted while writing the fourth result.
    kept = results.read_text().splitlines(keepends=True)
    results.write_text("".join(kept[:3]) + kept[3][:20])
    code, _, err = command(generate.main, "--batch", requests, "--output", results)
    assert code == 0
    assert "3 of 5" in err
    assert results.read_text().splitlines(keepends=True)[:3] == kept[:3]
    text = results.read_text()
    assert {line["id"]: line["text"] for line in map(json.loads, text.splitlines())} == whole
    results.write_text(text + text[:20])
    assert command(generate.main, "--batch", requests, "--output", results)[0] == 0
    assert results.read_text() == text


@pytest.mark.parametrize("text", ['{"a": "precious line without end"}', '{"id": "a", "prompt": "hi"}\n'])
def test_output_files_without_results_are_not_modified(command, tmp_path: Path, text: str) -> None:
    requests, other = tmp_path / "in.jsonl", tmp_path / "other"
    requests.write_text('{"id": "a", "prompt": "hi"}')
    other.write_text(text)
    for output in (other, requests):
        before = output.read_text()
        code, _, err = command(generate.main, "--batch", requests, "--output", output)
        assert code == 2
        assert "--output" in err
        assert output.read_text() == before


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((SUM, "--temperature", "-1"), "--temperature"),
        ((SUM, "--max-new-tokens", "0"), "--max-new-tokens"),
        ((SUM, "--top-p", "nan"), "--top-p"),
        ((SUM, "--model", "/no/such/place"), "/no/such/place"),
        ((SUM, "--model", "a" * 5000), "File name too long"),
        ((SUM, "--tools", "/no/such/file"), "--tools"),
        ((SUM, "--mesh", "expert=two"), "error: --mesh: expert: expected a size"),
        ((SUM, "--model", ""), "--model: expected a path or a name, found ''"),
        ((SUM, "--mesh", "expert=64"), "64"),
        ((SUM, "--mesh", "x" * 300), "error: --mesh: expected axis=size,... or a preset"),
        (
            (SUM, "--kv-cache-memory", "9" * 23),
            "error: --kv-cache-memory: expected bytes from 1 to 2**63, found 999",
        ),
        (
            (SUM, "--gpu-memory-utilization", "0.5"),
            "--gpu-memory-utilization: expected a device that reports its memory, "
            "found cpu: set kv_cache_memory (--kv-cache-memory) instead",
        ),
        ((SUM, "--json-schema", ' {"type":"strange"}'), "error: --json-schema: "),
        ((SUM, "--json-schema", "[1]"), "error: --json-schema: expected a JSON schema object, found list"),
        *(
            ((SUM, flag, ""), f"argument {flag}: expected ")
            for flag in ("--json-schema", "--regex", "--grammar", "--tools", "--stop", "--instructions")
        ),
        (("--prompt-file", ""), "--prompt-file: expected a path or a name, found ''"),
        (("--prompt-file", "/dev/null"), "error: --prompt-file: /dev/null: the prompt is empty"),
        ((), "error: standard input: the prompt is empty"),
        (("a\udcffb",), "error: argument prompt: expected UTF-8 text, found 'a\\udcffb'"),
        ((SUM, "--stop", "\udcff"), "error: argument --stop: expected UTF-8 text"),
        (("--prompt-tokens", "1_0"), "--prompt-tokens: expected integers such as 1,8,32, found '1_0'"),
        (("--prompt-tokens", "1" * 5000), "--prompt-tokens: expected integers"),
        (("--prompt-tokens=-1",), "error: --prompt-tokens: token -1 is outside the vocabulary of 1024"),
        ((SUM, "--prompt-tokens", "1"), "prompt"),
        (("--prompt-tokens", "1,x"), "--prompt-tokens"),
        (("--prompt-tokens", "99999999999999999999999"), "vocabulary"),
        (("--prompt-tokens", "1,1024"), "error: --prompt-tokens: token 1024 is outside the vocabulary of 1024"),
        ((SUM, "--max-new-tokens", "9999"), "error: --max-new-tokens: "),
        ((SUM, "--mesh", "tensor=7"), "error: --mesh: tensor=7: model.embed_tokens.weight: vocab of 1024"),
        ((SUM, "--max-num-seqs", "0"), "--max-num-seqs"),
        ((SUM, "--max-num-seqs", "x"), "--max-num-seqs"),
        ((SUM, "--kv-cache-memory", "250000"), "error: --kv-cache-memory: 250000 bytes"),
        ((SUM, "--long-prefill-token-threshold", "0"), "error: --long-prefill-token-threshold: expected"),
        ((SUM, "--kernels", "triton"), "--kernels: triton is for NVIDIA GPUs, found the platform cpu"),
        ((SUM, "--kernels", "mosaic_tpu"), "TPUs"),
        ((SUM, "--num-speculative-tokens", "100000"), "--num-speculative-tokens"),
        ((SUM, "--builtin-tools", "python,shell"), "shell"),
        ((SUM, "--logprobs", "3"), "--logprobs"),
        ((SUM, "--regex", "(a"), "--regex"),
        ((SUM, "--kernels", "fast"), "--kernels: expected auto, reference"),
        ((SUM, "--regex", "a", "--grammar", "x"), "--grammar"),
        ((SUM, "--grammar", "/no/such/file"), "--grammar"),
        ((SUM, "--json-schema", "/no/such/file"), "--json-schema"),
        ((SUM, "--json-schema", "{"), "--json-schema"),
        ((SUM, "--json-schema", '{"type": "strange"}'), "strange"),
        (("--prompt-tokens", "1,999999"), "999999"),
        (("--batch", "/no/such/file", "--output", "x"), "--batch"),
        (("--batch", "x"), "--output"),
        (("",), "prompt"),
    ],
)
def test_bad_input_is_one_line(command, arguments: tuple[str, ...], named: str) -> None:
    code, out, err = command(generate.main, *arguments)
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert named in err


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ('{"prompt": "hi", "stop": 5}', "stop"),
        ('{"prompt": "hi", "stop_token_ids": 3}', "stop_token_ids"),
        ('{"prompt_tokens": [1, 3000000000000000000000]}', "vocabulary"),
        ('{"prompt_tokens": [1.5]}', "prompt_tokens"),
        ('{"prompt_tokens": [-1]}', "line 2: prompt_tokens: token -1 is outside the vocabulary of 1024"),
        ('{"prompt": "hi", "temperature": NaN}', "not valid JSON: expected a finite number, found NaN"),
        (
            '{"prompt": "hi", "logit_bias": {"' + "1" * 5000 + '": 1}}',
            "logit_bias: expected at most 1024 token ids",
        ),
        ('{"prompt": "hi", "tools": {}}', "tools: expected a list, found dict"),
        ('{"prompt": null}', "expected one of prompt, messages, prompt_tokens"),
        ('{"messages": []}', "messages"),
        ('{"messages": "hi"}', "messages: expected a list, found 'hi'"),
        ('{"prompt": ""}', "prompt: expected non-empty text"),
        ('{"prompt": " ", "raw": true}', "prompt: expected non-empty text"),
        ('{"prompt": 5}', "prompt"),
        ('{"prompt_tokens": []}', "prompt_tokens: expected a non-empty list of integers"),
        ('{"prompt_tokens": [1, 5000]}', "token 5000 is outside the vocabulary"),
        ('{"prompt_tokens": [1], "max_tokens": 5000}', "exceed the model's context of 4096"),
        ('{"prompt_tokens": [1], "tools": []}', "tools: only with the chat format"),
        ('{"prompt": "hi", "raw": "no"}', "raw: expected true or false, found 'no'"),
        ('{"prompt": "hi", "ignore_eos": "no"}', "ignore_eos: expected true or false, found 'no'"),
        ('{"prompt": "hi", "structured_outputs": {"json_object": "yes"}}', "json_object: expected true"),
        ('{"prompt": "hi", "seed": ' + "1" * 5000 + "}", "JSON"),
        ('{"messages": [{"role": "user", "content": "hi"}], "raw": true}', "raw"),
        ('{"prompt": "hi", "id": true}', "id"),
        ('{"prompt": "hi", "temprature": 1}', "temprature"),
        ('{"prompt": "hi", "structured_outputs": {"regex": "(a"}}', "unclosed"),
        ('{"prompt": "hi", "structured_outputs": {"regexp": "a"}}', "regexp"),
        ('{"prompt": "hi", "tool_choice": "required"}', "tool_choice: expected tools with 'required'"),
        ('{"prompt": "hi", "parallel_tool_calls": 1}', "parallel_tool_calls: expected true or false"),
        ('{"prompt": "hi", "raw": true, "tool_choice": "none"}', "tool_choice: only with the chat format"),
        ("{", "JSON"),
    ],
)
def test_a_bad_line_of_a_batch_is_named(command, tmp_path: Path, line: str, named: str) -> None:
    (tmp_path / "in.jsonl").write_text('{"prompt": "fine", "id": 7}\n' + line)
    code, _, err = command(generate.main, "--batch", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl")
    assert code == 2
    assert len(err.splitlines()) == 1
    assert err.startswith(f"error: --batch: {tmp_path / 'in.jsonl'}: line 2: ")
    assert named in err
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(
    ("output", "arguments", "named"),
    [
        ("out.jsonl", ("--model", "/no/such/place"), "/no/such/place"),
        ("out.jsonl", ("--kv-cache-memory", "1000"), "--kv-cache-memory: 1000 bytes"),
        ("out.jsonl", ("--tools", "/no/such/file"), "--tools"),
        ("no/out.jsonl", (), "--output"),
        ("a" * 5000, (), "File name too long"),
        (".", (), "--output"),
    ],
)
def test_a_batch_that_cannot_start_leaves_nothing(
    command, tmp_path: Path, output: str, arguments: tuple[str, ...], named: str
) -> None:
    (tmp_path / "in.jsonl").write_text('{"prompt": "hi"}')
    code, _, err = command(
        generate.main, "--batch", tmp_path / "in.jsonl", "--output", tmp_path / output, *arguments
    )
    assert code == 2
    assert named in err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == [tmp_path / "in.jsonl"]


def test_a_batch_without_requests_is_refused(command, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text("\n")
    code, _, err = command(generate.main, "--batch", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl")
    assert code == 2
    assert "expected one request per line, found none" in err


@pytest.mark.slow
def test_a_full_disk_ends_a_batch_in_one_line(command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in.jsonl").write_text('{"prompt": "hi", "max_tokens": 2}')
    with open("/dev/full", "ab") as full:
        monkeypatch.setattr(batch, "_open_output", lambda path: full)
        code, _, err = command(generate.main, "--batch", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl")
    assert code == 2
    assert err.splitlines()[-1] == f"error: --output: {tmp_path / 'out.jsonl'}: No space left on device"


@pytest.mark.slow
@pytest.mark.parametrize(
    "broken",
    [
        "2>&1 >/dev/null | true",
        *(pytest.param(broken, marks=pytest.mark.long) for broken in ("2>&-", "2>/dev/full")),
    ],
)
def test_a_batch_needs_no_standard_error(tmp_path: Path, broken: str) -> None:
    requests, results = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    requests.write_text("".join(f'{{"prompt": "What is {i} + 2?", "max_tokens": 3}}\n' for i in range(3)))
    line = f"{sys.executable} -m gptoss_jax.generate --batch {requests} --output {results} {broken}; "
    code = subprocess.run(["bash", "-c", line + "exit ${PIPESTATUS[0]}"]).returncode
    assert code == 0
    assert len(results.read_text().splitlines()) == 3


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "latin-1", "utf-8", "utf-16-le"])
def test_unencodable_characters_are_escaped(encoding: str) -> None:
    """Unencodable characters do not end the command, and JSON output decodes to the same text in any encoding."""
    text = "a\u65e5\xe9\U0001f600\ud800b"
    program = f"""
import json, sys
from gptoss_jax.commands.running import run_command
from gptoss_jax.commands.signals import Terminated
from gptoss_jax.errors import UsageError

def main():
    print(json.dumps({text!r}, ensure_ascii=False))
    raise UsageError({text!r})

run_command(main)
"""
    environment = os.environ | {"PYTHONIOENCODING": f"{encoding}:strict"}
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, env=environment)
    assert ended.returncode == 2
    assert json.loads(ended.stdout.decode(encoding)) == text
    error = ended.stderr.decode(encoding).rstrip("\r\n")
    assert json.loads(f'"{error}"') == f"error: {text}"


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_standard_input_is_utf_8(encoding: str) -> None:
    program = """
from gptoss_jax import chat
from gptoss_jax.commands.running import run_command
from gptoss_jax.commands.signals import Terminated
from gptoss_jax.errors import UsageError

def main():
    while (line := chat._ask("")) is not None:
        print(ascii(line))

run_command(main)
"""
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    for given, code, out in (("\ufeffh\xe9\n".encode(), 0, b"'h\\xe9'\n"), (b"h\xe9\n", 2, b"")):
        ended = subprocess.run([sys.executable, "-c", program], input=given, capture_output=True, env=environment)
        assert (ended.returncode, ended.stdout) == (code, out)
        assert ended.stderr == (b"error: standard input: not UTF-8 text\n" if code else b"")


def test_unwritable_help_is_an_error() -> None:
    with open("/dev/full", "wb") as full:
        line = [sys.executable, "-m", "gptoss_jax.generate", "--help"]
        ended = subprocess.run(line, stdout=full, stderr=subprocess.PIPE, text=True)
    assert ended.returncode == 2
    assert ended.stderr == "error: standard output: No space left on device\n"


def test_a_bad_tool_is_named_with_its_file(command, tmp_path: Path) -> None:
    (tmp_path / "tools.json").write_text('[{"type": "function"}]')
    named = f"{tmp_path / 'tools.json'}: tools[0].name: expected"
    code, _, err = command(generate.main, SUM, "--tools", tmp_path / "tools.json")
    assert code == 2
    assert err.startswith(f"error: --tools: {named}")
    code, _, err = command(chat.main, stdin=f"/tools {tmp_path / 'tools.json'}\n")
    assert code == 0
    assert err.startswith(f"error: /tools: {named}")


@pytest.mark.parametrize("broken", [pytest.param(">&-", marks=pytest.mark.slow), ">/dev/full"])
def test_an_unwritable_answer_is_an_error(broken: str) -> None:
    line = f"{sys.executable} -m gptoss_jax.generate --prompt-tokens 1,2 --json --max-new-tokens 1 {broken}"
    ended = subprocess.run(["bash", "-c", line], capture_output=True, text=True)
    assert ended.returncode == 2
    assert ended.stderr.splitlines()[-1].startswith("error: standard output: ")


@pytest.mark.long
def test_byte_order_marks_are_ignored(command, tmp_path: Path) -> None:
    requests, results, schema = tmp_path / "in.jsonl", tmp_path / "out.jsonl", tmp_path / "schema.json"
    requests.write_text(json.dumps({"prompt": SUM}), encoding="utf-8-sig")
    schema.write_text('{"type": "boolean"}', encoding="utf-8-sig")
    (tmp_path / "tools.json").write_text("[]", encoding="utf-8-sig")
    files = ("--tools", tmp_path / "tools.json", "--json-schema", schema)
    assert command(generate.main, "--batch", requests, "--output", results, *files)[0] == 0
    assert json.loads(results.read_text())["text"] in ("true", "false")
    (tmp_path / "prompt").write_text(SUM, encoding="utf-8-sig")
    assert command(generate.main, "--prompt-file", tmp_path / "prompt")[1] == "17 + 25 = 42\n"
    assert command(generate.main, stdin="\ufeff" + SUM)[1] == "17 + 25 = 42\n"


@pytest.mark.slow
def test_batch_results_have_all_requested_fields(command, tmp_path: Path) -> None:
    line = {"prompt": "hi", "n": 2, "prompt_logprobs": 2, "max_tokens": 3, "stop": None, "logit_bias": {"5": 1}}
    (tmp_path / "in.jsonl").write_text(json.dumps(line))
    assert command(generate.main, "--batch", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl")[0] == 0
    result = json.loads((tmp_path / "out.jsonl").read_text())
    assert [len(completion["token_ids"]) for completion in result["completions"]] == [3, 3]
    assert result["usage"]["completion_tokens"] == 6
    assert len(result["prompt_logprobs"]) == result["usage"]["prompt_tokens"]


def test_a_broken_checkpoint_is_one_line(command, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(EMBEDDED, broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    code, _, err = command(generate.main, SUM, "--model", broken)
    assert code == 2
    assert len(err.splitlines()) == 1
    assert "model.safetensors" in err


def test_a_prompt_file_is_read_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "prompt").write_bytes(b"a\r\nb\rc\n")
    assert read_text(tmp_path / "prompt", "--prompt-file") == "a\r\nb\rc\n"


@pytest.mark.slow
def test_null_is_absent_in_a_batch(command, tmp_path: Path) -> None:
    names = (
        "messages",
        "tools",
        "builtin_tools",
        "reasoning_effort",
        "response_format",
        "max_tokens",
        "temperature",
    )
    line = {"id": None, "prompt": SUM} | dict.fromkeys(names)
    (tmp_path / "in.jsonl").write_text(json.dumps(line))
    arguments = ("--batch", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl")
    assert command(generate.main, *arguments, "--max-new-tokens", 2)[0] == 0
    result = json.loads((tmp_path / "out.jsonl").read_text())
    assert (result["id"], len(result["token_ids"])) == (1, 2)


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("/effort foo", "/effort: expected low, medium or high, found 'foo'"),
        ("/analysis maybe", "/analysis: expected on or off, found 'maybe'"),
        ("/nope", "unknown command '/nope'; /help lists the commands"),
        ("/tools", "/tools: expected a file or off, found ''"),
        ("/tools ~nobodyhere/x.json", "/tools: ~nobodyhere/x.json: No such file or directory"),
        ("/tools a\0b", "/tools: 'a\\x00b': embedded null byte"),
        ("/tools ~a\0b", "/tools: '~a\\x00b': embedded null byte"),
        ("/tools " + "x" * 300, f"/tools: {'x' * 300}: File name too long"),
        ("\udcff", "standard input: not UTF-8 text"),
    ],
)
def test_a_bad_line_does_not_end_a_chat(command, monkeypatch: pytest.MonkeyPatch, line: str, named: str) -> None:
    scripted(monkeypatch, "<|channel|>final<|message|>ok<|return|>")
    code, out, err = command(chat.main, stdin=f"{line}\nhi\n")
    assert (code, out, err) == (0, "ok\n", f"error: {named}\n")


@pytest.mark.slow
def test_chat_keeps_history_until_reset(command) -> None:
    lines = f"{SUM}\n/effort low\nWhat is 3 + 4?\n/help\n/reset\nhello\n/exit\n"
    code, out, err = command(chat.main, "--hide-analysis", stdin=lines)
    assert code == 0
    assert out.startswith("17 + 25 = 42\n3 + 4 = 7\nHello")
    assert "/effort" in err


def test_help_answers_at_once() -> None:
    for module in ("generate", "chat", "harmony", "bench"):
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", f"gptoss_jax.{module}", "--help"], check=True, capture_output=True)
        # Far above the time to parse flags, and far below the time to import jax on a busy machine.
        assert time.perf_counter() - started < 2


def test_help_does_not_import_jax() -> None:
    code = "import sys, gptoss_jax.generate, gptoss_jax.chat, gptoss_jax.bench; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
