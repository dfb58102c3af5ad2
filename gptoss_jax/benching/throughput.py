"""How many tokens a second come of many requests, and how long each waits for them."""

from __future__ import annotations

import dataclasses
import statistics
import sys
import time
from collections.abc import Sequence

import numpy as np

from gptoss_jax.benching.workload import Arrival, random_prompt
from gptoss_jax.engine.engine import Engine
from gptoss_jax.types import SamplingParams

MOST_RUNS = 5
"""Which kinds of step arise depends on when requests come and end, so that a second run may still meet new ones."""


@dataclasses.dataclass(frozen=True)
class Percentiles:
    """Of a number of seconds."""

    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Percentiles:
        """Of at least one value."""
        p50, p90, p99 = np.percentile(values, (50, 90, 99)).tolist()
        return cls(p50, p90, p99)


@dataclasses.dataclass(frozen=True)
class Throughput:
    """Requests run to their ends: seconds from the first arrival to the last token, tokens, and what requests saw.

    `first_token` and `whole` count from a request's arrival, `between_tokens` is the mean of each request's.
    `compiled` kinds of step were compiled in the measured run, which they slowed down. `late` is the share of launches
    that found the device waiting for the host.
    """

    requests: int
    seconds: float
    prompt_tokens: int
    output_tokens: int
    output_rate: float
    total_rate: float
    request_rate: float
    first_token: Percentiles
    between_tokens: Percentiles
    whole: Percentiles
    most_running: int
    steps: int
    late: float
    preemptions: int
    compiled: int
    drafted: int
    accepted: int


@dataclasses.dataclass
class _Seen:
    arrived: float
    first: float = 0.0
    last: float = 0.0
    tokens: int = 0


def measure(engine: Engine, params: SamplingParams, arrivals: Sequence[Arrival], seed: int) -> Throughput:
    """Run the requests until a run compiles nothing, which counts, but at most `MOST_RUNS` times. Raises UsageError.

    What does not count is told on standard error.
    """
    rng = np.random.default_rng(seed)
    for _ in range(MOST_RUNS):
        one = _measured(engine, params, arrivals, rng)
        if not one.compiled:
            break
        print(f"  {one.seconds:.1f} s, in which {one.compiled} kinds of step were compiled", file=sys.stderr)
    return one


def _measured(
    engine: Engine, params: SamplingParams, arrivals: Sequence[Arrival], rng: np.random.Generator
) -> Throughput:
    before = engine.load
    started = time.perf_counter()
    seen, most_running = _serve(engine, params, arrivals, rng)
    ended, after = time.perf_counter(), engine.load
    seconds = ended - started - arrivals[0].arrival_s
    prompt, output = sum(a.prompt_tokens for a in arrivals), sum(one.tokens for one in seen)
    gaps = [(one.last - one.first) / (one.tokens - 1) for one in seen if one.tokens > 1]
    return Throughput(
        requests=len(seen),
        seconds=seconds,
        prompt_tokens=prompt,
        output_tokens=output,
        output_rate=output / seconds,
        total_rate=(prompt + output) / seconds,
        request_rate=len(seen) / seconds,
        first_token=Percentiles.of([one.first - one.arrived for one in seen]),
        between_tokens=Percentiles.of(gaps or [0.0]),
        whole=Percentiles.of([one.last - one.arrived for one in seen]),
        most_running=most_running,
        steps=after.steps - before.steps,
        late=(after.idle_launches - before.idle_launches) / max(1, after.launches - before.launches),
        preemptions=after.preemptions - before.preemptions,
        compiled=after.programs_compiled - before.programs_compiled,
        drafted=after.drafted - before.drafted,
        accepted=after.accepted - before.accepted,
    )


def rehearse(engine: Engine, params: SamplingParams, arrivals: Sequence[Arrival]) -> None:
    """The requests all at once, for `Engine.warm_up`: when they come one by one, some kinds of step differ."""
    together = [dataclasses.replace(arrival, arrival_s=0.0) for arrival in arrivals]
    _serve(engine, params, together, np.random.default_rng(0))


def _serve(
    engine: Engine, params: SamplingParams, arrivals: Sequence[Arrival], rng: np.random.Generator
) -> tuple[list[_Seen], int]:
    """Add each request when its time has come, until all have ended; and the most that ran at once."""
    prompts = [random_prompt(rng, engine.config.vocab_size, arrival.prompt_tokens) for arrival in arrivals]
    started = time.perf_counter()
    seen = [_Seen(started + arrival.arrival_s) for arrival in arrivals]
    coming, most_running = 0, 0
    while coming < len(arrivals) or engine.unfinished:
        while coming < len(arrivals) and seen[coming].arrived <= time.perf_counter():
            own = dataclasses.replace(params, max_tokens=arrivals[coming].output_tokens, ignore_eos=True)
            engine.add(str(coming), prompts[coming], own)
            coming += 1
        if not engine.unfinished:
            time.sleep(max(0.0, seen[coming].arrived - time.perf_counter()))
            continue
        events = engine.step()
        now = time.perf_counter()
        most_running = max(most_running, engine.load.running)
        for event in events:
            one = seen[int(event.request_id)]
            one.first, one.last, one.tokens = one.first or now, now, one.tokens + 1
    return seen, most_running


def alike(requests: int, prompt_tokens: int, output_tokens: int) -> list[Arrival]:
    """Requests of one size that all come at once."""
    return [Arrival(0.0, prompt_tokens, output_tokens)] * requests


def repeated(runs: Sequence[Throughput]) -> Throughput:
    """The run with the median output rate."""
    middle = statistics.median_low([run.output_rate for run in runs])
    return next(run for run in runs if run.output_rate == middle)
