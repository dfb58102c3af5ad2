"""The commands, run in this process on the embedded model."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import pallas_kernels
from gptoss_jax import LLM, chat, generate
from gptoss_jax.checkpoints.loading import EMBEDDED
from gptoss_jax.commands import batch
from gptoss_jax.engine.engine import TokenEvent
from gptoss_jax.text.tokenizer import Tokenizer
from pallas_kernels import backend
from tests.text.harmony.test_parse import tokens_of

P1 = Path(__file__).parents[1] / "golden" / "P1"
SUM = "What is 17 + 25?"


def test_an_answer_goes_to_standard_output_and_the_rest_to_standard_error(command) -> None:
    code, out, err = command(generate.main, SUM)
    assert (code, out) == (0, "17 + 25 = 42\n")
    assert "tok/s" in err.splitlines()[-1]
    assert "Ones" not in err
    assert "Ones" in command(generate.main, SUM, "--show-analysis")[2]


def test_the_prompt_may_come_from_a_file_or_standard_input(command, tmp_path: Path) -> None:
    (tmp_path / "prompt").write_text(SUM)
    assert command(generate.main, "--prompt-file", tmp_path / "prompt")[1] == "17 + 25 = 42\n"
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


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_during_garbage_collection_is_not_lost(number: signal.Signals, code: int) -> None:
    # The tests' parent process may ignore SIGINT, as a shell does for background processes.
    program = f"""
import gc, os, signal, time
from gptoss_jax.commands.running import run_command
from gptoss_jax.commands.signals import Terminated

signal.signal(signal.SIGINT, signal.default_int_handler)

def once(phase, info):
    gc.callbacks.remove(once)
    os.kill(os.getpid(), {int(number)})
    time.sleep(0.1)

def main():
    gc.callbacks.append(once)
    gc.collect()
    time.sleep(60)

run_command(main)
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30)
    assert ended.returncode == code
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_sigterm_leaves_no_partial_files(tmp_path: Path, number: signal.Signals, code: int) -> None:
    program = f"""
import signal, time
from gptoss_jax.commands.running import run_command
from gptoss_jax.commands.signals import Terminated
from gptoss_jax.checkpoints.new_directory import new_directory

signal.signal(signal.SIGINT, signal.default_int_handler)

def main():
    with new_directory({str(tmp_path / "out")!r}):
        print("begun", flush=True)
        time.sleep(60)

run_command(main)
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    process.send_signal(number)
    assert process.wait(30) == code
    assert not list(tmp_path.iterdir())


INTERRUPTIBLE = (
    sys.executable,
    "-c",
    "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "runpy.run_module('gptoss_jax.generate', run_name='__main__', alter_sys=True)",
)
"""`python -m gptoss_jax.generate` with SIGINT enabled, which a shell ignores in background processes."""

MOMENTS = (0.3, 1.0, 2.5, 5.0)
"""Seconds after the start: while modules are imported, weights loaded, steps compiled, tokens generated."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "seconds", [*MOMENTS, *(pytest.param(0.6 + 0.4 * i, marks=pytest.mark.long) for i in range(16))]
)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("times", [1, 2])
def test_a_signal_at_any_moment_ends_a_command(number: int, code: int, seconds: float, times: int) -> None:
    arguments = ("--raw", "--max-new-tokens", "4000", "x")
    process = subprocess.Popen(
        [*INTERRUPTIBLE, *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    for wait in (seconds, 0.01)[:times]:
        time.sleep(wait)
        process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert "Traceback" not in err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_does_not_wait_for_running_computations(tmp_path: Path, number: int, code: int) -> None:
    """XLA's threads abort the process if they are still running at interpreter exit."""
    lines = "".join(f'{{"prompt": "What is {i} + {i}?", "ignore_eos": true}}\n' for i in range(8))
    (tmp_path / "in.jsonl").write_text('{"prompt": "hi", "max_tokens": 1}\n' + lines)
    results = tmp_path / "out.jsonl"
    process = subprocess.Popen(
        [
            *(*INTERRUPTIBLE, "--batch", tmp_path / "in.jsonl"),
            *("--output", results, "--max-new-tokens", "3000"),
        ],
        stderr=subprocess.PIPE,
        text=True,
    )
    while process.poll() is None and not (results.exists() and results.read_bytes().endswith(b"\n")):
        time.sleep(0.05)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert "Traceback" not in err
    assert "terminate called" not in err
    assert [json.loads(line)["id"] for line in results.read_text().splitlines()] == [1]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_that_a_library_drops_is_sent_again(number: int, code: int) -> None:
    """In some places jaxlib silently drops exceptions raised by the Python functions that it calls."""
    program = f"""
import os, signal, time
from gptoss_jax.commands.running import run_command
from gptoss_jax.commands.signals import Terminated

signal.signal(signal.SIGINT, signal.default_int_handler)
library = {{"__name__": "jax._src", "os": os}}
exec('''
def drop(number):
    try:
        os.kill(os.getpid(), number)
    except BaseException:
        pass
''', library)

def main():
    library["drop"]({int(number)})
    time.sleep(60)

run_command(main)
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30)
    assert ended.returncode == code
    assert "Traceback" not in ended.stderr


def test_a_handled_interrupt_is_not_raised_again() -> None:
    program = """
import os, signal, time
from gptoss_jax.commands.running import run_command
from gptoss_jax.commands.signals import Terminated

signal.signal(signal.SIGINT, signal.default_int_handler)

def main():
    try:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)
    except KeyboardInterrupt:
        pass
    time.sleep(0.5)
    print("went on")

run_command(main)
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "went on\n", "")


