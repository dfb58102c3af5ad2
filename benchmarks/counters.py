"""Read the GPU's hardware counters of each op's kernels through Nsight Compute's `ncu`.

python -m benchmarks.counters --ops attention rotary --batch 1 8 64 256 --json counters.jsonl

The program starts itself under ncu, which profiles one call of each case after warm-up calls, and prints a row for
each kernel that the call launches. ncu replays a kernel for each group of counters and empties the caches before
each replay, so a kernel reads even small inputs from memory; `--keep-caches` leaves them. Clocks stay as they are.
The floor of a case is the time that its fewest bytes take at the bandwidth of a copy, or its operations at the
tensor cores' peak.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import ctypes
import functools
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from benchmarks.counter_cases import OPS, Call, Shapes
from gptoss_jax.model.config import ModelConfig

COPY_BANDWIDTH = 4.0e12
"""Bytes a second of a copy within an H200's memory, as measured."""

PEAK_FLOPS = 989e12
"""Dense bfloat16 on an H100 or H200, from the maker's data sheets."""

WARM_UPS = 3
MARKER = "case_marker"
"""The kernel before a case's kernels; it has as many blocks as the case's number, counted from 1."""

ACTIVE, ELAPSED = "avg.pct_of_peak_sustained_active", "avg.pct_of_peak_sustained_elapsed"
METRICS = {
    "seconds": "gpu__time_duration.sum",
    "clock": "gpc__cycles_elapsed.avg.per_second",
    "read": "dram__bytes_read.sum",
    "written": "dram__bytes_write.sum",
    "dram": f"gpu__dram_throughput.{ELAPSED}",
    "l2": f"lts__throughput.{ELAPSED}",
    "l2_hit": "lts__t_sector_hit_rate.pct",
    "issue": f"smsp__issue_active.{ACTIVE}",
    "alu": f"sm__pipe_alu_cycles_active.{ACTIVE}",
    "fma": f"sm__pipe_fma_cycles_active.{ACTIVE}",
    "xu": f"sm__inst_executed_pipe_xu.{ACTIVE}",
    "tensor": f"sm__pipe_tensor_cycles_active.{ACTIVE}",
    "occupancy": f"sm__warps_active.{ACTIVE}",
    "occupancy_limit": "sm__maximum_warps_per_active_cycle_pct",
    "waves": "launch__waves_per_multiprocessor",
    "registers": "launch__registers_per_thread",
    "shared_static": "launch__shared_mem_per_block_static",
    "shared_dynamic": "launch__shared_mem_per_block_dynamic",
}
"""Nsight Compute's names for compute capability 9.0. Times are in seconds, sizes in bytes, the rest in percent."""

STALLS = (
    *("barrier", "branch_resolving", "dispatch_stall", "drain", "gmma", "imc_miss", "lg_throttle"),
    *("long_scoreboard", "math_pipe_throttle", "membar", "mio_throttle", "misc", "no_instruction"),
    *("not_selected", "short_scoreboard", "sleeping", "tex_throttle", "wait"),
)
STALL_METRICS = {name: f"smsp__average_warps_issue_stalled_{name}_per_issue_active.ratio" for name in STALLS}
"""Cycles that a warp spends in each state for each instruction that it issues."""

