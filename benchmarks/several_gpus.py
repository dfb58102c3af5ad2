"""What sharding claims, measured on a host with several GPUs: python -m benchmarks.several_gpus --json rows.jsonl

For the model on each mesh, and where experts are split by both strategies of `sharding/experts.py`:

- logits: how far one device's are from a float32 reference on the same weights, and the mesh's from one device's
- tokens: whether the shipped small model answers as on one device
- speed: decode and prefill against one device in this run, and the collectives of a step: the least time that the
  links need for their bytes, and the time that as many of the same size take alone on the same mesh
- memory: the planner's bytes and expected times beside those of the devices

Each mesh is measured in processes of its own, so that one that fails leaves a row with the reason, and the rest goes
on. Most of their time goes into compiling: `--together 5` has five at once, which share the devices' memory as they
need it, and take turns at what is timed. Where it runs out, collectives may wait for good: more than five are too many
for 80 GB. Rows are told on standard error, and saved in `--json`, as soon as they are known; the tables come at the
end, also of a run that is interrupted. `--show` makes them from saved rows. Without several GPUs, to try it:

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
from gptoss_jax.commands.flags import sizes
from gptoss_jax.commands.running import run_command
from gptoss_jax.errors import expect, named

ROOT = Path(__file__).parent.parent
PARTS = ("logits", "tokens", "speed", "memory")
STEPS = ("decode", "prefill")
ONE, REPLICATED, ALL_TO_ALL = "one device", "replicated", "all-to-all"

NO_MULTICAST = {"NCCL_NVLS_ENABLE": "0", "NVSHMEM_DISABLE_NVLS": "1"}
"""Set before a process imports jax. NVLink multicast needs groups that the switches' fabric manager hands out: guests
of a shared host may not have them, and a program that fails so can take the host's GPUs from others, too."""

MEMORY_SHARE = ".95"
"""XLA_PYTHON_CLIENT_MEM_FRACTION unless it is set: what sharding/compiled/devices.json calls usable."""

ENDED = "ended"
"""The file in a job's folder that is there once nothing more of one device is to come."""

