"""The `bench` command on small models: its reports must be consistent; speed is not tested."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from gptoss_jax import bench
from gptoss_jax.benching.batch import TRACED_STEPS, Workload, new_tokens, step
from gptoss_jax.benching.launches import Launches, count_launches
from gptoss_jax.benching.sampling import SAMPLING_MODES
from gptoss_jax.benching.workload import Arrival
from gptoss_jax.checkpoints.loading import EMBEDDED
from gptoss_jax.commands.traces import read_trace
from gptoss_jax.engine.outputs import TokenEvent
from gptoss_jax.engine.pace import Pace
from sharding.compiled.program import count_kernels

FAST = ("--input-len", "20", "--output-len", "8", "--json")
MORE_SLOTS = ("--max-num-seqs", "3")


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """The config.json of a small model, without weights."""
    fields = json.loads((EMBEDDED / "config.json").read_text())
    fields |= {"num_hidden_layers": 1, "layer_types": ["full_attention"], "vocab_size": 300}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    return tmp_path / "config.json"


@pytest.mark.slow
def test_latency_compares_a_step_with_its_floor(command, config: Path) -> None:
    code, out, _ = command(
        bench.main,
        "latency",
        "--model",
        config,
        "--batch-size",
        "2",
        "--repeats",
        "1",
        "--sampling",
        "top_p,mask",
        *FAST,
    )
    assert code == 0
    result = json.loads(out)
    [row] = result["rows"]
    assert result["platform"] == "cpu"
    assert row["workload"] == {"batch": 2, "prompt_tokens": 20, "output_tokens": 8}
    assert 0 < row["first_token"] <= row["last_first_token"]
    assert row["floor"] == pytest.approx(row["step_bytes"] / result["ceilings"]["copy_bytes"])
    assert row["floor_share"] == pytest.approx(row["floor"] / row["step"])
    assert row["step_spread"][0] <= row["step"] <= row["step_spread"][1]
    assert 0 <= row["device_idle"] < 1
    assert row["kernels"] > 10
    assert set(row["sampling"]) == {"greedy", "top_p", "mask"}
    assert all(seconds > 0 for seconds in row["sampling"].values())


@pytest.mark.long
def test_every_sampling_mode_is_measured(command, config: Path) -> None:
    code, out, _ = command(
        bench.main, "latency", "--model", config, "--repeats", "1", *MORE_SLOTS, "--sampling", *FAST
    )
    assert code == 0
    [row] = json.loads(out)["rows"]
    assert set(row["sampling"]) == set(SAMPLING_MODES)
    assert all(seconds > 0 for seconds in row["sampling"].values())


@pytest.mark.slow
def test_throughput_follows_a_trace(command, config: Path, tmp_path: Path) -> None:
    lines = [{"arrival_s": 0.3 - i / 10, "prompt_tokens": 5 + 9 * i, "output_tokens": 3 + i} for i in range(3)]
    trace = tmp_path / "trace.jsonl"
    trace.write_text("\n".join(map(json.dumps, lines)))
    code, out, _ = command(bench.main, "throughput", "--model", config, "--trace", trace, "--json")
    result = json.loads(out)
    assert code == 0
    assert result["requests"] == 3
    assert (result["prompt_tokens"], result["output_tokens"]) == (42, 12)
    assert result["output_rate"] == pytest.approx(12 / result["seconds"])
    assert result["first_token"]["p50"] <= result["end_to_end"]["p50"]
    assert 0 <= result["late_launch_share"] <= 1
    # Prompts of 5, 14 and 23 tokens are computed as 8 and 64.
    assert 0 < result["padding_share"] < 1
    assert 0 <= result["compiled_programs"] <= result["compiled_after_warm_up"]
    code, out, _ = command(bench.main, "throughput", "--model", config, "--num-prompts", 2, *FAST[:-1])
    assert code == 0
    assert "2 requests in" in out


@pytest.mark.slow
def test_start_reports_each_phase(command, config: Path) -> None:
    code, out, _ = command(bench.main, "start", "--model", config, *FAST)
    assert code == 0
    cold, warm = json.loads(out)["starts"]
    for one in (cold, warm):
        assert sum(one["phases"].values()) == pytest.approx(one["total"])
    assert warm["phases"]["first_token"] < cold["phases"]["first_token"]
    assert cold["second_request"] < cold["phases"]["first_token"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("subcommand", "name", "begin"),
    [
        pytest.param("latency", "x.png", b"\x89PNG", marks=pytest.mark.long),
        ("throughput", "x.svg", b"<?xml"),
        pytest.param("start", "x.PDF", b"%PDF", marks=pytest.mark.long),
    ],
)
def test_plot_writes_a_figure(
    command, config: Path, tmp_path: Path, subcommand: str, name: str, begin: bytes
) -> None:
    pytest.importorskip("matplotlib")
    assert command(bench.main, subcommand, "--model", config, "--plot", tmp_path / name, *FAST)[0] == 0
    assert (tmp_path / name).read_bytes().startswith(begin)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((), "latency|throughput|start|serve"),
        (("latency", "--batch-size", "1,x"), "--batch-size"),
        (("latency", "--batch-size", "0"), "--batch-size"),
        (
            ("latency", "--batch-size", "1,4", "--max-num-seqs", "3"),
            "--max-num-seqs: expected at least the batch of 4, found 3",
        ),
        (("latency", "--output-len", "2"), "--output-len"),
        (("latency", "--top-p", "2"), "--top-p"),
        (("latency", "--input-len", "9,5000"), "--input-len"),
        (("latency", "--plot", "/no/such/x.png"), "--plot: /no/such"),
        (("latency", "--sampling", "top_p,guess"), "--sampling: expected some of greedy,"),
        (("latency", "--kernels", "fast"), "--kernels"),
        (("throughput", "--model", "/no/such.json"), "/no/such.json"),
        (("throughput", "--trace", "/no/such"), "--trace"),
        (("throughput", "--trace", "x", "--num-prompts", "64"), "--num-prompts: not with --trace"),
        (("throughput", "--trace", "x", "--input-len", "512"), "--input-len: not with --trace"),
        (("throughput", "--trace", "x", "--output-len", "128"), "--output-len: not with --trace"),
        (("throughput", "--input-len", "9000"), "--input-len: 9000 prompt and 128 output tokens exceed"),
        (("throughput", "--kv-cache-memory", "1000"), "error: --kv-cache-memory: 1000 bytes"),
        (("throughput", "--plot", "x.xyz"), "--plot: x.xyz: expected a name that ends in .png, .svg, .pdf"),
        (("latency", "--plot", "x"), "--plot: x: expected a name"),
    ],
)
def test_bad_input_is_one_line(command, arguments: tuple[str, ...], named: str) -> None:
    code, out, err = command(bench.main, *arguments)
    assert (code, out) == (2, "")
    assert named in err.splitlines()[-1]
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ('{"arrival_s": 1, "prompt_tokens": 3}', "output_tokens"),
        ('{"arrival_s": -1, "prompt_tokens": 3, "output_tokens": 1}', "arrival_s"),
        ('{"arrival_s": 1, "prompt_tokens": 0, "output_tokens": 1}', "prompt_tokens"),
        ("[]", "line 2"),
    ],
)
def test_a_bad_line_of_a_trace_is_named(tmp_path: Path, line: str, named: str) -> None:
    good = {"arrival_s": 2, "prompt_tokens": 3, "output_tokens": 1}
    file = tmp_path / "trace.jsonl"
    file.write_text(json.dumps(good), encoding="utf-8-sig")
    assert read_trace(file) == [Arrival(2, 3, 1)]
    file.write_text(json.dumps(good) + "\n" + line)
    with pytest.raises(Exception, match="line 2") as caught:
        read_trace(file)
    assert named in str(caught.value)


def test_a_request_that_fails_ends_the_measurement() -> None:
    class Failing:
        def step(self) -> list[TokenEvent]:
            return [
                TokenEvent("0", 0, 7),
                TokenEvent("1", 0, -1, finish_reason="error", error=MemoryError("full")),
            ]

    engine: Any = Failing()
    with pytest.raises(MemoryError, match="full"):
        step(engine)


def test_requests_decode_until_the_last_prompt_has_been_prefilled() -> None:
    """Of steps of 8 tokens, the prompts of 8 find 8, 7 and 6 left, so they take 1, 2 and 2 steps."""
    pace = Pace.of("cpu", None, 8, None, 3)
    workload = Workload(3, prompt_tokens=8, output_tokens=10)
    assert new_tokens(pace, 3, 0, workload) == 10 + 5 + 2 * TRACED_STEPS
    # With two drafts, each sequence that decodes takes up to three tokens: 8, 5 and 2 are left.
    assert new_tokens(pace, 3, 2, workload) == 3 * (10 + 1 + 2 + 4) + 2 * TRACED_STEPS


def test_kernels_of_a_program_are_counted() -> None:
    def program(x: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, 7, lambda i, x: jnp.sin(x @ x), x)

    text = jax.jit(program).lower(jnp.ones((64, 64))).compile().as_text()
    # One matrix product and one sine per iteration, and a few kernels outside the loop.
    assert 14 <= count_kernels(text) < 50
    assert count_kernels(f"{text}\n{text}") == 2 * count_kernels(text)


def test_launches_of_graphs_and_of_kernels_outside_them_are_counted() -> None:
    found = Launches()
    found.count(
        ["cuGraphLaunch (CudaGraph:71)", "cuLaunchKernelEx", "cuMemcpyDtoHAsync", "cuLaunchHostFunc", "step"]
    )
    found.count(["cuGraphLaunch", "cuLaunchKernel"])
    assert found == Launches(graphs=2, kernels_outside_graphs=2)


def test_no_launches_are_counted_without_a_gpu() -> None:
    with count_launches() as found:
        jax.block_until_ready(jnp.arange(8) + 1)
    assert found == Launches()
