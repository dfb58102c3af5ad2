"""Correctness, speed and memory of sharded models on several GPUs: python -m benchmarks.several_gpus --json rows.jsonl

For the model on each mesh, and with sharded experts for both strategies of `sharding/experts.py`, it measures:

- logits: the error of one device against a float32 reference on the same weights, and of the mesh against one device
- tokens: whether the embedded model gives the same answers as on one device
- speed: decode and prefill relative to one device in this run, and the collectives of a step: the lower bound of their
  time on the links, and the time of the same collectives in isolation on the same mesh
- memory: the planner's bytes and expected times, compared with those of the devices

Each mesh is measured in processes of its own. A process that fails leaves a row with the error, and the others
continue. Most of the time is spent compiling: `--concurrency 5` runs five processes at once, which allocate device
memory on demand, and measure times one at a time. If memory runs out, collectives may hang: more than five processes
are too many for 80 GB. Rows are printed to standard error, and appended to `--json`, as soon as they are known. Tables
are printed at the end, even if the run is interrupted. `--show` makes them from saved rows. To try it without GPUs:

JAX_PLATFORMS=cpu XLA_FLAGS=--xla_force_host_platform_device_count=8 python -m benchmarks.several_gpus \\
    --model embedded --batch 1,8 --prompt-tokens 32 --output-tokens 16
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.several_gpus_tables import tables
from gptoss_jax.commands.files import check_writable, parse_json, read_text
from gptoss_jax.commands.flags import flag_name, integers
from gptoss_jax.commands.running import run_command
from gptoss_jax.errors import expect, named

ROOT = Path(__file__).parent.parent
PARTS = ("logits", "tokens", "speed", "memory")
STEPS = ("decode", "prefill")
ONE, REPLICATED, ALL_TO_ALL = "one device", "replicated", "all-to-all"

NO_MULTICAST = {"NCCL_NVLS_ENABLE": "0", "NVSHMEM_DISABLE_NVLS": "1"}
"""Environment that is set before a process imports jax. NVLink multicast needs groups from the switches' fabric
manager, which guests of a shared host may not get, and a failure can make the GPUs unusable for other guests, too."""

MEMORY_SHARE = ".95"
"""Default of XLA_PYTHON_CLIENT_MEM_FRACTION: the usable memory of sharding/compiled/devices.json."""

ENDED = "ended"
"""A file in a job's folder that marks the end of the one-device process."""

PROCESSES: set[subprocess.Popen[str]] = set()
"""The measuring processes that are running."""

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Job:
    """The work of one process: some `parts` for a `mesh`, or one of the planner's steps, or "plan".

    `model` is a config.json or "embedded". The job without a mesh is the one-device reference, which leaves its results
    in `folder` for the others. `topology` names the hardware for the planner and the link rates. With `trial` the
    planner compiles for the local devices, which are not GPUs. `ceilings` are the fields of
    `gptoss_jax.benching.ceilings.Ceilings`, and `compiler_options` are XLA options in addition to the engine's.
    """

    parts: tuple[str, ...]
    model: str
    mesh: str | None
    strategy: str
    batch: tuple[int, ...]
    prompt_tokens: int
    output_tokens: int
    repeats: int
    context: int
    topology: str
    trial: bool
    folder: str
    ceilings: tuple[float, float]
    compiler_options: dict[str, str | bool]

    @classmethod
    def read(cls, text: str) -> Job:
        """A job from the JSON of its fields."""
        fields = json.loads(text)
        return cls(**fields | {name: tuple(fields[name]) for name in ("parts", "batch", "ceilings")})

    @property
    def name(self) -> Row:
        """The fields that identify the job's rows."""
        return {"model": self.model, "mesh": self.mesh or ONE, "strategy": self.strategy}

    @property
    def planned_batch(self) -> int:
        """Sequences in the KV cache of the planner's steps, divisible by the data-parallel ranks of up to 8 devices."""
        return -(-min(64, max(self.batch)) // 8) * 8


def flags() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="configs/gpt_oss_20b.json", help='a config.json, or "embedded"')
    parser.add_argument(
        "--meshes",
        nargs="+",
        metavar="MESH",
        help="such as expert=8 expert=4,tensor=2 (default: depends on the devices)",
    )
    parser.add_argument("--batch", type=_sizes, default=(1, 8, 64, 256), metavar="N,...")
    parser.add_argument("--prompt-tokens", type=int, default=512, metavar="N")
    parser.add_argument("--output-tokens", type=int, default=64, metavar="N")
    parser.add_argument("--repeats", type=int, default=1, metavar="N", help="measured runs per batch (default: 1)")
    parser.add_argument("--context", type=int, default=8192, metavar="N", help="context of the planner's steps")
    parser.add_argument("--parts", type=_parts, default=PARTS, metavar=",".join(PARTS))
    parser.add_argument(
        "--concurrency", type=int, default=1, metavar="N", help="concurrent processes (default: 1)"
    )
    parser.add_argument(
        "--compiler-options",
        type=json.loads,
        default={},
        metavar="JSON",
        help="XLA options, such as '{\"xla_...\": true}'",
    )
    parser.add_argument("--topology", metavar="NAME", help="device family, such as h100 (default: detected)")
    parser.add_argument(
        "--limit",
        type=float,
        default=600,
        metavar="SECONDS",
        help="time limit of a process, including waits for the others (default: 600)",
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="append the rows to this file, one JSON object per line"
    )
    parser.add_argument("--show", type=Path, nargs="+", metavar="FILE", help="only print tables, of saved rows")
    return parser


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(sorted(integers(text)))