PROCESSES: set[subprocess.Popen[str]] = set()
"""Those that measure now."""

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Job:
    """What one process measures: some `parts` of a `mesh`, or of its steps one (`decode`, `prefill`) or their plan.

    `model` is a config.json or "embedded". The one device is the job without a mesh; it leaves what others are compared
    with in `folder`. `topology` names the machine whose facts are the planner's and the links'. With `trial` the
    devices here, which are no GPUs, are what the planner compiles for. `ceilings` are the fields of
    `gptoss_jax.benching.ceilings.Ceilings`, and `compiler_options` what XLA is told beyond what the engine tells it.
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
        """From the JSON of its fields."""
        fields = json.loads(text)
        return cls(**fields | {name: tuple(fields[name]) for name in ("parts", "batch", "ceilings")})

    @property
    def name(self) -> Row:
        """What its rows begin with."""
        return {"model": self.model, "mesh": self.mesh or ONE, "strategy": self.strategy}

    @property
    def planned_batch(self) -> int:
        """Sequences in the cache of the planner's steps, as many in each part of any mesh of up to 8 devices."""
        return -(-min(64, max(self.batch)) // 8) * 8


def flags() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="configs/gpt_oss_20b.json", help='a config.json, or "embedded"')
    parser.add_argument(
        "--meshes", nargs="+", metavar="MESH", help="such as expert=8 expert=4,tensor=2 (default: by the devices)"
    )
    parser.add_argument("--batch", type=_sizes, default=(1, 8, 64, 256), metavar="N,...")
    parser.add_argument("--prompt-tokens", type=int, default=512, metavar="N")
    parser.add_argument("--output-tokens", type=int, default=64, metavar="N")
    parser.add_argument(
        "--repeats", type=int, default=1, metavar="N", help="measured runs of a speed (default: 1)"
    )
    parser.add_argument("--context", type=int, default=8192, metavar="N", help="of the planner's steps")
    parser.add_argument("--parts", type=_parts, default=PARTS, metavar=",".join(PARTS))
    parser.add_argument("--together", type=int, default=1, metavar="N", help="processes at once (default: 1)")
    parser.add_argument(
        "--compiler-options",
        type=json.loads,
        default={},
        metavar="JSON",
        help="of XLA, such as '{\"xla_...\": true}'",
    )
    parser.add_argument("--topology", metavar="NAME", help="facts of the devices, such as h100 (default: theirs)")
    parser.add_argument(
        "--limit",
        type=float,
        default=600,
        metavar="SECONDS",
        help="of a process, waiting for turns included (default: 600)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="append the rows to this file, one JSON a line")
    parser.add_argument("--show", type=Path, nargs="+", metavar="FILE", help="only make tables, of saved rows")
    return parser


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(sorted(sizes(text)))


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
    if options.together > 1:
        os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    # As Ctrl-C does, so that the tables are still made.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    rows: list[Row] = []
    try:
        for row in measured(options):
            rows.append(row)
            tell(row)
            if options.json:
                with options.json.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
    except KeyboardInterrupt:
        progress("interrupted: tables of what is known")
    print(tables(rows))


def saved(path: Path) -> list[Row]:
    """The rows of a file. Raises UsageError."""
    lines = enumerate(read_text(path, "--show").splitlines(), 1)
    return [parse_json(line, f"--show: {path}: line {number}", dict) for number, line in lines]


def check(options: argparse.Namespace) -> None:
    """Before anything runs. Raises GptOssError or ShardingError."""
    least = {"prompt_tokens": 1, "output_tokens": 8, "repeats": 1, "context": 1, "together": 1}
    for name, value in least.items():
        found = getattr(options, name)
        expect(found >= value, f"--{name.replace('_', '-')}", f"a number from {value}", found)
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
    """All rows, the devices' first, each as soon as it is known."""
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
        yield from together(tasks, options.together)


def main_rows(job: Job, limit: float) -> Iterator[Row]:
    """The rows of a mesh's process; of one device's, the others are told when there are no more."""
    progress(f"{job.mesh or ONE}, {job.strategy}")
    try:
        yield from run([json.dumps(dataclasses.asdict(job))], limit, job)
    finally:
        if job.mesh is None:
            (Path(job.folder) / ENDED).touch()


def together(tasks: Sequence[Callable[[], Iterator[Row]]], most: int) -> Iterator[Row]:
    """The rows of all tasks as they come, of `most` at once: the next ones start when all of these have ended.

    Their processes end with this. What a task raises is raised here.
    """
    try:
        for first in range(0, len(tasks), most):
            yield from _wave(tasks[first : first + most])
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
    """Each axis alone, and what is most likely to be used of mixed ones."""
    alone = [f"{axis}={count}" for axis in ("expert", "tensor", "data")]
    half = count // 2
    mixed = [f"expert={half},tensor=2", f"data=2,expert={half}"] if count >= 4 else []
    return alone + mixed + (["data=2,expert=2,tensor=2"] if count == 8 else [])


def cases_of(meshes: Sequence[str]) -> Iterator[tuple[str | None, str]]:
    """One device, then each mesh under the strategies that differ on it."""
    yield None, REPLICATED
    for mesh in meshes:
        yield mesh, REPLICATED
        if any(part.startswith("expert=") and part != "expert=1" for part in mesh.split(",")):
            yield mesh, ALL_TO_ALL


def memory(job: Job, limit: float) -> Iterator[Row]:
    """The planner's steps, run in a process each, beside the plan, which is made meanwhile: it needs no GPU."""
    pool = ThreadPoolExecutor(1)
    try:
        planning = pool.submit(lambda: list(run([json.dumps(of(job, "plan"))], limit, None)))
        for step in STEPS:
            [used] = run([json.dumps(of(job, step))], limit, None)
            [plan] = planning.result()
            yield job.name | {"part": "memory", "step": step} | compared(plan, used, step)
    finally:
        # Whoever interrupts this does not wait for a plan before the tables.
        pool.shutdown(wait=False, cancel_futures=True)


def of(job: Job, part: str) -> Row:
    return dataclasses.asdict(dataclasses.replace(job, parts=(part,)))


def compared(plan: Row, used: Row, step: str) -> Row:
    """The planner's figures (bytes, and seconds at least and expected) beside the devices', and their differences."""
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
    """The rows of a measuring process as they come; if it fails, one more with the reason.

    Of a `job` of several rows each begins with its name; without one, exactly one row comes.
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
        overdue = not timer.is_alive()
        timer.cancel()
        process.kill()
        PROCESSES.discard(process)
    if code and not (job is None and count):
        reason = f"took longer than {limit:.0f} s" if overdue else f"ended with code {code}"
        yield (job.name if job else {}) | {
            "part": "process",
            "error": f"{reason}; what is missing was not measured",
        }


def tell(row: Row) -> None:
    """A row on standard error, numbers short."""
    shown = {name: f"{value:.4g}" if isinstance(value, float) else value for name, value in row.items()}
    progress("  " + " ".join(f"{name}={value}" for name, value in shown.items() if value is not None))


def progress(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    run_command(main)
