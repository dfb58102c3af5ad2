"""`bench serve`: sends a load to an OpenAI-compatible server, and reports its latencies and throughput."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import os
import resource
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from gptoss_jax.benching.endpoints import ENDPOINTS, error_message
from gptoss_jax.benching.http1 import Address, Client, HttpError
from gptoss_jax.benching.load import Outcome, Run, Target, cpu_share, encode, send, send_all
from gptoss_jax.benching.load_metrics import details, summary, table
from gptoss_jax.benching.requests import Request
from gptoss_jax.commands.files import check_writable, read_text
from gptoss_jax.commands.load_data import requests_of
from gptoss_jax.commands.load_flags import request_fields, result_path
from gptoss_jax.errors import UsageError

CHECK_TIMEOUT = 10.0
"""Seconds for a server to list its models."""
SHOWN_ERRORS = 10
BUSY_SHARE = 0.8
"""Above this share of a core, the client's own delays are in the latencies."""


@dataclass
class _Measured:
    """What is known so far; Ctrl-C may end the run at any time."""

    model: str = ""
    path: Path | None = None
    run: Run = field(default_factory=Run)
    cpu: dict[str, float] = field(default_factory=dict)


def serve(options: argparse.Namespace) -> int:
    """Run `bench serve`; the exit code is 1 if no request succeeded. Raises UsageError, KeyboardInterrupt."""
    client = Client(_address(options), _headers(options))
    requests, times = requests_of(options)
    _allow_connections()
    measured = _Measured()
    try:
        asyncio.run(_measure(options, client, requests, times, measured))
    except KeyboardInterrupt:
        if measured.run.outcomes:
            _progress(f"{len(measured.run.outcomes)} of {len(requests)} requests had ended")
            _show(options, len(requests), measured)
        raise
    return 0 if _show(options, len(requests), measured) else 1


def _address(options: argparse.Namespace) -> Address:
    host = f"[{options.host}]" if ":" in options.host else options.host
    url = options.url or f"http://{host}:{options.port}"
    try:
        # OpenAI's base URLs end in /v1, which is part of the paths here.
        return Address.parse(url.rstrip("/").removesuffix("/v1"))
    except ValueError as error:
        raise UsageError(f"{url!a:.100}: {error}", "--url" if options.url else "--host") from None


def _headers(options: argparse.Namespace) -> dict[str, str]:
    if options.api_key_file:
        key, where = read_text(options.api_key_file, "--api-key-file").strip(), "--api-key-file"
    else:
        key, where = os.environ.get("OPENAI_API_KEY", ""), "OPENAI_API_KEY"
    if not all("!" <= character <= "~" for character in key):
        raise UsageError("expected an API key of printable ASCII characters", where)
    return {"Authorization": f"Bearer {key}"} if key else {}


