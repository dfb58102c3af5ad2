"""`bench serve` against a server with known delays."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gptoss_jax import bench
from tests.benching.fake_server import GAP, STREAM, TTFT, Call, FakeServer, Parts, completions, event, refusal

SLACK = 0.4
"""Seconds by which a busy machine may delay a request."""


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as server:
        yield server


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture
def serve(command, server: FakeServer) -> Callable[..., tuple[int, dict[str, Any], str]]:
    """Run `bench serve --json`; returns (exit code, results, standard error)."""

    def run(*arguments: object) -> tuple[int, dict[str, Any], str]:
        code, out, err = command(bench.main, "serve", "--url", server.url, "--json", *arguments)
        return code, json.loads(out) if out else {}, err

    return run


SHORT = ("--random-input-len", 12, "--random-output-len", 6)


@pytest.mark.parametrize(
    ("backend", "path", "added"),
    [
        ("openai", "/v1/completions", 0),
        ("openai-chat", "/v1/chat/completions", 70),
        ("openai-responses", "/v1/responses", 70),
    ],
)
def test_counts_are_exact_and_times_are_the_servers(serve, server, backend: str, path: str, added: int) -> None:
    code, found, err = serve("--backend", backend, "--num-prompts", 4, *SHORT)
    assert code == 0, err
    assert [call.path for call in server.calls] == ["/v1/models", *[path] * 4]
    assert all(call.body["model"] == "fake" and call.body["stream"] for call in server.calls[1:])
    assert (found["completed"], found["failed"], found["failures"]) == (4, 0, {})
    assert found["total_input_tokens"] == 4 * (12 + added)
    assert found["total_output_tokens"] == 4 * 6
    assert found["max_concurrent_requests"] == server.peak == 4
    expected = {"ttft": TTFT, "tpot": GAP, "itl": GAP, "e2el": TTFT + 5 * GAP}
    for name, seconds in expected.items():
        # The server delays no event that is late already, so a gap may also be shorter.
        assert 0.8e3 * seconds < found[f"median_{name}_ms"] < 1.6e3 * seconds, name
        assert found[f"p99_{name}_ms"] < 1e3 * (seconds + SLACK)
    assert found["output_throughput"] == pytest.approx(24 / found["duration"])
    assert found["request_throughput"] == pytest.approx(4 / found["duration"])
    assert "100%" in err


def test_bodies(serve, server: FakeServer) -> None:
    """The fields of OpenAI's API reference, and vLLM's ignore_eos."""
    more = ("--num-prompts", 1, "--ignore-eos", "--temperature", "0.5", "--extra-body", '{"user": "x"}', *SHORT)
    given = {"model": "m", "stream": True, "ignore_eos": True, "temperature": 0.5, "user": "x"}
    usage = {"stream_options": {"include_usage": True}}
    for backend in ("openai", "openai-chat", "openai-responses"):
        assert serve("--backend", backend, "--model", "m", *more)[0] == 0
    completion, chat, response = (call.body for call in server.calls if call.body)
    prompt, messages, text = completion.pop("prompt"), chat.pop("messages"), response.pop("input")
    assert len(prompt) == 12
    assert all(type(token) is int and 0 <= token < 1000 for token in prompt)
    assert messages == [{"role": "user", "content": text}]
    assert len(text.split()) == 12
    assert completion == given | usage | {"max_tokens": 6}
    assert chat == given | usage | {"max_completion_tokens": 6}
    assert response == given | {"max_output_tokens": 6}


def test_concurrency_is_limited_and_connections_are_used_again(serve, server: FakeServer) -> None:
    code, found, _ = serve("--num-prompts", 6, "--max-concurrency", 2, "--num-warmups", 2, *SHORT)
    assert (code, found["completed"], found["max_concurrency"]) == (0, 6, 2)
    assert server.peak == found["max_concurrent_requests"] == 2
    assert len(server.calls) == 1 + 2 + 6
    assert server.connections == 2
    assert found["duration"] > 3 * (TTFT + 5 * GAP)


def test_a_connection_that_the_server_has_closed_is_not_used_again(serve, server: FakeServer) -> None:
    def closing(call: Call) -> Parts:
        yield from completions(call)
        yield None

    server.answer = closing
    code, found, _ = serve("--num-prompts", 3, "--max-concurrency", 1, *SHORT)
    assert (code, found["completed"]) == (0, 3)


def test_requests_follow_the_rate(serve) -> None:
    code, found, _ = serve("--num-prompts", 10, "--request-rate", 20, "--random-output-len", 1)
    # The last of 10 requests is sent at 10 / 20 s, and takes the time to its only token.
    assert (code, found["request_rate"]) == (0, 20)
    assert 0.5 + TTFT <= found["duration"] < 0.5 + TTFT + SLACK
    assert found["mean_tpot_ms"] is None


def test_a_trace_has_sizes_and_times(serve, server: FakeServer, tmp_path: Path) -> None:
    file = tmp_path / "trace.jsonl"
    lines = [
        {"arrival_s": seconds, "prompt_tokens": 5 + i, "output_tokens": 1 + i}
        for i, seconds in enumerate((0.0, 0.4, 9.0))
    ]
    file.write_text("\n".join(map(json.dumps, lines)))
    code, found, _ = serve("--dataset-path", file, "--num-prompts", 2)
    assert (code, found["dataset_name"], found["request_rate"]) == (0, "timed_trace", None)
    assert (found["total_input_tokens"], found["total_output_tokens"]) == (11, 3)
    assert [len(call.body.get("prompt", "")) for call in server.calls] == [0, 5, 6]
    assert 0.4 + TTFT + GAP <= found["duration"] < 0.4 + TTFT + GAP + SLACK
    code, found, _ = serve("--dataset-path", file, "--request-rate", "inf", "--backend", "openai-chat")
    assert (code, found["completed"], found["total_input_tokens"]) == (0, 3, 18 + 3 * 70)
    assert found["duration"] < 1


def test_custom_prompts(serve, server: FakeServer, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "What is 2 + 2?", "output_tokens": 3}\n\n{"prompt": "Why?", "category": 1}\n')
    arguments = ("--dataset-name", "custom", "--dataset-path", file, "--max-concurrency", 1)
    assert serve(*arguments, "--custom-output-len", 2)[0] == 0
    assert [(call.body["prompt"], call.body["max_tokens"]) for call in server.calls[1:]] == [
        ("What is 2 + 2?", 2),
        ("Why?", 2),
    ]
    assert serve(*arguments, "--num-prompts", 1)[0] == 0
    assert server.calls[-1].body["max_tokens"] == 3


USAGE_ONLY = {"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 1}}


def unlucky(call: Call) -> Parts:
    """Fails in another way for each length of the prompt."""
    token = event({"choices": [{"text": "a", "index": 0, "finish_reason": None}]})
    ways: list[list[bytes | None]] = [
        [refusal(429, "slow\ndown")],
        [b"HTTP/1.1 502 Bad\r\nContent-Length: 4\r\n\r\noops"],
        [None],
        [STREAM, token, None],
        [STREAM, token, event({"error": {"message": "out of pages", "code": 500}}), b"0\r\n\r\n"],
        [STREAM, token, b"0\r\n\r\n"],
        [STREAM, event(USAGE_ONLY), event("[DONE]"), b"0\r\n\r\n"],
        [STREAM, event("{oops"), b"0\r\n\r\n"],
        [STREAM, event({"choices": [7]}), b"0\r\n\r\n"],
        [STREAM, b"zzz\r\n"],
        [b"SSH-2.0\r\n\r\n"],
    ]
    yield from ways[len(call.body["prompt"]) - 1]


REASONS = (
    "HTTP 429: slow down",
    "HTTP 502: oops",
    "the connection was closed before the response",
    "the connection was closed in the middle of the response",
    "out of pages",
    "the stream ended before the output did",
    "the stream ended without output",
    "expected an event of JSON, found b'{oops'",
    "unexpected event: {'choices': [7]}",
    "expected the size of a chunk, found b'zzz'",
    "expected an HTTP/1.1 response, found 'SSH-2.0'",
)


def test_failures_are_counted_by_their_reason(serve, server: FakeServer, tmp_path: Path) -> None:
    server.answer = unlucky
    file = tmp_path / "trace.jsonl"
    lines = [{"arrival_s": 0, "prompt_tokens": i + 1, "output_tokens": 5} for i in range(len(REASONS))]
    file.write_text("\n".join(map(json.dumps, [lines[0], *lines])))
    code, found, err = serve("--dataset-path", file)
    assert found["failures"] == {REASONS[0]: 2} | dict.fromkeys(REASONS[1:], 1)
    assert (code, found["completed"], found["failed"]) == (1, 0, len(REASONS) + 1)
    assert "2 failed: HTTP 429: slow down" in err
    assert "Traceback" not in err


def test_failures_of_some_requests_are_in_the_report(serve, server: FakeServer) -> None:
    def every_other(call: Call) -> Parts:
        return iter([refusal(500, "boom")]) if len(server.calls) % 2 else completions(call)

    server.answer = every_other
    code, found, _ = serve("--num-prompts", 4, "--max-concurrency", 1, *SHORT)
    assert (code, found["completed"], found["failures"]) == (0, 2, {"HTTP 500: boom": 2})
    assert found["total_output_tokens"] == 12


def test_a_failed_response_of_the_responses_api(serve, server: FakeServer) -> None:
    def failed(call: Call) -> Parts:
        error = {"code": "server_error", "message": "no luck"}
        yield STREAM
        yield event({"type": "response.failed", "response": {"status": "failed", "error": error}}, named=True)
        yield b"0\r\n\r\n"

    server.answer = failed
    code, found, _ = serve("--backend", "openai-responses", "--num-prompts", 1)
    assert (code, found["failures"]) == (1, {"no luck": 1})


def test_output_without_usage_is_counted_by_its_events(serve, server: FakeServer) -> None:
    def plain(call: Call) -> Parts:
        """A body that ends with the connection, of a server that sends no usage and bundles two events."""
        token = b'data: {"choices": [{"text": "", "index": 0, "finish_reason": null}]}\n\n'
        end = b'data: {"choices": [{"text": "a", "index": 0, "finish_reason": "stop"}]}\n\n'
        yield b"HTTP/1.0 200 OK\r\nContent-Type: text/event-stream\r\n\r\n" + token + token
        yield 0.05
        yield end
        yield None

    server.answer = plain
    code, found, _ = serve("--num-prompts", 1, "--random-input-len", 9, "--metric-percentiles", "0,100")
    assert (code, found["total_input_tokens"], found["total_output_tokens"]) == (0, 9, 3)
    assert found["p0_itl_ms"] == 0
    assert 50 <= found["p100_itl_ms"] < 50 + 1e3 * SLACK


def test_results_are_saved(serve, server: FakeServer, tmp_path: Path) -> None:
    given = ("--num-prompts", 2, "--save-result", "--result-dir", tmp_path / "new", *SHORT)
    code, found, _ = serve(
        *given, "--model", "org/name", "--goodput", "ttft:5000", "e2el:1", "--percentile-metrics", "ttft"
    )
    assert (code, found["request_goodput"]) == (0, 0.0)
    assert "mean_ttft_ms" in found
    assert "mean_e2el_ms" not in found
    [file] = (tmp_path / "new").iterdir()
    assert file.name.startswith("openai-infqps-name-")
    assert json.loads(file.read_text()) == found
    code, found, _ = serve(
        *given, "--save-detailed", "--result-filename", "x.json", "--backend", "openai-responses"
    )
    saved = json.loads((tmp_path / "new" / "x.json").read_text())
    assert code == 0
    assert saved["output_lens"] == [6, 6]
    assert saved["generated_texts"] == [" a" * 6] * 2
    assert [len(gaps) for gaps in saved["itls"]] == [5, 5]
    assert "itls" not in found


def test_the_key_is_sent(serve, server: FakeServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    serve("--num-prompts", 1, *SHORT)
    assert all("authorization" not in call.headers for call in server.calls)
    server.calls.clear()
    monkeypatch.setenv("OPENAI_API_KEY", "sk-1")
    serve("--num-prompts", 1, *SHORT)
    (tmp_path / "key").write_text("sk-2\n")
    serve("--num-prompts", 1, "--api-key-file", tmp_path / "key", *SHORT)
    assert [call.headers["authorization"] for call in server.calls] == ["Bearer sk-1"] * 2 + ["Bearer sk-2"] * 2


def test_a_url_may_end_in_v1(command, server: FakeServer) -> None:
    for url in (f"{server.url}/v1", f"{server.url}/v1/"):
        code, out, _ = command(bench.main, "serve", "--base-url", url, "--num-prompts", 1, *SHORT)
        assert code == 0
        assert "Successful requests:                     1" in out


def unused_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def test_an_unreachable_server_is_one_line(command) -> None:
    port = unused_port()
    code, out, err = command(bench.main, "serve", "--port", port)
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith(f"error: --host, --port: 127.0.0.1:{port}: ")
    assert "Traceback" not in err
    started = time.monotonic()
    assert command(bench.main, "serve", "--port", port, "--ready-check-timeout-sec", 1)[0] == 2
    assert 1 <= time.monotonic() - started < 5


@pytest.mark.parametrize(
    ("models", "arguments", "named"),
    [
        (refusal(401, "bad key"), ("--model", "m"), "GET /v1/models: HTTP 401: bad key"),
        (refusal(503, "loading"), ("--model", "m"), "GET /v1/models: HTTP 503: loading"),
        (refusal(404, "?"), (), "--model: expected a name, because the server lists no models (HTTP 404)"),
    ],
)
def test_a_server_that_cannot_be_used_is_one_line(serve, server, models, arguments, named: str) -> None:
    server.models = models
    code, _, err = serve(*arguments)
    assert code == 2
    assert named in err.splitlines()[-1]


def test_a_server_need_not_list_its_models(serve, server: FakeServer) -> None:
    server.models = refusal(404, "?")
    code, found, _ = serve("--model", "m", "--num-prompts", 1, *SHORT)
    assert (code, found["model_id"]) == (0, "m")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--url", "localhost:8000"), "--url: 'localhost:8000': expected http://HOST:PORT"),
        (("--request-rate", "0"), "--request-rate: expected a number above 0, or inf, found '0'"),
        (("--request-rate", "nan"), "--request-rate"),
        (("--burstiness", "inf"), "--burstiness"),
        (("--max-concurrency", "0"), "--max-concurrency: expected an integer from 1, found '0'"),
        (("--num-prompts", "-1"), "--num-prompts"),
        (("--random-range-ratio", "1"), "--random-range-ratio: expected a number from 0 to below 1, found '1'"),
        (("--metric-percentiles", "50,101"), "--metric-percentiles: expected a number from 0 to 100, found '101'"),
        (
            ("--percentile-metrics", "ttft,x"),
            "--percentile-metrics: expected some of ttft,tpot,itl,e2el, found 'x'",
        ),
        (
            ("--goodput", "ttft"),
            "--goodput: expected NAME:MILLISECONDS with one of ttft,tpot,itl,e2el, found 'ttft'",
        ),
        (("--goodput", "ttft:x"), "--goodput: expected a number from 0, found 'x'"),
        (("--extra-body", "[]"), "--extra-body: expected a JSON object, found a JSON list"),
        (("--extra-body", "{"), "--extra-body: not valid JSON"),
        (("--dataset-name", "custom"), "--dataset-path: expected a file for --dataset-name custom"),
        (("--dataset-name", "random", "--dataset-path", "x"), "--dataset-path: not with --dataset-name random"),
        (("--dataset-path", "/no/such"), "--dataset-path: /no/such: No such file"),
        (
            ("--dataset-path", "x", "--random-input-len", "5"),
            "--random-input-len: not with --dataset-name timed_trace",
        ),
        (("--custom-output-len", "5"), "--custom-output-len: not with --dataset-name random"),
        (("--save-detailed",), "--save-detailed: only with --save-result"),
        (("--api-key-file", "/no/such"), "--api-key-file: /no/such"),
        (("--endpoint", "v1"), "--endpoint: expected a path"),
        (("--backend", "tgi"), "--backend"),
    ],
)
def test_bad_flags_are_one_line(command, arguments: tuple[str, ...], named: str) -> None:
    code, out, err = command(bench.main, "serve", *arguments)
    assert (code, out) == (2, "")
    assert named in err.splitlines()[-1]
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("{}", "line 2: prompt: expected text"),
        ('{"prompt": "x", "output_tokens": 0}', "line 2: output_tokens: expected"),
    ],
)
def test_a_bad_prompt_is_named(command, tmp_path: Path, line: str, named: str) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text(f'{{"prompt": "x"}}\n{line}')
    code, _, err = command(bench.main, "serve", "--dataset-name", "custom", "--dataset-path", file)
    assert code == 2
    assert named in err.splitlines()[-1]
    file.write_text('{"prompt": "x"}')
    code, _, err = command(
        bench.main, "serve", "--dataset-name", "custom", "--dataset-path", file, "--num-prompts", 2
    )
    assert "--num-prompts: expected at most the file's 1 requests, found 2" in err


PROGRAM = (
    "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "import runpy; runpy.run_module('gptoss_jax.bench', run_name='__main__', alter_sys=True)"
)


def test_ctrl_c_prints_what_there_is(server: FakeServer) -> None:
    arguments = ("--num-prompts", 500, "--request-rate", 100, "--random-input-len", 3, "--random-output-len", 2)
    line = [sys.executable, "-c", PROGRAM, "serve", "--url", server.url, *map(str, arguments)]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 30
    while len(server.calls) < 60 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130, err
    completed = int(out.split("Successful requests:")[1].split()[0])
    assert 1 <= completed < 500
    assert f"{completed} of 500 requests had ended" in err
    assert "Traceback" not in err
    assert "never retrieved" not in err


def test_jax_is_not_imported() -> None:
    program = (
        "import sys; sys.argv[1:] = ['serve', '--port', '1']; from gptoss_jax import bench\n"
        "try: bench.main()\nexcept Exception as error: print(error)\n"
        "assert 'gptoss_jax.commands.load' in sys.modules\nassert 'jax' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    assert "--port" in done.stdout
