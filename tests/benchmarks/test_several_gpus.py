"""The benchmark of several GPUs on virtual devices: its figures must be complete and consistent."""

import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import jax
import pytest

from benchmarks.several_gpus import (
    PROCESSES,
    cases_of,
    check,
    compared,
    default_meshes,
    flags,
    run,
    run_tasks,
    saved,
)
from benchmarks.several_gpus_tables import size_of, tables
from benchmarks.weights_alike import checksums, differences
from gptoss_jax.benching import collectives
from gptoss_jax.benching.collectives import OPERATIONS, _program, isolated_seconds
from gptoss_jax.checkpoints.loading import random_model
from gptoss_jax.errors import GptOssError, UsageError
from sharding import ShardingError, make_mesh
from sharding.compiled.program import Collectives, read_collectives
from tests.engine.schedules import TINY
from tests.quick import QUICK

ROOT = Path(__file__).parents[2]


def some(op: str) -> Collectives:
    return Collectives(op, ("expert",), (0, 2), False, 3, 3 * 4096)


@pytest.mark.parametrize(
    "op", [op for op in OPERATIONS if op not in ("ragged-all-to-all", "collective-broadcast")]
)
def test_isolated_collectives_are_those_of_the_program(op: str) -> None:
    mesh = make_mesh("expert=2,tensor=2")
    arrays = [jax.ShapeDtypeStruct((4 * 1024,), "float32")]
    programs = [_program(mesh, [some(op)], communicate) for communicate in (True, False)]
    texts = [program.lower(*arrays).compile().as_text() for program in programs]
    assert [read_collectives(text, mesh.shape) for text in texts] == [[some(op)], []]
    twice = dataclasses.replace(some(op), count=6, num_bytes=6 * 4096)
    assert read_collectives("\n".join([*texts, texts[0]]), mesh.shape) == [twice]


