"""Metrics in Prometheus' formats; docs/metrics.md describes them beside vLLM's.

All of it is used by the event loop's thread only.
"""

from __future__ import annotations

import asyncio
import bisect
import time
from collections.abc import Iterator, Sequence
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, ProcessCollector, disable_created_metrics
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from gptoss_jax.engine.outputs import Load
from gptoss_jax.errors import DeadlineError, EngineError, OverloadedError, UsageError
from gptoss_jax.serving.api.errors import ApiError
from gptoss_jax.serving.generated import Request
from gptoss_jax.serving.owner import EngineOwner
from gptoss_jax.serving.turns import Update

PREFIX = "gptoss_jax_"

Reason = Literal["stop", "length", "tool_calls", "aborted", "error", "timeout", "rejected"]
REASONS: tuple[Reason, ...] = ("stop", "length", "tool_calls", "aborted", "error", "timeout", "rejected")
"""How requests finish; of several completions, one that reached its length or calls tools decides."""

PHASES = ("waiting", "generating")
"""An unfinished request waits for its first token, or has it."""

CAUSES = (
    "queue",
    "draining",
    "requests_at_once",
    "concurrent_requests",
    "requests",
    "tokens",
)
"""Why requests are shed: full queues, the end of the server, its own limit, and the limits of a key."""

LOAD_SECONDS = 0.5
"""Seconds for which the engine's load is not asked for again."""

LOAD_TIMEOUT = 2.0
"""Seconds after which a scrape uses the last known load, for example while the engine compiles."""

# The times at which counters were made would double the number of series.
disable_created_metrics()

_LATENCIES = [0.001 * step * 10**power for power in range(5) for step in (1, 2.5, 5)] + [100.0, 250.0, 500.0]
_COUNTS = [float(2**power) for power in range(19)]


class Histogram:
    """A histogram that costs a fraction of a microsecond for each value; prometheus_client's locks cost more."""

    def __init__(self, name: str, description: str, bounds: Sequence[float]) -> None:
        self._name, self._description, self._bounds = PREFIX + name, description, list(bounds)
        self._counts, self._sum = [0] * (len(self._bounds) + 1), 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Count a value."""
        self._counts[bisect.bisect_left(self._bounds, value)] += times
        self._sum += value * times

    def collect(self) -> Iterator[Metric]:
        """See prometheus_client."""
        total, buckets = 0, []
        for bound, count in zip([*map(_number, self._bounds), "+Inf"], self._counts, strict=True):
            total += count
            buckets.append((bound, float(total)))
        yield HistogramMetricFamily(self._name, self._description, buckets=buckets, sum_value=self._sum)


def _number(bound: float) -> str:
    return f"{bound:.10g}" if bound % 1 else f"{bound:.1f}"


class Metrics:
    """The metrics of a server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._started = self._counter("requests_started", "Requests that were given to the engine.")
        finished = self._counter("requests_finished", "Requests that have finished, by reason.", "reason")
        self._finished = {reason: finished.labels(reason) for reason in REASONS}
        unfinished = self._gauge("requests_unfinished", "Requests that have not finished, by phase.", "phase")
        self._unfinished = {phase: unfinished.labels(phase) for phase in PHASES}
        shed = self._counter("requests_shed", "Requests that were refused for load or limits, by cause.", "cause")
        self._shed = {cause: shed.labels(cause) for cause in CAUSES}
        self._responses = self._counter("http_responses", "HTTP responses by status.", "status")
        self._prompt = self._counter("prompt_tokens", "Tokens of prompts whose generation has begun.")
        self._cached = self._counter("prompt_tokens_cached", "Those of them found in the prefix cache.")
        self._reasoning = self._counter("reasoning_tokens", "Generated tokens of reasoning.")
        self._malformed = self._counter("malformed_outputs", "Completions that violate the harmony format.")
        self._generated = 0
        self._time_to_first = self._histogram(
            "time_to_first_token_seconds", "From a request's start to its first token.", _LATENCIES
        )
        self._between = self._histogram(
            "inter_token_latency_seconds", "Between two tokens of a completion.", _LATENCIES
        )
        self._queue = self._histogram(
            "request_queue_time_seconds", "Before the engine admitted a request.", _LATENCIES
        )
        self._end_to_end = self._histogram(
            "e2e_request_latency_seconds", "From a request's start to its end, if it succeeded.", _LATENCIES
        )
        self._prompts = self._histogram("request_prompt_tokens", "Prompt tokens of a request.", _COUNTS)
        self._outputs = self._histogram(
            "request_generation_tokens", "Generated tokens of a request that succeeded.", _COUNTS
        )
        self._engine = _EngineMetrics()
        self.registry.register(self._engine)
        self.registry.register(self)
        self._info = self._gauge("info", "The names of the model.", "model_name")
        ProcessCollector(registry=self.registry)

    def _counter(self, name: str, description: str, *labels: str) -> Counter:
        return Counter(PREFIX + name, description, labels, registry=self.registry)

    def _gauge(self, name: str, description: str, *labels: str) -> Gauge:
        return Gauge(PREFIX + name, description, labels, registry=self.registry)

    def _histogram(self, name: str, description: str, bounds: Sequence[float]) -> Histogram:
        histogram = Histogram(name, description, bounds)
        self.registry.register(histogram)
        return histogram

    def collect(self) -> Iterator[Metric]:
        """See prometheus_client."""
        name = PREFIX + "generation_tokens"
        yield CounterMetricFamily(name, "Generated tokens.", value=self._generated)

    def set_names(self, names: Sequence[str]) -> None:
        """Report the model's names."""
        for name in names:
            self._info.labels(name).set(1)

    def observe(self, request: Request) -> Observation:
        """Count the start of a request; what is returned counts its updates and its end."""
        return Observation(self, request)

    def shed(self, cause: str) -> None:
        """Count a request that was refused for load or limits."""
        self._shed[cause].inc()

    def responded(self, status: int) -> None:
        """Count an HTTP response."""
        self._responses.labels(str(status)).inc()

    async def render(self, owner: EngineOwner, accept: str = "") -> tuple[bytes, str]:
        """The metrics as text with its content type, in the format that a scraper accepts."""
        await self._engine.refresh(owner)
        encoder, content_type = choose_encoder(accept)
        return encoder(self.registry), content_type