UNITS = {
    **{"ns": 1e-9, "nsecond": 1e-9, "us": 1e-6, "usecond": 1e-6, "ms": 1e-3, "msecond": 1e-3},
    **{"Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9, "Khz": 1e3, "Mhz": 1e6, "Ghz": 1e9},
}
"""Factors to seconds, bytes and hertz of the units that need one."""

Row = dict[str, Any]


def read_csv(lines: Iterable[str]) -> list[Row]:
    """The kernels in ncu's raw page, in order of launch: name, grid, block, METRICS and the states of STALLS.

    A metric that is missing or not a number is None. Lines that are not of the table, such as ncu's messages, are
    skipped.
    """
    header: list[str] = []
    units: dict[str, str] = {}
    rows = []
    for cells in csv.reader(line for line in lines if line.startswith('"')):
        row = dict(zip(header, cells, strict=False))
        if cells[0] == "ID":
            header = cells
        elif not cells[0]:
            units = row
        elif header:
            rows.append(_kernel(row, units))
    return rows


def _kernel(row: dict[str, str], units: dict[str, str]) -> Row:
    def value(metric: str) -> float | None:
        try:
            number = float(row.get(metric, "").replace(",", ""))
        except ValueError:
            return None
        return number * UNITS.get(units.get(metric, "").partition("/")[0], 1)

    found: Row = {"kernel": row["Kernel Name"], "grid": _extents(row, "Grid Size")}
    found |= {"block": _extents(row, "Block Size")}
    found |= {name: value(metric) for name, metric in METRICS.items()}
    found["shared"] = total(found.pop("shared_static"), found.pop("shared_dynamic"))
    found["stalls"] = {name: value(metric) for name, metric in STALL_METRICS.items()}
    return found


def _extents(row: dict[str, str], column: str) -> list[int]:
    """A size such as "(8, 1, 33)"."""
    return [int(extent) for extent in row[column].strip("()").split(",")]


def with_cases(kernels: list[Row], cases: list[Row]) -> Iterator[Row]:
    """The kernels after each marker, with the name and the floor of its case and the time of all its kernels."""
    groups: dict[int, list[Row]] = {}
    current: list[Row] = []
    for kernel in kernels:
        if MARKER in kernel["kernel"]:
            groups[kernel["grid"][0] - 1] = current = []
        else:
            current.append(kernel)
    for index, group in groups.items():
        took = sum(kernel["seconds"] or 0 for kernel in group)
        for kernel in group:
            yield cases[index] | {"case_seconds": took} | kernel


def profile(flags: argparse.Namespace, folder: Path) -> tuple[list[Row], int]:
    """Run the cases in a child under ncu, with its files in `folder`: rows, and the exit code; raises OSError."""
    log, cases = folder / "counters.csv", folder / "cases.jsonl"
    for file in (log, cases):
        file.unlink(missing_ok=True)
    command = [*ncu_command(flags, log), *(sys.executable, "-m", "benchmarks.counters", *sys.argv[1:])]
    # ncu saves all allocated memory before a kernel, so nothing is allocated ahead; it replays kernels, not graphs.
    xla = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_enable_command_buffer="
    environment = os.environ | {"XLA_FLAGS": xla, "XLA_PYTHON_CLIENT_ALLOCATOR": "platform"}
    ended = subprocess.run([*command, "--child", str(cases)], env=environment)
    lines, names = (file.read_text().splitlines() if file.exists() else [] for file in (log, cases))
    for message in lines:
        if message.startswith(("==ERROR==", "==WARNING==")):
            print(message, file=sys.stderr)
    return list(with_cases(read_csv(lines), [json.loads(name) for name in names])), ended.returncode


def ncu_command(flags: argparse.Namespace, log: Path) -> list[str]:
    """The start of ncu's command line, up to the program."""
    ncu = flags.ncu or find_ncu()
    options = {
        "--profile-from-start": "off",
        "--clock-control": "none",
        "--cache-control": "none" if flags.keep_caches else "all",
        "--target-processes": "application-only",
        "--page": "raw",
        "--print-units": "base",
        "--log-file": str(log),
        "--metrics": ",".join(known_metrics(ncu)),
    }
    return [ncu, "--csv", *(part for option in options.items() for part in option)]


def find_ncu() -> str:
    """The ncu on PATH, or the newest one where Nsight Compute installs itself."""
    installed = sorted(Path("/opt/nvidia/nsight-compute").glob("*/ncu"))
    return shutil.which("ncu") or (str(installed[-1]) if installed else "ncu")


def known_metrics(ncu: str) -> list[str]:
    """METRICS and STALL_METRICS without those that this ncu does not list: it rejects a run that names one."""
    wanted = [*METRICS.values(), *STALL_METRICS.values()]
    done = subprocess.run([ncu, "--query-metrics"], capture_output=True, text=True)
    listed = {line.split()[0] for line in done.stdout.splitlines() if line.strip()}
    if "sm__warps_active" not in listed:
        return wanted
    # Metrics without a suffix are not counters: ncu derives them from the launch.
    kept = [metric for metric in wanted if "." not in metric or metric.partition(".")[0] in listed]
    if missing := [metric for metric in wanted if metric not in kept]:
        print(f"# not known to {ncu}: {', '.join(missing)}", file=sys.stderr)
    return kept


def run_cases(
    calls: Iterable[Call], cases: IO[str], collecting: Callable[[], AbstractContextManager[None]]
) -> None:
    """Run each call, `collecting` in the last of its runs only, and write a line of its name and floor to `cases`."""
    for index, call in enumerate(calls):
        floor = max(call.bytes / COPY_BANDWIDTH, call.flops / PEAK_FLOPS)
        print(json.dumps({"case": call.name, "floor_seconds": floor}), file=cases, flush=True)
        print(f"# {call.name}", file=sys.stderr, flush=True)
        donated = () if call.donated is None else (call.donated,)
        function, args = jax.jit(call.function, donate_argnums=donated), list(call.args)
        mark(index)
        for _ in range(WARM_UPS):
            run_once(function, args, donated)
        with collecting():
            mark(index)
            run_once(function, args, donated)


def run_once(function: Any, args: list[Any], donated: tuple[int, ...]) -> None:
    """Call and wait; a donated argument is replaced with what the call returns last."""
    out = jax.block_until_ready(function(*args))
    for index in donated:
        args[index] = out[-1]


def mark(index: int) -> None:
    """Launch the marker kernel of a case."""
    jax.block_until_ready(_marker(jnp.arange(16), index + 1))


@functools.partial(jax.jit, static_argnums=1)
def _marker(x: jax.Array, blocks: int) -> jax.Array:
    def kernel(x_ref: Any, out_ref: Any) -> None:
        out_ref[pl.program_id(0), :] = x_ref[:]

    return pl.pallas_call(
        kernel,
        grid=(blocks,),
        out_shape=jax.ShapeDtypeStruct((blocks, *x.shape), x.dtype),
        compiler_params=plt.CompilerParams(num_warps=1, num_stages=1),
        name=MARKER,
    )(x)


@contextlib.contextmanager
def collecting_counters() -> Iterator[None]:
    """Have ncu profile the kernels that the block launches. Raises OSError if the CUDA driver refuses."""
    jax.devices()
    driver, device, context = ctypes.CDLL("libcuda.so.1"), ctypes.c_int(), ctypes.c_void_p()

    def checked(name: str, *args: Any) -> None:
        code = getattr(driver, name)(*args)
        if code:
            raise OSError(f"libcuda.so.1: {name}: code {code}")

    # The switch works on this thread's context: JAX uses the device's primary one.
    checked("cuInit", 0)
    checked("cuDeviceGet", ctypes.byref(device), 0)
    checked("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
    checked("cuCtxSetCurrent", context)
    checked("cuProfilerStart")
    yield
    checked("cuProfilerStop")


COLUMNS = {
    **{"kernel": 28, "grid": 12, "block": 5, "us": 9, "MHz": 5, "DRAM MB": 8, "DRAM%": 5, "L2%": 4, "hit%": 4},
    **{"issue%": 6, "ALU%": 4, "FMA%": 4, "XU%": 4, "tensor%": 7, "occ%": 4, "limit%": 6, "waves": 6, "regs": 4},
    **{"shared": 6, "stalls: cycles an instruction": 0},
}
"""The titles of the table, and how wide they are."""


def line(cells: Iterable[str]) -> str:
    """A line of the table; the first column, of names, is flush left."""
    first, *others = zip(cells, COLUMNS.values(), strict=True)
    return " ".join([f"{first[0]:<{first[1]}}", *(f"{cell:>{width}}" for cell, width in others)]).rstrip()


def text_row(row: Row) -> str:
    """A kernel's line, with a blank for what was not counted."""

    def number(value: float | None, scale: float = 1, digits: int = 0) -> str:
        return "" if value is None else f"{value * scale:.{digits}f}"

    percents = ("dram", "l2", "l2_hit", "issue", "alu", "fma", "xu", "tensor", "occupancy", "occupancy_limit")
    stalls = sorted(((value, name) for name, value in row["stalls"].items() if value), reverse=True)
    return line(
        (
            row["kernel"][:28],
            "x".join(map(str, row["grid"])),
            str(math.prod(row["block"])),
            number(row["seconds"], 1e6, 2),
            number(row["clock"], 1e-6),
            number(total(row["read"], row["written"]), 1e-6, 2),
            *(number(row[name]) for name in percents),
            number(row["waves"], digits=1),
            number(row["registers"]),
            number(row["shared"]),
            ", ".join(f"{name} {value:.1f}" for value, name in stalls[:3]),
        )
    )


def total(*values: float | None) -> float | None:
    """The sum, or None where a value is missing."""
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None


def print_table(rows: Iterable[Row]) -> None:
    """A line for each case, with its floor, and below it one for each of its kernels."""
    print(line(COLUMNS))
    case = None
    for row in rows:
        if row["case"] != case:
            case, took, floor = row["case"], row["case_seconds"], row["floor_seconds"]
            share = f", {floor / took:.0%} of it" if took else ""
            print(f"{case}: {took * 1e6:.2f} us, floor {floor * 1e6:.2f} us{share}")
        print(text_row(row))


def count(text: str) -> int:
    """The type of flags that take a number from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number from 1, found {text!r:.60}")
    return int(text)


def parse_flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", nargs="+", choices=OPS, default=["attention", "rotary"])
    parser.add_argument("--batch", nargs="+", type=count, default=[1, 8, 64, 256], help="sequences decoded")
    parser.add_argument("--contexts", nargs="+", type=count, default=[1024, 8192, 100000], help="keys of each")
    parser.add_argument("--earlier", nargs="*", type=int, default=[0, 8192], help="keys before a prefill chunk")
    parser.add_argument("--chunk", type=count, default=2048, help="tokens of a prefill chunk")
    parser.add_argument("--json", metavar="FILE", help="also write each row, with all counters, as a line of JSON")
    parser.add_argument("--raw", metavar="FOLDER", help="keep ncu's CSV and the list of cases here")
    parser.add_argument("--keep-caches", action="store_true", help="do not empty the caches before each replay")
    parser.add_argument("--ncu", metavar="FILE", help="the ncu to run")
    parser.add_argument("--child", metavar="FILE", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    """Profile the cases that the flags choose; 1 if some of them could not be."""
    flags = parse_flags()
    if flags.child:
        shapes = Shapes(flags.batch, flags.contexts, flags.chunk, tuple(flags.earlier))
        calls = (call for op in flags.ops for call in OPS[op](ModelConfig(), shapes))
        with open(flags.child, "w") as cases:
            run_cases(calls, cases, collecting_counters)
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(flags.raw or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            rows, code = profile(flags, folder)
        except OSError as error:
            print(f"error: ncu: {error}", file=sys.stderr)
            return 1
    if flags.json:
        Path(flags.json).write_text("".join(json.dumps(row) + "\n" for row in rows))
    print_table(rows)
    if code or not rows:
        print(f"error: ncu ended with code {code}, having profiled {len(rows)} kernels", file=sys.stderr)
    return 1 if code or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
