"""How long a batch of alike requests waits for its first tokens, and how long a step that decodes all of it takes."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np

from gptoss_jax.benching.batch import REPLAYED_STEPS, TRACED_STEPS, Case, decoding, prefill, start, stop
from gptoss_jax.benching.ceilings import Ceilings
from gptoss_jax.benching.launches import counted
from gptoss_jax.benching.sampling import every_other, sampling_seconds
from gptoss_jax.engine.engine import Engine, EngineOptions
from gptoss_jax.engine.memory import kv_dtype
from gptoss_jax.model.gpt_oss import GptOss
from gptoss_jax.planner.work import Load, Work, work_of
from gptoss_jax.types import SamplingParams
from sharding.compiled.program import Collectives, count_kernels, read_collectives


@dataclasses.dataclass(frozen=True)
class Latency:
    """One case, measured; seconds, bytes and tokens a second, medians over the repeats.

    `first_token` is the median request's, `last_first_token` that of the one that waits longest. `step` is a step in
    which every request decodes. `floor` is the least time in which its `step_bytes` could be read, and `reached` the
    share of the step that this is; `prefill_reached` likewise, of the operations or bytes of a prompt's chunks.
    `device` is a step whose host part is left out, `waits` the share of a step in which the device has nothing to do.
    `sampling` has what each way to choose the batch's tokens adds to a step, if that is asked for. `kernels` run in a
    step, for which the host launches `graphs` device graphs, and `lone_kernels` outside of them (None where it is not
    known). `collectives` are those of a launch of `rounds` steps.
    """

    case: Case
    first_token: float
    last_first_token: float
    prefill_rate: float
    prefill_reached: float
    step: float
    step_spread: tuple[float, float]
    rate: float
    step_bytes: float
    floor: float
    reached: float
    device: float
    waits: float
    sampling: dict[str, float]
    kernels: int
    kernels_a_layer: float
    graphs: float | None
    lone_kernels: float | None
    drafted: int
    accepted: int
    collectives: tuple[Collectives, ...]
    rounds: int


@dataclasses.dataclass
class _Run:
    """One repeat: when each request had its first token, and after the last: seconds of each step, of all, tokens."""

    first: list[float]
    steps: list[float]
    seconds: float
    tokens: int


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A case with its engine, whose steps are compiled."""

    model: GptOss
    engine: Engine
    params: SamplingParams
    case: Case
    rng: np.random.Generator


def prepare(
    model: GptOss,
    options: EngineOptions,
    params: SamplingParams,
    case: Case,
    seed: int,
    *,
    warm_up: bool = False,
    progress: bool | None = None,
) -> Prepared:
    """Compile what the case needs, several kinds of step at once; with `warm_up` every kind."""
    options = dataclasses.replace(options, max_num_seqs=case.batch)
    engine = Engine(model, options, eos_token_ids=(), constrain=every_other)
    one = Prepared(model, engine, params, case, np.random.default_rng(seed))
    engine.warm_up(progress, None if warm_up else lambda: _rehearse(one))
    return one


def _rehearse(one: Prepared) -> None:
    rng = np.random.default_rng(0)
    _run(one.engine, one.params, one.case, rng)
    with decoding(one.engine, one.params, one.case, rng):
        pass


def measure(
    one: Prepared, ceilings: Ceilings, repeats: int, *, sampling: Iterable[str] = (), profile: bool = True
) -> Latency:
    """Measure a case, after one run that does not count; more follow for `sampling`, ways to choose tokens.

    Launches are counted on GPUs if `profile`, which takes seconds.
    """
    model, engine, params, case, rng = one.model, one.engine, one.params, one.case, one.rng
    _run(engine, params, case, rng)
    before = engine.load
    runs = [_run(engine, params, case, rng) for _ in range(repeats)]
    load = engine.load
    device = _device(engine, params, case, rng, profile)
    step = statistics.median(t for run in runs for t in run.steps)
    last_first = statistics.median(max(run.first) for run in runs)
    needed = work(model, engine.options, case)
    floor = needed.num_bytes / ceilings.copy_bytes
    return Latency(
        case=case,
        first_token=statistics.median(statistics.median(run.first) for run in runs),
        last_first_token=last_first,
        prefill_rate=case.batch * case.prompt_tokens / last_first,
        prefill_reached=prefill_floor(model, engine, case, ceilings) / last_first,
        step=step,
        step_spread=(min(min(run.steps) for run in runs), max(max(run.steps) for run in runs)),
        rate=statistics.median(run.tokens / run.seconds for run in runs),
        step_bytes=needed.num_bytes,
        floor=floor,
        reached=floor / step,
        device=device.seconds,
        waits=max(0.0, 1 - device.seconds / step),
        sampling=sampling_seconds(engine, case, rng, sampling) if sampling else {},
        kernels=round(device.kernels),
        kernels_a_layer=device.kernels / model.config.num_hidden_layers,
        graphs=device.graphs,
        lone_kernels=device.lone_kernels,
        drafted=load.drafted - before.drafted,
        accepted=load.accepted - before.accepted,
        collectives=_collectives(model, device.program),
        rounds=device.rounds,
    )