class Observation:
    """Counts one request: its start, its updates and its end."""

    def __init__(self, metrics: Metrics, request: Request) -> None:
        self._metrics, self._request = metrics, request
        self._began = time.perf_counter()
        self._phase = "waiting"
        self._tokens = self._reasoning = 0
        self._last: dict[int, float] = {}
        self._ends: dict[int, str] = {}
        metrics._started.inc()
        metrics._unfinished[self._phase].inc()

    def update(self, update: Update) -> int:
        """Count an update; returns the number of its new tokens."""
        now, metrics = time.perf_counter(), self._metrics
        new = update.usage.completion_tokens - self._tokens
        self._tokens += new
        metrics._generated += new
        if self._phase == "waiting":
            self._generating(update, now)
        if (last := self._last.get(update.index)) is not None and new:
            metrics._between.observe((now - last) / new, new)
        self._last[update.index] = now
        if update.finish_reason:
            self._ends[update.index] = update.finish_reason
            metrics._malformed.inc(bool(update.malformed))
            metrics._reasoning.inc(update.usage.reasoning_tokens - self._reasoning)
            self._reasoning = update.usage.reasoning_tokens
        return new

    def _generating(self, update: Update, now: float) -> None:
        metrics, usage = self._metrics, update.usage
        self._move("generating")
        metrics._time_to_first.observe(now - self._began)
        metrics._queue.observe(update.tokens[0].queue_seconds if update.tokens else 0.0)
        metrics._prompts.observe(usage.prompt_tokens)
        metrics._prompt.inc(usage.prompt_tokens)
        metrics._cached.inc(usage.cached_tokens)

    def _move(self, phase: str) -> None:
        self._metrics._unfinished[self._phase].dec()
        self._metrics._unfinished[phase].inc()
        self._phase = phase

    def end(self, error: Exception | None = None) -> None:
        """Count the end, by an error or because all completions have ended or nobody reads them."""
        metrics = self._metrics
        metrics._unfinished[self._phase].dec()
        if isinstance(error, OverloadedError):
            metrics.shed("queue")
        elif isinstance(error, ApiError) and error.kind in CAUSES:
            metrics.shed(error.kind)
        if len(self._ends) == self._request.params.n:
            metrics._finished[_success(set(self._ends.values()))].inc()
            metrics._end_to_end.observe(time.perf_counter() - self._began)
            metrics._outputs.observe(self._tokens)
        else:
            metrics._finished[_failure(error)].inc()


