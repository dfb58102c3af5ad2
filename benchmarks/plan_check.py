"""Compare the planner's memory and time with those of a GPU: python -m benchmarks.plan_check --topology h100:1x1x1

Each step runs in a process of its own, because a device's peak memory is never reset within a process. `--plan` reads
the output of `python -m gptoss_jax.plan --mesh MESH --json` from another machine; without it the plan is made here.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptoss_jax.commands.running import run_command

if TYPE_CHECKING:
    import numpy as np

    from gptoss_jax.engine.step import ForwardInputs, RowInputs
    from gptoss_jax.model.gpt_oss import GptOss
    from gptoss_jax.model.kv_cache import CacheShape
    from gptoss_jax.planner.steps import Step

GIB = 2**30

WARM_UP, TIMED = 2, 8
"""Blocking launches before the peak is read, and launches that are timed."""


def flags() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("configs/gpt_oss_20b.json"))
    parser.add_argument("--topology", default="h100:1x1x1")
    parser.add_argument("--mesh", default="data=1", help="mesh of the topology's devices, which must be present")
    parser.add_argument("--batch-over-experts", action="store_true", help="as in gptoss_jax.plan")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--chunk", type=int, default=512)
    parser.add_argument("--plan", type=Path, help="JSON file of a plan")
    parser.add_argument("--step", choices=("decode", "prefill"), help="run this step alone and print its JSON")
    return parser


def main() -> None:
    options = flags().parse_args()
    if options.step:
        print(json.dumps(run(options)))
        return
    plan = planned(options)
    print(f"{'':8} {'GiB':32} {'':10}  ms per step")
    print(
        f"{'step':8} {'planned':>10} {'compiled':>10} {'peak used':>10} {'difference':>10} "
        f"{'bound':>9} {'expected':>9} {'measured':>9} {'difference':>10}"
    )
    for name in ("decode", "prefill"):
        used = json.loads(output([sys.executable, "-m", "benchmarks.plan_check", *sys.argv[1:], "--step", name]))
        step = plan["meshes"][0]["steps"][name]
        total, peak = step["memory"]["total"], used["peak"]
        gib = [f"{n / GIB:10.3f}" if n else " " * 10 for n in (total, used["compiled"], peak)]
        seconds = step["least_seconds"], step["expected_seconds"], used["seconds"]
        ms = [f"{1e3 * t:9.2f}" if t else " " * 9 for t in seconds]
        print(f"{name:8} {' '.join(gib)} {difference(total, peak)} {' '.join(ms)} {difference(*seconds[1:])}")
        if host_bound(used):
            milliseconds = 1e3 * used["dispatch_seconds"]
            print(
                f"{name}: the host needs {milliseconds:.2f} ms to launch a step; the device may be idle meanwhile"
            )
        if peak and used["peak_before"] == peak:
            print(f"{name}: the peak occurred while the weights were made; use a larger --batch or --context")


def host_bound(used: dict[str, Any]) -> bool:
    """Whether launching a step takes about as long as the step, so that the time is not the device's."""
    return used["dispatch_seconds"] > 0.9 * used["seconds"]


def difference(planned: float | None, measured: float | None) -> str:
    """The relative error of a plan, as text."""
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
    """The standard output of a command; if it fails, exits with its exit code."""
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if ended.returncode:
        # The command has reported the error.
        sys.exit(ended.returncode)
    return ended.stdout


