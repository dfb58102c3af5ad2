"""Sends requests to a server as they arrive, and times their streamed responses."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from gptoss_jax.benching.endpoints import Endpoint, EventError, error_message, read_event
from gptoss_jax.benching.http1 import Client, HttpError, Response
from gptoss_jax.benching.requests import Request
from gptoss_jax.benching.sse import EventStream


@dataclasses.dataclass
class Outcome:
    """A request that has ended; times are in seconds of time.perf_counter().

    `started` is when it was sent, `times` when each event with output arrived, and `ended` when the last of them or
    the end of the output arrived. `input_tokens` and `output_tokens` are the server's usage, None if it sent none.
    `error` is one line, None if the request succeeded.
    """

    request: Request
    started: float
    times: list[float] = dataclasses.field(default_factory=list)
    ended: float = 0.0
    input_tokens: int | None = None
    output_tokens: int | None = None
    text: str = ""
    error: str | None = None


@dataclasses.dataclass(frozen=True)
class Target:
    """Where requests go, and the fields that all of them have, such as the model."""

    client: Client
    endpoint: Endpoint
    path: str
    fields: dict[str, Any]


@dataclasses.dataclass
class Run:
    """A run's outcomes so far, in the order in which the requests ended; times as in Outcome."""

    started: float = 0.0
    ended: float = 0.0
    outcomes: list[Outcome] = dataclasses.field(default_factory=list)


async def send_all(
    target: Target,
    requests: Sequence[Request],
    arrivals: Sequence[float],
    max_concurrency: int | None,
    run: Run,
    on_end: Callable[[Outcome], None] = lambda outcome: None,
) -> None:
    """Send each request at its arrival time, in seconds from now, with at most `max_concurrency` in flight.

    Fills `run`, which also holds what has ended when this is cancelled.
    """
    free = asyncio.Semaphore(max_concurrency) if max_concurrency else contextlib.nullcontext()
    # Bodies are encoded beforehand: during the run, that would delay the events of other requests.
    bodies = [encode(target, request) for request in requests]

    async def send_one(request: Request, body: bytes) -> None:
        async with free:
            outcome = await send(target, request, body)
        run.outcomes.append(outcome)
        on_end(outcome)

    run.started = time.perf_counter()
    try:
        async with asyncio.TaskGroup() as group:
            for request, body, arrival in sorted(
                zip(requests, bodies, arrivals, strict=True), key=lambda one: one[2]
            ):
                if (wait := run.started + arrival - time.perf_counter()) > 0:
                    await asyncio.sleep(wait)
                group.create_task(send_one(request, body))
    finally:
        run.ended = time.perf_counter()


def encode(target: Target, request: Request) -> bytes:
    """A request's body."""
    body = target.endpoint.body(request.prompt, request.output_tokens) | target.fields
    return json.dumps(body, separators=(",", ":")).encode()


async def send(target: Target, request: Request, body: bytes) -> Outcome:
    """Send a request and read its response. Failures are in the outcome."""
    outcome = Outcome(request, started=time.perf_counter())
    try:
        async with target.client.request("POST", target.path, body) as response:
            if response.status == 200:
                await _read_stream(response, target.endpoint, outcome)
            else:
                outcome.error = await _refusal(response)
    except (HttpError, EventError) as error:
        outcome.error = str(error)
    return outcome


async def _read_stream(response: Response, endpoint: Endpoint, outcome: Outcome) -> None:
    stream, texts, finished = EventStream(), [], False
    while piece := await response.read():
        now = time.perf_counter()
        for data in stream.feed(piece):
            if data == b"[DONE]":
                finished = True
                continue
            event = read_event(endpoint, _parsed(data))
            if event.output:
                outcome.times.append(now)
                texts.append(event.text)
            if event.output or event.finished:
                outcome.ended = now
            finished = finished or event.finished
            if event.output_tokens is not None:
                outcome.input_tokens, outcome.output_tokens = event.input_tokens, event.output_tokens
    outcome.text = "".join(texts)
    if not finished:
        raise EventError("the stream ended before the output did")
    if not outcome.ended:
        raise EventError("the stream ended without output")
    # Output may be empty, such as when the first token ends it.
    outcome.times = outcome.times or [outcome.ended]


def _parsed(data: bytes) -> Any:
    try:
        return json.loads(data.decode())
    except (ValueError, RecursionError):
        raise EventError(f"expected an event of JSON, found {data!r:.120}") from None


async def _refusal(response: Response) -> str:
    """The reason of a response that is not 200."""
    body = await response.read_all()
    try:
        message = error_message(json.loads(body))
    except (ValueError, AttributeError, RecursionError):
        message = None
    text = message or " ".join(body.decode(errors="replace").split())
    return f"HTTP {response.status}: {text[:300]}" if text else f"HTTP {response.status}"


@contextlib.contextmanager
def cpu_share(found: dict[str, float]) -> Iterator[None]:
    """Put this process's share of a CPU core during the block into `found["client_cpu_share"]`."""
    cpu, wall = time.process_time(), time.perf_counter()
    try:
        yield
    finally:
        found["client_cpu_share"] = (time.process_time() - cpu) / (time.perf_counter() - wall)