def _collectives(model: GptOss, program: str) -> tuple[Collectives, ...]:
    mesh = model.partition.mesh
    return () if mesh is None else tuple(read_collectives(program, mesh.shape))


def work(model: GptOss, options: EngineOptions, case: Case, tokens: int = 1, context: int | None = None) -> Work:
    """What a step must read and compute on a device, half way through the output; routing counts as uniform."""
    context = case.prompt_tokens + case.output_tokens // 2 if context is None else context
    dtype = model.embed_tokens[...].dtype
    needed = work_of(model.config, model.partition, Load(case.batch, tokens, context), dtype)
    held = jnp.dtype(kv_dtype(options.kv_cache_dtype or str(dtype))).itemsize
    return dataclasses.replace(needed, cache_bytes=needed.cache_bytes * held / dtype.itemsize)


def prefill_floor(model: GptOss, engine: Engine, case: Case, ceilings: Ceilings) -> float:
    """The least time of all prompts' steps, each the larger of its bytes' and its operations' time."""
    total, chunk = 0.0, engine.pace.long_prefill_token_threshold
    together = max(1, engine.pace.max_num_batched_tokens // min(chunk, case.prompt_tokens))
    alone = dataclasses.replace(case, batch=min(together, case.batch))
    for first in range(0, case.prompt_tokens, chunk):
        last = min(first + chunk, case.prompt_tokens)
        needed = work(model, engine.options, alone, last - first, last)
        total += max(needed.num_bytes / ceilings.copy_bytes, needed.flops / ceilings.matmul_flops)
    return total * case.batch / alone.batch


def _run(engine: Engine, params: SamplingParams, case: Case, rng: np.random.Generator) -> _Run:
    started = time.perf_counter()
    start(engine, params, case, rng)
    first = prefill(engine, case)
    steps, tokens, last = [], 0, time.perf_counter()
    decoding_since = last
    while tokens < (case.output_tokens - 1) * case.batch:
        events = engine.step()
        if engine.unfinished < case.batch or not events:
            break
        tokens += len(events)
        now = time.perf_counter()
        # With guesses a step gives a sequence more than one token; a launch of several rounds is as many steps.
        launched = 1 if engine.options.num_speculative_tokens else len(events) / case.batch
        steps.append((now - last) / launched)
        last = now
    stop(engine, case)
    return _Run([at - started for at in first.values()], steps or [float("nan")], last - decoding_since, tokens)


@dataclasses.dataclass(frozen=True)
class _Device:
    """A step without the host's part: seconds, kernels, and what is launched for it (None where it is not known).

    `program` is the text of a launch of `rounds` steps.
    """

    seconds: float
    kernels: float
    graphs: float | None
    lone_kernels: float | None
    program: str
    rounds: int


def _device(
    engine: Engine, params: SamplingParams, case: Case, rng: np.random.Generator, profile: bool
) -> _Device:
    """Of a launch that is repeated."""
    launches, tokens = None, 0
    with decoding(engine, params, case, rng):
        if profile and jax.default_backend() == "gpu":
            with counted() as launches:
                for _ in range(TRACED_STEPS):
                    tokens += len(engine.step())
        seconds, (program, steps) = engine.replay(REPLAYED_STEPS), engine.program()
    kernels = count_kernels(program) / steps
    if launches is None:
        return _Device(seconds, kernels, None, None, program, steps)
    traced_steps = tokens / case.batch
    graphs, lone_kernels = launches.graphs / traced_steps, launches.lone_kernels / traced_steps
    return _Device(seconds, kernels, graphs, lone_kernels, program, steps)