@pytest.mark.parametrize("raised", ["KeyboardInterrupt", "Terminated(143)"])
def test_a_signal_wrapped_in_a_library_error_sets_the_exit_code(raised: str) -> None:
    program = f"""
from gptoss_jax.commands.running import run_command
from gptoss_jax.commands.signals import Terminated

def main():
    try:
        raise {raised}
    except BaseException:
        raise RuntimeError("made of it")

run_command(main)
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (143 if "143" in raised else 130, "interrupted\n")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("module", ["numpy._globals", "jax._src.config", "jax.numpy"])
def test_a_signal_while_jax_is_imported_leaves_no_traceback(number: int, code: int, module: str) -> None:
    """jaxlib imports numpy from C; it prints a traceback of an exception raised there, and raises ImportError."""
    program = f"""
import os, signal, sys
from gptoss_jax.commands.running import run_command
from gptoss_jax.commands.signals import Terminated

signal.signal(signal.SIGINT, signal.default_int_handler)

class Finder:
    def find_spec(self, name, path, target=None):
        if name == {module!r}:
            os.kill(os.getpid(), {int(number)})

def main():
    sys.meta_path.insert(0, Finder())
    import jax

run_command(main)
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (code, "interrupted\n" if number == signal.SIGINT else "")


def test_a_signal_while_an_extension_is_imported_is_not_lost() -> None:
    """jaxlib's module drops the exception and raises an ImportError without a cause."""
    program = """
import os, signal
from gptoss_jax.commands.running import run_command
from gptoss_jax.commands.signals import Terminated

def main():
    try:
        os.kill(os.getpid(), signal.SIGTERM)
    except BaseException:
        pass
    raise ImportError("Encountered an error while initializing the extension.")

run_command(main)
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (143, "interrupted\n")


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


@pytest.mark.parametrize("broken", [">&-", ">/dev/full"])
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


def test_chat_keeps_history_until_reset(command) -> None:
    lines = f"{SUM}\n/effort low\nWhat is 3 + 4?\n/nonsense\n/reset\nhello\n/exit\n"
    code, out, err = command(chat.main, "--hide-analysis", stdin=lines)
    assert code == 0
    assert out.startswith("17 + 25 = 42\n3 + 4 = 7\nHello")
    assert "/effort" in err


class Scripted(LLM):
    """An LLM whose engine returns the tokens of these completions, one per request, and records the prompts."""

    def __init__(self, *completions: str) -> None:
        self.tokenizer = Tokenizer.from_dir(EMBEDDED)
        self.engine = self  # type: ignore[assignment]
        self.prompts: list[str] = []
        self._left = [tokens_of(self.tokenizer, completion) for completion in completions]
        self._events: list[TokenEvent] = []

    def check(self, *request: object) -> None:
        """Accepts every request."""

    def add(self, request_id: str, prompt: list[int], *settings: object) -> None:
        self.prompts.append(self.tokenizer.decode(prompt))
        tokens = self._left.pop(0)
        self._events += [TokenEvent(request_id, 0, token) for token in tokens]
        # A completion without <|return|> or <|call|> at its end was truncated.
        stops = self.tokenizer.decode(tokens[-1:]) in ("<|return|>", "<|call|>")
        self._events[-1].finish_reason = "stop" if stops else "length"

    def step(self) -> list[TokenEvent]:
        return [self._events.pop(0)]

    def stop(self, request_id: str, index: int) -> None:
        self._events.clear()

    def cancel(self, request_id: str) -> None:
        self._events.clear()


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


def test_help_answers_at_once() -> None:
    for module in ("generate", "chat", "harmony", "bench"):
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", f"gptoss_jax.{module}", "--help"], check=True, capture_output=True)
        # Far above the time to parse flags, and far below the time to import jax on a busy machine.
        assert time.perf_counter() - started < 2


def test_help_does_not_import_jax() -> None:
    code = "import sys, gptoss_jax.generate, gptoss_jax.chat, gptoss_jax.bench; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_signal_ends_the_search_for_plugins_at_once() -> None:
    """jax logs a traceback for whatever is raised there, and goes on."""
    script = (
        "import os, signal\n"
        "from gptoss_jax.commands.running import run_command\n"
        "def discover_pjrt_plugins():\n"
        "    try:\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "    except BaseException:\n"
        "        print('went on')\n"
        "def main():\n"
        "    discover_pjrt_plugins()\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "run_command(main)\n"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout, found.stderr) == (130, "", "interrupted\n")
