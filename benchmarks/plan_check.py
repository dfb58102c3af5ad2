"""The planner's memory and time against what a GPU really takes: python -m benchmarks.plan_check --topology h100:1x1x1

Each step runs in a process of its own, because a device remembers its peak for as long as the process lives. `--plan`
takes what `python -m gptoss_jax.plan --mesh MESH --json` wrote on another machine; without it the plan is made here.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from gptoss_jax.commands.running import run_command

GIB = 2**30

ALONE, TIMED = 2, 8
"""Launches before the peak is read, each waited for, and those that are timed."""


def flags() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("configs/gpt_oss_20b.json"))
    parser.add_argument("--topology", default="h100:1x1x1")
    parser.add_argument("--mesh", default="data=1", help="over the topology's devices, which must be here")
    parser.add_argument("--batch-over-experts", action="store_true", help="as the planner's flag")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--chunk", type=int, default=512)
    parser.add_argument("--plan", type=Path, help="the JSON of a plan")
    parser.add_argument("--step", choices=("decode", "prefill"), help="run this step alone and print its JSON")
    return parser


def main() -> None:
    options = flags().parse_args()
    if options.step:
        print(json.dumps(run(options)))
        return
    plan = planned(options)
    print(f"{'':8} {'GiB':32} {'':10}  ms of a step")
    print(
        f"{'step':8} {'planned':>10} {'compiled':>10} {'peak used':>10} {'difference':>10} "
        f"{'least':>9} {'expected':>9} {'took':>9} {'difference':>10}"
    )
    for name in ("decode", "prefill"):
        used = json.loads(output([sys.executable, "-m", "benchmarks.plan_check", *sys.argv[1:], "--step", name]))
        step = plan["meshes"][0]["steps"][name]
        total, peak = step["memory"]["total"], used["peak"]
        gib = [f"{n / GIB:10.3f}" if n else " " * 10 for n in (total, used["compiled"], peak)]
        seconds = step["least_seconds"], step["expected_seconds"], used["seconds"]
        ms = [f"{1e3 * t:9.2f}" if t else " " * 9 for t in seconds]
        print(f"{name:8} {' '.join(gib)} {difference(total, peak)} {' '.join(ms)} {difference(*seconds[1:])}")
        if waits_for_host(used):
            print(
                f"{name}: the host needs {1e3 * used['dispatch_seconds']:.2f} ms to start a step; the device may wait"
            )
        if peak and used["peak_before"] == peak:
            print(f"{name}: the peak was reached while the weights were made; take a larger --batch or --context")


def waits_for_host(used: dict[str, Any]) -> bool:
    """Whether starting a step takes the host about as long as the step took, which then does not tell the device's."""
    return used["dispatch_seconds"] > 0.9 * used["seconds"]


def difference(planned: float | None, measured: float | None) -> str:
    """How far off a plan is."""
    return f"{f'{100 * (planned / measured - 1):+.2f} %' if planned and measured else 'unknown':>10}"


def planned(options: argparse.Namespace) -> dict[str, Any]:
    if options.plan:
        return json.loads(options.plan.read_text(encoding="utf-8"))
    command = [sys.executable, "-m", "gptoss_jax.plan", "--json"]
    for name in ("model", "topology", "mesh", "batch", "context", "chunk"):
        command += [f"--{name}", str(getattr(options, name))]
    if options.batch_over_experts:
        command.append("--batch-over-experts")
    return json.loads(output(command))


def output(command: list[str]) -> str:
    """What a command prints; if it fails, this one ends with its exit code."""
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if ended.returncode:
        # It has said why.
        sys.exit(ended.returncode)
    return ended.stdout