def _parts(text: str) -> tuple[str, ...]:
    parts = tuple(text.split(","))
    if unknown := set(parts) - set(PARTS):
        raise argparse.ArgumentTypeError(f"expected some of {','.join(PARTS)}, found {unknown.pop()!r}")
    return parts


def main() -> None:
    options = flags().parse_args()
    if options.show:
        print(tables([row for path in options.show for row in saved(path)]))
        return
    check(options)
    os.environ.update(NO_MULTICAST)
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", MEMORY_SHARE)
    if options.concurrency > 1:
        os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    # Handled like Ctrl-C, so that the tables are still printed.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    rows: list[Row] = []
    try:
        for row in measured(options):
            rows.append(row)
            report(row)
            if options.json:
                with options.json.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
    except KeyboardInterrupt:
        progress("interrupted: printing tables of the rows so far")
    print(tables(rows))


def saved(path: Path) -> list[Row]:
    """The rows of a file. Raises UsageError."""
    lines = enumerate(read_text(path, "--show").splitlines(), 1)
    return [parse_json(line, f"--show: {path}: line {number}", dict) for number, line in lines]


def check(options: argparse.Namespace) -> None:
    """Check the options before anything runs. Raises GptOssError or ShardingError."""
    minimum = {"prompt_tokens": 1, "output_tokens": 8, "repeats": 1, "context": 1, "concurrency": 1}
    for name, value in minimum.items():
        found = getattr(options, name)
        expect(found >= value, flag_name(name), f"a number from {value}", found)
    expect(min(options.batch) >= 1, "--batch", "numbers from 1", min(options.batch))
    expect(options.limit > 0, "--limit", "seconds above 0", options.limit)
    expect(isinstance(options.compiler_options, dict), "--compiler-options", "an object", options.compiler_options)
    if options.json:
        check_writable(options.json, "--json")
    from gptoss_jax.model.config import ModelConfig
    from sharding import parse_mesh
    from sharding.compiled.topologies import families

    known = families()
    name = options.topology
    expect(name is None or name in known, "--topology", f"one of {', '.join(known)}", name)
    for mesh in options.meshes or ():
        parse_mesh(mesh)
    if options.model != "embedded":
        with named("--model"):
            ModelConfig.from_file(Path(options.model))


def measured(options: argparse.Namespace) -> Iterator[Row]:
    """Yields all rows as soon as they are known, that of the devices first."""
    (machine,) = run(["devices"], options.limit, None)
    yield machine
    if "error" in machine:
        return
    count = machine["devices"]
    topology = f"{options.topology or machine['family']}:1x1x{count}"
    with tempfile.TemporaryDirectory() as folder:
        common = {name: getattr(options, name) for name in ("batch", "prompt_tokens", "output_tokens", "repeats")}
        job = Job(
            parts=tuple(part for part in options.parts if part != "memory"),
            **common,
            model=options.model,
            mesh=None,
            strategy=REPLICATED,
            context=options.context,
            topology=topology,
            trial=machine["trial"],
            folder=folder,
            ceilings=(machine["copy_bytes"], machine["matmul_flops"]),
            compiler_options=options.compiler_options,
        )
        cases = cases_of(options.meshes or default_meshes(count))
        jobs = [dataclasses.replace(job, mesh=mesh, strategy=strategy) for mesh, strategy in cases]
        tasks = [partial(main_rows, one, options.limit) for one in jobs if one.parts]
        if "memory" in options.parts:
            tasks += [partial(memory, one, options.limit) for one in jobs]
        yield from run_tasks(tasks, options.concurrency)


def main_rows(job: Job, limit: float) -> Iterator[Row]:
    """The rows of a job's process; at the end of the one-device job, creates the file ENDED for the others."""
    progress(f"{job.mesh or ONE}, {job.strategy}")
    try:
        yield from run([json.dumps(dataclasses.asdict(job))], limit, job)
    finally:
        if job.mesh is None:
            (Path(job.folder) / ENDED).touch()


def run_tasks(tasks: Sequence[Callable[[], Iterator[Row]]], concurrency: int) -> Iterator[Row]:
    """Yields the rows of all tasks. Tasks run in waves of `concurrency`; a wave starts when the previous one has ended.

    Exceptions of a task are raised here. Remaining processes are killed when the generator is closed.
    """
    try:
        for first in range(0, len(tasks), concurrency):
            yield from _wave(tasks[first : first + concurrency])
    finally:
        for process in list(PROCESSES):
            process.kill()