def test_isolated_time_is_the_difference_with_and_without_collectives(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []

    def context(name: str) -> Callable[[], AbstractContextManager[None]]:
        @contextmanager
        def entered() -> Iterator[None]:
            log.append(name)
            yield
            log.append(f"end of {name}")

        return entered

    def seconds(run: Callable[[], Any]) -> float:
        jax.block_until_ready(run())
        log.append("timed")
        return 5.0 if log.count("timed") == 1 else 3.0

    monkeypatch.setattr(collectives, "median_seconds", seconds)
    some_mesh = make_mesh("expert=2,tensor=2")
    assert isolated_seconds(some_mesh, [some("all-reduce")], context("shared"), context("exclusive")) == 2
    assert log == ["shared", "end of shared", "exclusive", "timed", "timed", "end of exclusive"]


def test_conditional_collectives_are_left_out() -> None:
    branch = Collectives("all-reduce", ("expert",), (0, 1), True, 1, 4096)
    assert isolated_seconds(make_mesh("expert=2"), [branch]) == 0


def test_default_meshes_use_every_device() -> None:
    for count in (2, 4, 8):
        meshes = default_meshes(count)
        assert {size_of(mesh) for mesh in meshes} == {count}
        assert len(set(meshes)) == len(meshes)
    assert list(cases_of(["tensor=2", "expert=2"]))[1:] == [
        ("tensor=2", "replicated"),
        ("expert=2", "replicated"),
        ("expert=2", "all-to-all"),
    ]


def test_the_planner_is_compared_with_the_device() -> None:
    step = {"memory": {"total": 103}, "least_seconds": 0.5, "bound_by": "links", "bound_seconds": {"links": 0.5}}
    step |= {"expected_seconds": 1.0}
    plan = {"meshes": [{"fits": True, "bytes": 90, "steps": {"decode": step}}]}
    row = compared(plan, {"peak": 100, "peak_before": 90, "compiled": 103, "seconds": 2.0}, "decode")
    assert row["bytes_differ"] == pytest.approx(0.03)
    assert row["seconds_differ"] == -0.5
    name = {"part": "memory", "model": "m", "mesh": "expert=2", "strategy": "replicated", "step": "decode"}
    assert "| -50.0 % ! |" in tables([name | row])
    failed = compared({"error": "no compiler"}, {"error": "out of memory"}, "decode")
    assert failed == {"error": "plan: no compiler; step: out of memory"}
    text = tables([name | failed])
    assert "Not measured" in text
    assert "The planner" not in text


def test_a_process_that_dies_leaves_a_row() -> None:
    [row] = run(["not a job"], 60, None)
    assert "ended with code 1" in row["error"]


def test_tasks_run_in_waves() -> None:
    """At most `concurrency` tasks run at once, and their exceptions are raised."""
    log: list[int] = []

    def task(number: int) -> Iterator[dict[str, Any]]:
        log.append(number)
        yield {"number": number}
        if number == 4:
            raise ValueError("broken")

    rows = [row["number"] for row in run_tasks([partial(task, i) for i in range(4)], 2)]
    assert sorted(rows[:2]) == [0, 1]
    assert sorted(rows[2:]) == [2, 3]
    with pytest.raises(ValueError, match="broken"):
        list(run_tasks([partial(task, 4)], 1))


def test_closing_the_rows_kills_the_processes(tmp_path: Path) -> None:
    def blocked() -> Iterator[dict[str, Any]]:
        process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        PROCESSES.add(process)
        yield {"process": process}
        process.wait()

    rows = run_tasks([blocked], 1)
    process = next(rows)["process"]
    rows.close()
    assert process.wait(10) < 0
    PROCESSES.discard(process)


Rows = list[dict[str, Any]]


@pytest.mark.long
def test_two_virtual_devices(tmp_path: Path) -> None:
    """All parts on a mesh of both devices with both strategies, and on a mesh that needs more devices."""
    file = tmp_path / "rows.jsonl"
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count=2 {QUICK}",
        "XDG_CACHE_HOME": str(tmp_path),
    }
    command = [sys.executable, "-m", "benchmarks.several_gpus", "--model", "embedded", "--json", str(file)]
    command += ["--meshes", "expert=2", "tensor=4", "--batch", "1,2", "--context", "64"]
    command += ["--prompt-tokens", "8", "--output-tokens", "8"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    both = [row for row in rows if row.get("mesh") == "expert=2"]
    check_answers(both)
    check_speed(both)
    check_memory([row for row in rows if row.get("mesh") in ("one device", "expert=2")])
    failed = [row for row in rows if row.get("mesh") == "tensor=4"]
    assert [row["part"] for row in failed] == ["tokens", "weights", "memory", "memory"]
    assert all("needs 4 devices, found 2" in row["error"] for row in failed)
    for part in ("needs 4 devices, found 2", "Which strategy is faster", "planned GiB"):
        assert part in done.stdout
    assert (
        len(re.findall(r"\| (?:replicated|all-to-all), \d+\.\d\d x ", done.stdout)) == 4
    )  # two batches, decode and prefill


def of_part(rows: Rows, part: str) -> Rows:
    return [row for row in rows if row["part"] == part]


def check_answers(rows: Rows) -> None:
    """Logits and greedy tokens match those of one device."""
    for part in ("logits", "tokens"):
        assert [row["strategy"] for row in of_part(rows, part)] == ["replicated", "all-to-all"]
    for row in of_part(rows, "logits"):
        assert row["within"]
        assert row["from_one"] <= row["one_from_float32"] < 0.1
        assert row["float32_from_one"] < 1e-5
        assert row["differing"] == 0 < row["compared"]
    for row in of_part(rows, "tokens"):
        assert row["identical"] == row["answers"] == row["correct"] == 8
        assert row["tokens"] == row["common_prefix"] > 100


def check_speed(rows: Rows) -> None:
    """Both strategies at each batch size, with their collectives."""
    found = of_part(rows, "speed")
    cases = [(row["strategy"], row["batch"]) for row in found]
    assert cases == [(strategy, batch) for strategy in ("replicated", "all-to-all") for batch in (1, 2)]
    for row in found:
        assert ("all-to-all" in row["ops"]) == (row["strategy"] == "all-to-all")
        assert min(row["rate"], row["prefill_rate"], row["collectives"], row["collective_least"]) > 0
    alone = [(row["strategy"], row["batch"]) for row in of_part(rows, "collectives") if "collective_alone" in row]
    assert alone == cases


def check_memory(rows: Rows) -> None:
    """Each step's row has the planner's figures, too."""
    found = of_part(rows, "memory")
    assert [row["step"] for row in found] == ["decode", "prefill"] * 3
    for row in found:
        # On CPUs the planner compiles for the local devices, which report no peak.
        assert row["planned_bytes"] == row["compiled"]
        assert row["seconds_differ"] == pytest.approx(row["planned_seconds"] / row["seconds"] - 1)
        assert 0 < row["least_seconds"] < row["planned_seconds"]
        assert row["peak"] is None


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None or importlib.util.find_spec("jax_plugins") is None,
    reason="needs the aot extra: uv run --isolated --extra aot --extra plot pytest",
)
def test_isolated_collectives_compile_for_gpus() -> None:
    code = """
from sharding.compiled.topologies import parse_topology, prepare_environment
prepare_environment()
import jax
from gptoss_jax.benching import collectives
from gptoss_jax.benching.collectives import OPERATIONS, _program
from jax.sharding import NamedSharding, PartitionSpec
from sharding import make_mesh
from sharding.compiled.program import Collectives, read_collectives

mesh = make_mesh("expert=2,tensor=2", parse_topology("h100:1x1x4").devices())
some = [Collectives(op, ("expert",), (0, 2), False, 3, 3 * 4096) for op in OPERATIONS if "broadcast" not in op]
where = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
arrays = [jax.ShapeDtypeStruct((4 * 1024,), "float32", sharding=where) for _ in some]
text = _program(mesh, some, True).lower(*arrays).compile().as_text()
assert sorted(read_collectives(text, mesh.shape), key=str) == sorted(some, key=str)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
def test_weights_that_differ_are_reported() -> None:
    first, second = checksums(random_model(TINY, "tensor=2")), checksums(random_model(TINY, "tensor=2"))
    assert not list(differences([[first], [second, first]]))
    name = "layers.1.self_attn.q_proj.weight on device 1"
    other = checksums(random_model(TINY, "tensor=2", seed=1))
    with_other = first | {name: (*first[name][:9], *other[name][9:12], *first[name][12:])}
    found = list(differences([[first], [second, with_other]]))
    assert found == [f"process 2, load 2: {name}: 3 of 64 blocks, from 9 to 11"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "/nope"), "/nope: no such file"),
        (("--meshes", "tensor=2", "expert=0"), "expert: expected a size of 1 or more"),
        (("--context", "0"), "--context: expected a number from 1, found 0"),
        (("--batch", "4,0"), "--batch: expected numbers from 1, found 0"),
        (("--output-tokens", "7"), "--output-tokens: expected a number from 8, found 7"),
        (("--topology", "h101"), "--topology: expected one of .*h100.*, found 'h101'"),
        (("--limit", "0"), "--limit: expected seconds above 0"),
        (("--compiler-options", "[1]"), "--compiler-options: expected an object"),
        (("--json", "/nope/rows.jsonl"), "--json: /nope/rows.jsonl: "),
    ],
)
def test_bad_options_are_rejected_before_measuring(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises((GptOssError, ShardingError), match=message):
        check(flags().parse_args(["--model", "embedded", *arguments]))


def test_bad_rows_are_named(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"part": "weights"}\n[1]\n')
    with pytest.raises(UsageError, match=r"rows\.jsonl: line 2: expected a JSON object"):
        saved(file)
    with pytest.raises(UsageError, match=r"other\.jsonl: No such file"):
        saved(tmp_path / "other.jsonl")


@pytest.mark.slow
def test_failure_to_load_is_not_reported_as_a_difference() -> None:
    command = [sys.executable, "-m", "benchmarks.weights_alike", "--model", "embedded", "--mesh", "tensor=x"]
    ended = subprocess.run([*command, "--processes", "2"], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 2
    assert ended.stderr == "error: mesh: tensor: expected a size of 1 or more, found 'x'\n"


@pytest.mark.slow
def test_processes_load_the_same_weights(tmp_path: Path) -> None:
    (tmp_path / "tiny.json").write_text(json.dumps(TINY.to_dict()))
    command = [sys.executable, "-m", "benchmarks.weights_alike", "--model", str(tmp_path / "tiny.json")]
    command += ["--mesh", "tensor=4", "--processes", "2", "--loads", "2"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith("4 loads by 2 processes, ")
    assert ended.stdout.endswith(": 0 differed\n")