def _success(reasons: set[str]) -> Reason:
    return "length" if "length" in reasons else "tool_calls" if "tool_calls" in reasons else "stop"


def _failure(error: Exception | None) -> Reason:
    if isinstance(error, UsageError | OverloadedError | ApiError):
        return "rejected"
    if isinstance(error, DeadlineError):
        return "timeout"
    return "aborted" if error is None else "error"


class _EngineMetrics:
    """The engine's load, as of the last scrape."""

    def __init__(self) -> None:
        self._load: Load | None = None
        self._until = 0.0
        self._asking: asyncio.Task[None] | None = None

    async def refresh(self, owner: EngineOwner) -> None:
        """Ask for the load, unless it is recent; one question serves all scrapes that wait."""
        if time.monotonic() < self._until:
            return
        if self._asking is None or self._asking.done():
            self._asking = asyncio.ensure_future(self._ask(owner))
        await asyncio.wait((self._asking,), timeout=LOAD_TIMEOUT)

    async def _ask(self, owner: EngineOwner) -> None:
        try:
            self._load = await owner.load()
        except EngineError:
            self._load = None
        self._until = time.monotonic() + LOAD_SECONDS

    def collect(self) -> Iterator[Metric]:
        """See prometheus_client."""
        load = self._load
        yield _gauge("engine_up", "Whether the engine answers.", float(load is not None))
        if load is None:
            return
        yield _gauge("num_requests_running", "Sequences that the engine computes.", load.running)
        yield _gauge("num_requests_waiting", "Sequences that wait to be admitted.", load.waiting)
        pools = (
            ("full", load.pages_used, load.pages),
            ("sliding", load.sliding_pages_used, load.sliding_pages),
        )
        usage = max((used / pages for _, used, pages in pools if pages), default=0.0)
        yield _gauge("kv_cache_usage_perc", "Part of the KV cache in use, of the fuller pool; 1 is all.", usage)
        total = GaugeMetricFamily(PREFIX + "kv_cache_pages", "Pages of the KV cache.", labels=("pool",))
        in_use = GaugeMetricFamily(
            PREFIX + "kv_cache_pages_used", "Pages that running sequences hold.", labels=("pool",)
        )
        for name, used, pages in pools:
            total.add_metric((name,), pages)
            in_use.add_metric((name,), used)
        yield from (total, in_use)
        yield _gauge("engine_step_seconds", "A moving average of the time between steps.", load.step_seconds)
        yield _gauge("engine_programs", "Compiled programs.", load.programs)
        for name, description, value in (
            ("num_preemptions", "Preemptions of running sequences.", load.preemptions),
            ("prefix_cache_hits", "Tokens found in the prefix cache at admission.", load.hit_tokens),
            ("spec_decode_num_draft_tokens", "Drafted tokens.", load.drafted),
            ("spec_decode_num_accepted_tokens", "Drafted tokens that were accepted.", load.accepted),
            ("engine_tokens", "Tokens computed by forward passes.", load.tokens),
            ("engine_padding_tokens", "Padding tokens computed beside them.", load.padding),
            ("engine_steps", "Steps.", load.steps),
            ("engine_launches", "Launches, each of one or more steps.", load.launches),
            ("engine_idle_launches", "Launches for which the device had waited.", load.idle_launches),
            ("engine_failures", "Failures of the device.", load.failures),
            ("engine_late_compilations", "Programs compiled after the warm-up.", load.compiled_after_warm_up),
        ):
            yield CounterMetricFamily(PREFIX + name, description, value=value)


def _gauge(name: str, description: str, value: float) -> Metric:
    return GaugeMetricFamily(PREFIX + name, description, value=value)
