"""Throughput, latency percentiles and goodput of a load, under the names of `vllm bench serve`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from gptoss_jax.benching.load import Outcome

METRICS = {
    "ttft": ("TTFT", "Time to First Token"),
    "tpot": ("TPOT", "Time per Output Token (excl. 1st token)"),
    "itl": ("ITL", "Inter-token Latency"),
    "e2el": ("E2EL", "End-to-end Latency"),
}
"""Abbreviation and name of each latency."""


def output_tokens(one: Outcome) -> int:
    """The output tokens of a request: its usage, or its events if the server sent no usage."""
    return len(one.times) if one.output_tokens is None else one.output_tokens


def input_tokens(one: Outcome) -> int:
    """The input tokens of a request: its usage, or what was sent."""
    return (one.request.input_tokens or 0) if one.input_tokens is None else one.input_tokens


def latencies(one: Outcome) -> dict[str, list[float]]:
    """A successful request's latencies in seconds, by the names of METRICS.

    `itl` has the gaps between events with output; each other has one value, and `tpot` none for a single token.
    """
    e2el, ttft, tokens = one.ended - one.started, one.times[0] - one.started, output_tokens(one)
    return {
        "ttft": [ttft],
        "tpot": [(e2el - ttft) / (tokens - 1)] if tokens > 1 else [],
        "itl": [later - earlier for earlier, later in pairwise(one.times)],
        "e2el": [e2el],
    }


def is_good(found: Mapping[str, Sequence[float]], goodput: Mapping[str, float]) -> bool:
    """Whether a request's latencies are within all limits, in milliseconds; for `itl`, that is its longest gap."""
    return all(1e3 * max(found[name], default=0.0) <= limit for name, limit in goodput.items())


def peak_concurrency(outcomes: Sequence[Outcome]) -> int:
    """The most requests that were in flight at once."""
    changes = [(one.started, 1) for one in outcomes] + [(one.ended, -1) for one in outcomes]
    # At the same time, a request ends before another starts.
    return max(np.cumsum([change for _, change in sorted(changes)]).tolist(), default=0)


def peak_output_rate(outcomes: Sequence[Outcome]) -> float:
    """The most output tokens in a second, of the seconds from the first request's start.

    A request's tokens are spread evenly over its events.
    """
    if not outcomes:
        return 0.0
    start = min(one.started for one in outcomes)
    seconds = np.concatenate([np.asarray(one.times) - start for one in outcomes]).astype(np.int64)
    weights = np.repeat(
        [output_tokens(one) / len(one.times) for one in outcomes], [len(one.times) for one in outcomes]
    )
    return float(np.bincount(seconds, weights).max())


def summary(
    outcomes: Sequence[Outcome],
    seconds: float,
    metrics: Sequence[str] = tuple(METRICS),
    percentiles: Sequence[float] = (99.0,),
    goodput: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """The results of a run of `seconds`, as a JSON object; latencies in milliseconds, None where there are none."""
    good = [one for one in outcomes if one.error is None]
    found = [latencies(one) for one in good]
    inputs, outputs = sum(map(input_tokens, good)), sum(map(output_tokens, good))
    result: dict[str, Any] = {
        "duration": seconds,
        "completed": len(good),
        "failed": len(outcomes) - len(good),
        "total_input_tokens": inputs,
        "total_output_tokens": outputs,
        "request_throughput": len(good) / seconds,
        "request_goodput": sum(is_good(one, goodput) for one in found) / seconds if goodput else None,
        "output_throughput": outputs / seconds,
        "total_token_throughput": (inputs + outputs) / seconds,
        "max_output_tokens_per_s": peak_output_rate(good),
        "max_concurrent_requests": peak_concurrency(good),
    }
    for name in metrics:
        result |= _statistics(name, [value for one in found for value in one[name]], percentiles)
    return result


def _statistics(name: str, seconds: Sequence[float], percentiles: Sequence[float]) -> dict[str, float | None]:
    keys = ["mean", "median", "std", *(f"p{percent:g}" for percent in percentiles)]
    values: Sequence[float | None] = [None] * len(keys)
    if seconds:
        of = 1e3 * np.asarray(seconds)
        values = [
            float(of.mean()),
            float(np.median(of)),
            float(of.std()),
            *np.percentile(of, percentiles).tolist(),
        ]
    return {f"{key}_{name}_ms": value for key, value in zip(keys, values, strict=True)}


def details(outcomes: Sequence[Outcome]) -> dict[str, list[Any]]:
    """Each request's measurements, in seconds, in the order in which the requests were sent."""
    ordered = sorted(outcomes, key=lambda one: one.started)
    found = [latencies(one) if one.error is None else None for one in ordered]
    return {
        "input_lens": [input_tokens(one) for one in ordered],
        "output_lens": [0 if one.error else output_tokens(one) for one in ordered],
        "start_times": [one.started for one in ordered],
        "ttfts": [one["ttft"][0] if one else 0.0 for one in found],
        "itls": [one["itl"] if one else [] for one in found],
        "latencies": [one["e2el"][0] if one else 0.0 for one in found],
        "generated_texts": [one.text for one in ordered],
        "errors": [one.error or "" for one in ordered],
    }


def table(result: Mapping[str, Any], metrics: Sequence[str], percentiles: Sequence[float]) -> str:
    """The results in the layout of `vllm bench serve`."""
    rows = [("Successful requests:", result["completed"]), ("Failed requests:", result["failed"])]
    if result.get("max_concurrency") is not None:
        rows.append(("Maximum request concurrency:", result["max_concurrency"]))
    if isinstance(result.get("request_rate"), float) and math.isfinite(result["request_rate"]):
        rows.append(("Request rate configured (RPS):", result["request_rate"]))
    rows += [
        ("Benchmark duration (s):", result["duration"]),
        ("Total input tokens:", result["total_input_tokens"]),
        ("Total generated tokens:", result["total_output_tokens"]),
        ("Request throughput (req/s):", result["request_throughput"]),
    ]
    if result["request_goodput"] is not None:
        rows.append(("Request goodput (req/s):", result["request_goodput"]))
    rows += [
        ("Output token throughput (tok/s):", result["output_throughput"]),
        ("Peak output token throughput (tok/s):", result["max_output_tokens_per_s"]),
        ("Peak concurrent requests:", result["max_concurrent_requests"]),
        ("Total token throughput (tok/s):", result["total_token_throughput"]),
    ]
    lines = [" Serving Benchmark Result ".center(50, "="), *(_row(*row) for row in rows)]
    for name in metrics:
        short, long = METRICS[name]
        lines.append(long.center(50, "-"))
        keys = {"mean": "Mean", "median": "Median"} | {f"p{percent:g}": f"P{percent:g}" for percent in percentiles}
        lines += [_row(f"{label} {short} (ms):", result[f"{key}_{name}_ms"]) for key, label in keys.items()]
    return "\n".join([*lines, "=" * 50])


def _row(label: str, value: float | None) -> str:
    text = "n/a" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)
    return f"{label:<40} {text}"
