"""A batch of equally long requests in the engine."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator

import numpy as np

from gptoss_jax.benching.workload import random_prompt
from gptoss_jax.engine.engine import Engine
from gptoss_jax.engine.outputs import TokenEvent
from gptoss_jax.engine.pace import Pace
from gptoss_jax.types import SamplingParams

TRACED_STEPS = 16
REPLAYED_STEPS = 32


@dataclasses.dataclass(frozen=True)
class Workload:
    """`batch` requests that run together, each with these numbers of prompt and output tokens."""

    batch: int
    prompt_tokens: int
    output_tokens: int


def new_tokens(pace: Pace, slots: int, drafts: int, workload: Workload) -> int:
    """The most tokens that a request generates in all measurements, on ranks with so many slots."""
    # The requests that are prefilled first must still be decoding when the last prompt has been prefilled. At worst the
    # prompts follow each other, in what the requests before them leave of the steps' tokens.
    chunks = 0
    for before in range(min(workload.batch, slots)):
        left = max(1, pace.token_sizes[-1] - before * (1 + drafts))
        chunks += -(-workload.prompt_tokens // min(pace.long_prefill_token_threshold, left))
    after = 2 * TRACED_STEPS * pace.num_decode_steps
    return (workload.output_tokens + chunks) * (1 + drafts) + after


def step(engine: Engine) -> list[TokenEvent]:
    """The events of the engine's next step. Raises the error of a request that failed."""
    events = engine.step()
    for event in events:
        if event.error:
            raise event.error
    return events


def start(engine: Engine, params: SamplingParams, workload: Workload, rng: np.random.Generator) -> None:
    """Add all requests, each with enough new tokens for the measurements that follow."""
    needed = new_tokens(engine.pace, engine.shape.slots, engine.options.num_speculative_tokens, workload)
    most = min(needed, engine.max_model_len - workload.prompt_tokens)
    params = dataclasses.replace(params, max_tokens=most)
    for i in range(workload.batch):
        engine.add(str(i), random_prompt(rng, engine.config.vocab_size, workload.prompt_tokens), params)


def prefill(engine: Engine, workload: Workload) -> dict[str, float]:
    """Step until every request has a token; return the time of each request's first one, by request id."""
    first: dict[str, float] = {}
    while len(first) < workload.batch:
        events = step(engine)
        now = time.perf_counter()
        for event in events:
            first.setdefault(event.request_id, now)
    return first


def stop(engine: Engine, workload: Workload) -> None:
    """Cancel all requests."""
    for i in range(workload.batch):
        engine.cancel(str(i))
    while engine.unfinished:
        step(engine)


@contextlib.contextmanager
def decoding(
    engine: Engine, params: SamplingParams, workload: Workload, rng: np.random.Generator
) -> Iterator[None]:
    """Keep all requests decoding during the block, and cancel them after it.

    The block may therefore call `Engine.replay`, which corrupts the running requests.
    """
    start(engine, params, workload, rng)
    prefill(engine, workload)
    for _ in range(4):
        step(engine)
    yield
    stop(engine, workload)