def _allow_connections() -> None:
    """Raise the limit of open files, which every request in flight counts towards, as far as this process may."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


async def _measure(
    options: argparse.Namespace,
    client: Client,
    requests: Sequence[Request],
    times: Sequence[float],
    measured: _Measured,
) -> None:
    first = await _first_model(client, options)
    measured.model = options.model or first
    measured.path = _checked_path(options, measured.model)
    endpoint = ENDPOINTS[options.backend]
    fields = {"model": measured.model} | request_fields(options)
    target = Target(client, endpoint, options.endpoint or endpoint.path, fields)
    await _warm_up(target, requests[0], options.num_warmups)
    _progress(f"{len(requests)} requests to {measured.model}")
    # Standard error may be a log file, where each update is a line.
    interval = 0.2 if sys.stderr.isatty() else 10.0
    with (
        tqdm(total=len(requests), unit="req", file=sys.stderr, mininterval=interval) as bar,
        cpu_share(measured.cpu),
    ):

        def advance(outcome: Outcome) -> None:
            bar.update()

        await send_all(target, requests, times, options.max_concurrency, measured.run, advance)
    client.close()


async def _first_model(client: Client, options: argparse.Namespace) -> str:
    """Wait until the server lists its models, and return the name of the first. Raises UsageError."""
    deadline = time.monotonic() + options.ready_check_timeout_sec
    while True:
        status, body = await _models(client)
        if status not in (0, 503) or time.monotonic() >= deadline:
            break
        await asyncio.sleep(min(1.0, max(0.0, deadline - time.monotonic())))
    if status == 0 or status in (401, 403, 503):
        where = "--url" if options.url else "--host, --port"
        raise UsageError(f"{client.address.host_header}: {body.decode(errors='replace')}", where)
    with contextlib.suppress(ValueError, KeyError, IndexError, TypeError, AttributeError):
        return str(json.loads(body)["data"][0]["id"])
    if not options.model:
        raise UsageError(f"expected a name, because the server lists no models (HTTP {status})", "--model")
    return ""


async def _models(client: Client) -> tuple[int, bytes]:
    """The status and body of GET /v1/models; status 0 without a response, and a body of one line for an error."""
    try:
        async with asyncio.timeout(CHECK_TIMEOUT), client.request("GET", "/v1/models") as response:
            body = await response.read_all()
    except HttpError as error:
        return 0, str(error).encode()
    except TimeoutError:
        return 0, f"no response within {CHECK_TIMEOUT:.0f} s".encode()
    if response.status == 200:
        return 200, body
    reason = None
    with contextlib.suppress(ValueError, AttributeError):
        reason = error_message(json.loads(body))
    return response.status, f"GET /v1/models: HTTP {response.status}{f': {reason}' if reason else ''}".encode()


def _checked_path(options: argparse.Namespace, model: str) -> Path | None:
    """The file for the results, before the work that they take. Raises UsageError."""
    if not options.save_result:
        return None
    path = result_path(options, model, time.strftime("%Y%m%d-%H%M%S"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{path.parent}: {error.strerror}", "--result-dir") from None
    check_writable(path, "--save-result")
    return path


async def _warm_up(target: Target, request: Request, count: int) -> None:
    """Send the first request some times, all at once. Raises UsageError for the first failure."""
    body = encode(target, request)
    for outcome in await asyncio.gather(*(send(target, request, body) for _ in range(count))):
        if outcome.error is not None:
            raise UsageError(f"a warm-up request failed: {outcome.error}", "--num-warmups")


def _show(options: argparse.Namespace, count: int, measured: _Measured) -> int:
    """Print and save the results; returns the number of successful requests."""
    run, rate = measured.run, options.request_rate
    facts = {
        "date": time.strftime("%Y%m%d-%H%M%S"),
        "backend": options.backend,
        "model_id": measured.model,
        "dataset_name": options.dataset_name,
        "num_prompts": count,
        # JSON has no infinity.
        "request_rate": "inf" if rate is not None and math.isinf(rate) else rate,
        "burstiness": options.burstiness,
        "max_concurrency": options.max_concurrency,
        "seed": options.seed,
    }
    metrics, percentiles = options.percentile_metrics, options.metric_percentiles
    found = summary(run.outcomes, run.ended - run.started, metrics, percentiles, dict(options.goodput))
    errors = Counter(one.error for one in run.outcomes if one.error is not None)
    result: dict[str, Any] = facts | found | {"failures": dict(errors.most_common())} | measured.cpu
    print(json.dumps(result) if options.json else table(result, metrics, percentiles), flush=True)
    for message, number in errors.most_common(SHOWN_ERRORS):
        _progress(f"{number} failed: {message}")
    if (share := measured.cpu.get("client_cpu_share", 0.0)) > BUSY_SHARE:
        _progress(f"warning: this client used {share:.0%} of a CPU core; its own delays are in the latencies")
    if measured.path is not None:
        saved = result | (details(run.outcomes) if options.save_detailed else {})
        measured.path.write_text(json.dumps(saved) + "\n")
        _progress(f"saved {measured.path}")
    return int(found["completed"])


def _progress(message: str) -> None:
    print(message, file=sys.stderr)
