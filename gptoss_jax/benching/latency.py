"""Latency of a batch of equally long requests: time to first token, and time of a decode step."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np

from gptoss_jax.benching import batch
from gptoss_jax.benching.batch import REPLAYED_STEPS, TRACED_STEPS, Workload, decoding, prefill, start, stop
from gptoss_jax.benching.ceilings import Ceilings
from gptoss_jax.benching.launches import count_launches
from gptoss_jax.benching.sampling import half_vocabulary, sampling_seconds
from gptoss_jax.engine.engine import Engine
from gptoss_jax.engine.memory import kv_dtype
from gptoss_jax.engine.options import EngineOptions
from gptoss_jax.model.gpt_oss import GptOss
from gptoss_jax.planner.work import Load, Work, work_of
from gptoss_jax.types import SamplingParams
from sharding.compiled.program import Collectives, count_kernels, read_collectives


@dataclasses.dataclass(frozen=True)
class Latency:
    """Measurements of one workload, in seconds, bytes, and tokens per second; medians over the repeats.

    `first_token` is the time to first token of the median request, `last_first_token` that of the slowest one. `step`
    is the time of a step in which every request decodes, and `rate` the decoded tokens per second. `floor` is the time
    to read the step's `step_bytes` at the measured copy bandwidth, and `floor_share` is floor / step.
    `prefill_floor_share` is the same for prefill, where each chunk is bound by its bytes or its operations.
    `device_step` is the time of a step without host work, and `device_idle` the fraction of a step in which the device
    is idle. `sampling` has the seconds that each requested sampling mode takes in a step. A step runs `kernels`
    kernels, for which the host launches `graph_launches` CUDA graphs, and `kernels_outside_graphs` kernels on their
    own; both are None where launches were not counted. `collectives` are those of a launch of `steps_per_launch` steps.
    """

    workload: Workload
    first_token: float
    last_first_token: float
    prefill_rate: float
    prefill_floor_share: float
    step: float
    step_spread: tuple[float, float]
    rate: float
    step_bytes: float
    floor: float
    floor_share: float
    device_step: float
    device_idle: float
    sampling: dict[str, float]
    kernels: int
    kernels_per_layer: float
    graph_launches: float | None
    kernels_outside_graphs: float | None
    drafted: int
    accepted: int
    collectives: tuple[Collectives, ...]
    steps_per_launch: int


@dataclasses.dataclass
class _Run:
    """One repeat: each request's time to first token, then the decode phase: seconds of each step, of all, tokens."""

    first: list[float]
    steps: list[float]
    seconds: float
    tokens: int


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A workload with its engine, whose programs are compiled."""

    model: GptOss
    engine: Engine
    params: SamplingParams
    workload: Workload
    rng: np.random.Generator


def prepare(
    model: GptOss,
    options: EngineOptions,
    params: SamplingParams,
    workload: Workload,
    seed: int,
    *,
    warm_up: bool = False,
    progress: bool | None = None,
) -> Prepared:
    """Run the workload once, to compile its programs; with `warm_up`, compile all programs before."""
    engine = Engine(model, options, eos_token_ids=(), constrain=half_vocabulary)
    if warm_up:
        engine.warm_up(progress)
    rng = np.random.default_rng(seed)
    _run(engine, params, workload, rng)
    return Prepared(model, engine, params, workload, rng)


def measure(
    one: Prepared, ceilings: Ceilings, repeats: int, *, sampling: Iterable[str] = (), profile: bool = True
) -> Latency:
    """Measure a workload, and then the sampling modes named in `sampling`.

    With `profile`, launches on GPUs are counted, which takes seconds.
    """
    model, engine, params, workload, rng = one.model, one.engine, one.params, one.workload, one.rng
    before = engine.load
    runs = [_run(engine, params, workload, rng) for _ in range(repeats)]
    load = engine.load
    device = _device(engine, params, workload, rng, profile)
    step = statistics.median(t for run in runs for t in run.steps)
    last_first = statistics.median(max(run.first) for run in runs)
    needed = work(model, engine.options, workload)
    floor = needed.num_bytes / ceilings.copy_bytes
    return Latency(
        workload=workload,
        first_token=statistics.median(statistics.median(run.first) for run in runs),
        last_first_token=last_first,
        prefill_rate=workload.batch * workload.prompt_tokens / last_first,
        prefill_floor_share=prefill_floor(model, engine, workload, ceilings) / last_first,
        step=step,
        step_spread=(min(min(run.steps) for run in runs), max(max(run.steps) for run in runs)),
        rate=statistics.median(run.tokens / run.seconds for run in runs),
        step_bytes=needed.num_bytes,
        floor=floor,
        floor_share=floor / step,
        device_step=device.seconds,
        device_idle=max(0.0, 1 - device.seconds / step),
        sampling=sampling_seconds(engine, workload, rng, sampling) if sampling else {},
        kernels=round(device.kernels),
        kernels_per_layer=device.kernels / model.config.num_hidden_layers,
        graph_launches=device.graph_launches,
        kernels_outside_graphs=device.kernels_outside_graphs,
        drafted=load.drafted - before.drafted,
        accepted=load.accepted - before.accepted,
        collectives=_collectives(model, device.program),
        steps_per_launch=device.steps_per_launch,
    )


def _collectives(model: GptOss, program: str) -> tuple[Collectives, ...]:
    mesh = model.partition.mesh
    return () if mesh is None else tuple(read_collectives(program, mesh.shape))


def work(
    model: GptOss, options: EngineOptions, workload: Workload, tokens: int = 1, context: int | None = None
) -> Work:
    """The work of a step on a device; `context` defaults to half way through the output. Assumes uniform routing."""
    context = workload.prompt_tokens + workload.output_tokens // 2 if context is None else context
    dtype = model.embed_tokens[...].dtype
    needed = work_of(model.config, model.partition, Load(workload.batch, tokens, context), dtype)
    held = jnp.dtype(kv_dtype(options.kv_cache_dtype or str(dtype))).itemsize
    return dataclasses.replace(needed, cache_bytes=needed.cache_bytes * held / dtype.itemsize)


def prefill_floor(model: GptOss, engine: Engine, workload: Workload, ceilings: Ceilings) -> float:
    """Lower bound of the time to prefill all prompts: for each step the larger of its memory and compute time."""
    total, chunk = 0.0, engine.pace.long_prefill_token_threshold
    together = max(1, engine.pace.max_num_batched_tokens // min(chunk, workload.prompt_tokens))
    alone = dataclasses.replace(workload, batch=min(together, workload.batch))
    for first in range(0, workload.prompt_tokens, chunk):
        last = min(first + chunk, workload.prompt_tokens)
        needed = work(model, engine.options, alone, last - first, last)
        total += max(needed.num_bytes / ceilings.copy_bytes, needed.flops / ceilings.matmul_flops)
    return total * workload.batch / alone.batch


def _run(engine: Engine, params: SamplingParams, workload: Workload, rng: np.random.Generator) -> _Run:
    started = time.perf_counter()
    start(engine, params, workload, rng)
    first = prefill(engine, workload)
    steps, tokens, last = [], 0, time.perf_counter()
    decoding_since = last
    while tokens < (workload.output_tokens - 1) * workload.batch:
        events = batch.step(engine)
        if engine.unfinished < workload.batch or not events:
            break
        tokens += len(events)
        now = time.perf_counter()
        # Multi-step decode returns several tokens per sequence from one launch: those are several steps. A step with
        # accepted drafts also returns several tokens, but is one step.
        launched = 1 if engine.options.num_speculative_tokens else len(events) / workload.batch
        steps.append((now - last) / launched)
        last = now
    stop(engine, workload)
    return _Run([at - started for at in first.values()], steps or [float("nan")], last - decoding_since, tokens)


@dataclasses.dataclass(frozen=True)
class _Device:
    """A step without host work: seconds, kernels, and launches (None where they were not counted).

    `program` is the compiled text of the programs of a launch of `steps_per_launch` steps.
    """

    seconds: float
    kernels: float
    graph_launches: float | None
    kernels_outside_graphs: float | None
    program: str
    steps_per_launch: int


def _device(
    engine: Engine, params: SamplingParams, workload: Workload, rng: np.random.Generator, profile: bool
) -> _Device:
    """Measure the device by replaying one launch."""
    launches, tokens = None, 0
    with decoding(engine, params, workload, rng):
        if profile and jax.default_backend() == "gpu":
            with count_launches() as launches:
                for _ in range(TRACED_STEPS):
                    tokens += len(batch.step(engine))
        seconds, (program, steps) = engine.replay(REPLAYED_STEPS), engine.program()
    kernels = count_kernels(program) / steps
    if launches is None:
        return _Device(seconds, kernels, None, None, program, steps)
    traced_steps = tokens / workload.batch
    graphs, kernels_outside_graphs = launches.graphs / traced_steps, launches.kernels_outside_graphs / traced_steps
    return _Device(seconds, kernels, graphs, kernels_outside_graphs, program, steps)