def run(
    options: argparse.Namespace,
    shared: Callable[[], AbstractContextManager[None]] = nullcontext,
    exclusive: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> dict[str, Any]:
    """Load a random model, run the step a few times, and read the peak bytes of the device that used most.

    `seconds` and `dispatch_seconds` are those of `in_flight`. The step is prepared within the context `shared` and
    timed within `exclusive`, for processes that share the devices.
    """
    with shared():
        launch, found = prepare(options)
    with exclusive():
        seconds, dispatch_seconds = in_flight(launch)
    return found | {"seconds": seconds, "dispatch_seconds": dispatch_seconds}


def prepare(options: argparse.Namespace) -> tuple[Callable[[], Any], dict[str, Any]]:
    """Run the step; returns a function that launches it again, and bytes: peak, peak before, and compiled."""
    import jax

    from gptoss_jax.checkpoints.loading import random_model
    from gptoss_jax.engine.runner import program_options
    from gptoss_jax.model.config import ModelConfig
    from gptoss_jax.planner.plans import memory_of
    from gptoss_jax.planner.steps import decode_step, prefill_step
    from sharding import BATCH_OVER_EXPERTS

    config = ModelConfig.from_file(options.model)
    model = random_model(config, options.mesh, rules=BATCH_OVER_EXPERTS if options.batch_over_experts else None)
    mesh = model.partition.mesh
    make = decode_step if options.step == "decode" else prefill_step
    step = make(config, model.partition, options.batch, options.context, options.chunk)
    compiled = []
    for program in step.programs:
        compiled.append(program.lower().compile(program_options(mesh, program.shape)))
    launch = launcher(step, compiled, model, options.context)
    before = stats()
    for _ in range(WARM_UP):
        jax.block_until_ready(launch())
    return launch, {"peak": stats(), "peak_before": before, "compiled": memory_of(step, compiled).total}


def launcher(step: Step, compiled: Sequence[Any], model: GptOss, context: int) -> Callable[[], Any]:
    """A function that launches the step at the end of the context, and returns its outputs."""
    import jax
    import numpy as np

    from gptoss_jax.engine.step import DeviceState, Generated, Structure
    from gptoss_jax.model.kv_cache import KVCache
    from sharding import put, zeros

    partition, cache, config = model.partition, step.cache, model.config
    _, weights = Structure.of(model)
    head = (model.norm[...], model.lm_head[...])
    abstract, last = step.state
    full, sliding = tables(cache, partition.degree("batch"), config.sliding_window, step.tokens, context)
    state = DeviceState(
        KVCache.empty(config, cache, model.embed_tokens[...].dtype, partition),
        put(full, abstract.tables.sharding),
        put(sliding, abstract.sliding_tables.sharding),
    )
    generated = Generated(zeros(last.last.shape, np.int32, last.last.sharding))
    tokens, rows = inputs(step, config.vocab_size, context)
    jax.block_until_ready((weights, state, generated))

    def launch() -> Any:
        nonlocal state, generated
        if len(compiled) == 1:
            outputs, (state, generated) = compiled[0](weights, state, generated, tokens, rows, None)
            return outputs
        (hidden, _), state = compiled[0](weights, state, generated.last, tokens)
        outputs, generated = compiled[1](head, generated, hidden, rows, None)
        return outputs

    return launch


def tables(cache: CacheShape, ranks: int, window: int, tokens: int, context: int) -> tuple[np.ndarray, np.ndarray]:
    """Page tables int32 [B, slots, M] of both pools, in which sequences of the whole context have their own pages.

    In the sliding pool these are the pages that the last `tokens` positions see.
    """
    import numpy as np

    full = np.arange(cache.slots * cache.table, dtype=np.int32).reshape(cache.slots, cache.table)
    sliding = np.zeros((cache.slots, cache.sliding_table), np.int32)
    blocks = np.arange(max(0, context - tokens - window + 1) // cache.page_size, -(-context // cache.page_size))
    # Sequences that do not run have pages of others where the pool has no more.
    pages = np.arange(cache.slots * len(blocks), dtype=np.int32) % cache.sliding_pages
    sliding[:, blocks % cache.sliding_table] = pages.reshape(cache.slots, len(blocks))
    every_rank = np.broadcast_to(full, (ranks, *full.shape)), np.broadcast_to(sliding, (ranks, *sliding.shape))
    return every_rank


def inputs(step: Step, vocab_size: int, context: int) -> tuple[ForwardInputs, RowInputs]:
    """What the host sends for random sequences, each with its last tokens of the context to compute and sample from.

    Equal tokens would choose the same experts, so few would be read.
    """
    import numpy as np

    from gptoss_jax.engine.inputs import SampledRow, Settings, forward_inputs, row_inputs
    from gptoss_jax.engine.scheduler import Work
    from gptoss_jax.engine.sequence import Sequence
    from gptoss_jax.types import SamplingParams

    rng, cache, params = np.random.default_rng(0), step.cache, SamplingParams(temperature=1)
    forward, sampling = step.programs[0], step.programs[-1].shape
    ranks, gathered = forward.inputs[0].rows.shape
    running = step.sequences // ranks
    settings = Settings(ranks, cache.slots)
    works: list[list[Work]] = []
    rows = []
    for rank in range(ranks):
        works.append([])
        for slot in range(running):
            prompt = rng.integers(0, vocab_size, context, np.int32)
            sequence = Sequence(str(slot), 0, prompt, params, 1, slot)
            work = Work(sequence, 0, slot, context - step.tokens, step.tokens, [], True, [], {})
            settings.update(rank, work)
            rows.append(SampledRow(rank, slot, context - 1, work, 0))
            works[rank].append(work)
    return (
        forward_inputs(works, 1, forward.shape.tokens, gathered, cache),
        row_inputs(rows, sampling.rows, cache, settings),
    )


def in_flight(launch: Callable[[], Any]) -> tuple[float, float]:
    """Seconds between the ends of consecutive launches, and of the host's call that dispatches one.

    Each launch is dispatched while the device is busy with the previous one, so that it does not wait for the host,
    which passes some 400 arrays per launch.
    """
    import jax

    before, calls, ends = None, [], []
    for _ in range(TIMED + 2):
        started = time.perf_counter()
        outputs = launch()
        calls.append(time.perf_counter() - started)
        if before is not None:
            jax.block_until_ready(before)
            ends.append(time.perf_counter())
        before = outputs
    jax.block_until_ready(before)
    return (ends[-1] - ends[0]) / TIMED, statistics.median(calls)


def stats() -> int | None:
    """Peak bytes in use, the maximum over devices; None on platforms without memory statistics."""
    import jax

    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.devices()]
    return max((peak for peak in peaks if peak is not None), default=None)


if __name__ == "__main__":
    run_command(main)
