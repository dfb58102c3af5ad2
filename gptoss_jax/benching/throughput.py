"""Throughput of many requests, and the latency that each of them sees."""

from __future__ import annotations

import dataclasses
import statistics
import sys
import time
from collections.abc import Sequence

import numpy as np

from gptoss_jax.benching.batch import step
from gptoss_jax.benching.workload import Arrival, random_prompt
from gptoss_jax.engine.engine import Engine
from gptoss_jax.types import SamplingParams

MAX_RUNS = 5
"""Limit of the runs. The programs depend on when requests arrive and end, so even a second run may compile some."""


@dataclasses.dataclass(frozen=True)
class Percentiles:
    """Percentiles of durations, in seconds."""

    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Percentiles:
        """The percentiles of `values`, which must not be empty."""
        p50, p90, p99 = np.percentile(values, (50, 90, 99)).tolist()
        return cls(p50, p90, p99)


@dataclasses.dataclass(frozen=True)
class Throughput:
    """Measurements of one run of all requests, in seconds, and tokens or requests per second.

    `seconds` is from the first arrival to the last token. `first_token` and `end_to_end` are latencies from a
    request's arrival; `per_output_token` is the mean time between a request's tokens. `max_running` is the most
    requests that ran at once. `late_launch_share` is the fraction of launches that came after the device had become
    idle, and `padding_share` the fraction of padding among the tokens that were computed. `compiled_programs` is the
    number of programs that were compiled during the run, which slows it down, and `compiled_after_warm_up` that of all
    that the engine has compiled since its warm-up, or since its start without one.
    """

    requests: int
    seconds: float
    prompt_tokens: int
    output_tokens: int
    output_rate: float
    total_rate: float
    request_rate: float
    first_token: Percentiles
    per_output_token: Percentiles
    end_to_end: Percentiles
    max_running: int
    steps: int
    late_launch_share: float
    preemptions: int
    padding_share: float
    compiled_programs: int
    compiled_after_warm_up: int
    drafted: int
    accepted: int


@dataclasses.dataclass
class _Timing:
    arrived: float
    first: float = 0.0
    last: float = 0.0
    tokens: int = 0


def measure(engine: Engine, params: SamplingParams, arrivals: Sequence[Arrival], seed: int) -> Throughput:
    """Run the requests until a run compiles nothing, at most `MAX_RUNS` times, and return the last run.

    Discarded runs are reported on standard error. Raises UsageError.
    """
    rng = np.random.default_rng(seed)
    for _ in range(MAX_RUNS):
        one = _measured(engine, params, arrivals, rng)
        if not one.compiled_programs:
            break
        print(
            f"  {one.seconds:.1f} s, including the compilation of {one.compiled_programs} programs",
            file=sys.stderr,
        )
    return one


def _measured(
    engine: Engine, params: SamplingParams, arrivals: Sequence[Arrival], rng: np.random.Generator
) -> Throughput:
    before = engine.load
    started = time.perf_counter()
    timings, max_running = _serve(engine, params, arrivals, rng)
    ended, after = time.perf_counter(), engine.load
    seconds = ended - started - arrivals[0].arrival_s
    prompt, output = sum(a.prompt_tokens for a in arrivals), sum(one.tokens for one in timings)
    padding = after.padding - before.padding
    gaps = [(one.last - one.first) / (one.tokens - 1) for one in timings if one.tokens > 1]
    return Throughput(
        requests=len(timings),
        seconds=seconds,
        prompt_tokens=prompt,
        output_tokens=output,
        output_rate=output / seconds,
        total_rate=(prompt + output) / seconds,
        request_rate=len(timings) / seconds,
        first_token=Percentiles.of([one.first - one.arrived for one in timings]),
        per_output_token=Percentiles.of(gaps or [0.0]),
        end_to_end=Percentiles.of([one.last - one.arrived for one in timings]),
        max_running=max_running,
        steps=after.steps - before.steps,
        late_launch_share=(after.idle_launches - before.idle_launches) / max(1, after.launches - before.launches),
        preemptions=after.preemptions - before.preemptions,
        padding_share=padding / (after.tokens - before.tokens + padding),
        compiled_programs=after.programs - before.programs,
        compiled_after_warm_up=after.compiled_after_warm_up,
        drafted=after.drafted - before.drafted,
        accepted=after.accepted - before.accepted,
    )


def _serve(
    engine: Engine, params: SamplingParams, arrivals: Sequence[Arrival], rng: np.random.Generator
) -> tuple[list[_Timing], int]:
    """Run all requests, each added at its arrival time; return their timings and the most that ran at once."""
    prompts = [random_prompt(rng, engine.config.vocab_size, arrival.prompt_tokens) for arrival in arrivals]
    started = time.perf_counter()
    timings = [_Timing(started + arrival.arrival_s) for arrival in arrivals]
    added, max_running = 0, 0
    while added < len(arrivals) or engine.unfinished:
        while added < len(arrivals) and timings[added].arrived <= time.perf_counter():
            own = dataclasses.replace(params, max_tokens=arrivals[added].output_tokens, ignore_eos=True)
            engine.add(str(added), prompts[added], own)
            added += 1
        if not engine.unfinished:
            time.sleep(max(0.0, timings[added].arrived - time.perf_counter()))
            continue
        events = step(engine)
        now = time.perf_counter()
        max_running = max(max_running, engine.load.running)
        for event in events:
            one = timings[int(event.request_id)]
            one.first, one.last, one.tokens = one.first or now, now, one.tokens + 1
    return timings, max_running


def simultaneous(requests: int, prompt_tokens: int, output_tokens: int) -> list[Arrival]:
    """Requests of equal lengths that all arrive at once."""
    return [Arrival(0.0, prompt_tokens, output_tokens)] * requests


def median_run(runs: Sequence[Throughput]) -> Throughput:
    """The run with the median output rate."""
    median = statistics.median_low([run.output_rate for run in runs])
    return next(run for run in runs if run.output_rate == median)