def run(
    options: argparse.Namespace,
    shared: Callable[[], AbstractContextManager[None]] = nullcontext,
    alone: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> dict[str, Any]:
    """Load a random model, run the step a few times, and read what the devices say they used: of the fullest, bytes.

    `seconds` and `dispatch_seconds` are those of `in_flight`. Among processes that take turns at the devices, all but
    the timing is within `shared`, and that is within `alone`.
    """
    with shared():
        compiled, arguments, found = prepare(options)
    with alone():
        seconds, dispatch_seconds = in_flight(compiled, *arguments)
    return found | {"seconds": seconds, "dispatch_seconds": dispatch_seconds}


def prepare(options: argparse.Namespace) -> tuple[Any, tuple[Any, Any, Any], dict[str, Any]]:
    """The compiled step, its arguments after it has run, and the bytes that were in use before, at most and by plan."""
    import jax
    import numpy as np

    from gptoss_jax.checkpoints.loading import random_model
    from gptoss_jax.engine.compiling import compiler_options, graphs_collectives
    from gptoss_jax.engine.step import DeviceState, Structure
    from gptoss_jax.model.config import ModelConfig
    from gptoss_jax.model.kv_cache import KVCache
    from gptoss_jax.planner.steps import cache_shape, decode_step, prefill_step
    from sharding import BATCH_OVER_EXPERTS
    from sharding.compiled.program import ProgramMemory

    config = ModelConfig.from_file(options.model)
    model = random_model(config, options.mesh, rules=BATCH_OVER_EXPERTS if options.batch_over_experts else None)
    partition = model.partition
    if options.step == "decode":
        step = decode_step(config, partition, options.batch, options.context)
    else:
        step = prefill_step(config, partition, options.batch, options.context, options.chunk)
    graphed = options.step == "decode" and graphs_collectives(partition.mesh)
    compiled = step.lower().compile(compiler_options(partition.mesh, collectives=graphed))
    _, weights = Structure.of(model)
    shape = cache_shape(partition, options.batch, options.context)
    cache = KVCache.empty(config, shape, model.embed_tokens[...].dtype, partition)
    # Tokens that are all alike would choose the same experts, and few would be read.
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, config.vocab_size, step.state.last.shape, np.int32)
    state = DeviceState(cache, jax.device_put(drawn, step.state.last.sharding))
    inputs = late_inputs(step.inputs, shape.slots, options.context)
    prompts = rng.integers(0, config.vocab_size, inputs.prefill_tokens.shape, np.int32)
    inputs = dataclasses.replace(inputs, prefill_tokens=prompts)
    jax.block_until_ready((weights, state))
    before = stats()
    for _ in range(ALONE):
        result, state = compiled(weights, state, inputs)
        jax.block_until_ready((result, state))
    found = {"peak": stats(), "peak_before": before, "compiled": ProgramMemory.of(compiled).total}
    return compiled, (weights, state, inputs), found


def in_flight(compiled: Any, weights: Any, state: Any, inputs: Any) -> tuple[float, float]:
    """Seconds of a launch, from one's end to another's, and of the host's call that starts one.

    While the device is busy with a launch the next one is started, so that it need not wait for the host, which hands
    over some 400 arrays each time.
    """
    import jax

    before, calls, ends = None, [], []
    for _ in range(TIMED + 2):
        started = time.perf_counter()
        result, state = compiled(weights, state, inputs)
        calls.append(time.perf_counter() - started)
        if before is not None:
            jax.block_until_ready(before)
            ends.append(time.perf_counter())
        before = result
    jax.block_until_ready(state)
    return (ends[-1] - ends[0]) / TIMED, statistics.median(calls)


def late_inputs(inputs: Any, slots: int, context: int) -> Any:
    """Inputs of a step at the end of the context: every sequence has pages of its own, and the last positions."""
    import jax
    import numpy as np

    def segments(of: Any) -> Any:
        rows, pages = of.tables.shape[1:]
        own_pages = np.arange(rows * pages, dtype=np.int32).reshape(rows, pages)
        return dataclasses.replace(
            of,
            slots=np.broadcast_to(np.arange(rows, dtype=np.int32) % slots, of.slots.shape),
            tables=np.broadcast_to(own_pages, of.tables.shape),
            snapshots=np.full(of.snapshots.shape, slots, np.int32),
        )

    filled = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), inputs)
    idle = filled.prefill_tokens.size > 0
    ends = np.full_like(filled.decode_positions, -1 if idle else context - 1)
    chunk = context - filled.prefill_tokens.shape[-1] + np.arange(filled.prefill_tokens.shape[-1], dtype=np.int32)
    return dataclasses.replace(
        filled,
        decode=segments(filled.decode),
        prefill=segments(filled.prefill),
        decode_positions=ends,
        prefill_positions=np.broadcast_to(chunk, filled.prefill_tokens.shape),
    )


def stats() -> int | None:
    """The most bytes that any device has had in use; None where they do not count."""
    import jax

    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.devices()]
    return max((peak for peak in peaks if peak is not None), default=None)


if __name__ == "__main__":
    run_command(main)