def _wave(tasks: Sequence[Callable[[], Iterator[Row]]]) -> Iterator[Row]:
    rows: queue.SimpleQueue[Row | BaseException | None] = queue.SimpleQueue()

    def work(task: Callable[[], Iterator[Row]]) -> None:
        try:
            for row in task():
                rows.put(row)
            rows.put(None)
        except BaseException as error:
            rows.put(error)

    for task in tasks:
        threading.Thread(target=work, args=(task,), daemon=True).start()
    running = len(tasks)
    while running:
        row = rows.get()
        if isinstance(row, BaseException):
            raise row
        if row is None:
            running -= 1
        else:
            yield row


def default_meshes(count: int) -> list[str]:
    """Each axis on its own, and the most common combinations."""
    single = [f"{axis}={count}" for axis in ("expert", "tensor", "data")]
    half = count // 2
    mixed = [f"expert={half},tensor=2", f"data=2,expert={half}"] if count >= 4 else []
    return single + mixed + (["data=2,expert=2,tensor=2"] if count == 8 else [])


def cases_of(meshes: Sequence[str]) -> Iterator[tuple[str | None, str]]:
    """Pairs of mesh and strategy: one device, then each mesh with the strategies that differ on it."""
    yield None, REPLICATED
    for mesh in meshes:
        yield mesh, REPLICATED
        if any(part.startswith("expert=") and part != "expert=1" for part in mesh.split(",")):
            yield mesh, ALL_TO_ALL


def memory(job: Job, limit: float) -> Iterator[Row]:
    """Run each of the planner's steps in a process, and compare with the plan, which is made meanwhile on the CPU."""
    pool = ThreadPoolExecutor(1)
    try:
        planning = pool.submit(lambda: list(run([json.dumps(of(job, "plan"))], limit, None)))
        for step in STEPS:
            [used] = run([json.dumps(of(job, step))], limit, None)
            [plan] = planning.result()
            yield job.name | {"part": "memory", "step": step} | compared(plan, used, step)
    finally:
        # An interrupted run prints its tables without waiting for the plan.
        pool.shutdown(wait=False, cancel_futures=True)


def of(job: Job, part: str) -> Row:
    return dataclasses.asdict(dataclasses.replace(job, parts=(part,)))


def compared(plan: Row, used: Row, step: str) -> Row:
    """The planner's bytes, lower bound and expected seconds, with the devices' figures and the differences."""
    row: Row = {}
    if "meshes" in plan:
        of_step = plan["meshes"][0]["steps"][step]
        memory = of_step["memory"] or {}
        row["planned_bytes"] = memory.get("total") or plan["meshes"][0]["bytes"]
        row["least_seconds"], row["planned_seconds"] = of_step["least_seconds"], of_step["expected_seconds"]
        row["planned_by"], row["planned_link_seconds"] = of_step["bound_by"], of_step["bound_seconds"]["links"]
        row["fits"] = plan["meshes"][0]["fits"]
    for name in ("peak", "peak_before", "compiled", "seconds", "dispatch_seconds"):
        if name in used:
            row[name] = used[name]
    if row.get("planned_bytes") and row.get("peak"):
        row["bytes_differ"] = row["planned_bytes"] / row["peak"] - 1
    if row.get("planned_seconds") and row.get("seconds"):
        row["seconds_differ"] = row["planned_seconds"] / row["seconds"] - 1
    errors = [f"{name}: {of['error']}" for name, of in (("plan", plan), ("step", used)) if "error" in of]
    return row | ({"error": "; ".join(errors)} if errors else {})


def run(arguments: list[str], limit: float, job: Job | None) -> Iterator[Row]:
    """Yields the rows of a measuring process; if it fails, one more row with the error.

    With a `job`, the process may have several rows, and the error row has the job's name. Without one, exactly one row
    is yielded.
    """
    command = [sys.executable, "-m", "benchmarks.on_a_mesh", *arguments]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    PROCESSES.add(process)
    timer = threading.Timer(limit, process.kill)
    timer.start()
    count = 0
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("{"):
                count += 1
                yield json.loads(line)
        code = process.wait()
    finally:
        timed_out = not timer.is_alive()
        timer.cancel()
        process.kill()
        PROCESSES.discard(process)
    if code and not (job is None and count):
        reason = f"took longer than {limit:.0f} s" if timed_out else f"ended with code {code}"
        yield (job.name if job else {}) | {
            "part": "process",
            "error": f"{reason}; its missing rows were not measured",
        }


def report(row: Row) -> None:
    """Print a row to standard error, with short numbers."""
    shown = {name: f"{value:.4g}" if isinstance(value, float) else value for name, value in row.items()}
    progress("  " + " ".join(f"{name}={value}" for name, value in shown.items() if value is not None))


def progress(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    run_command(main)
