"""A batch of equally long requests in the engine."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator

import numpy as np

from gptoss_jax.benching.workload import random_prompt
from gptoss_jax.engine.engine import Engine
from gptoss_jax.types import SamplingParams

TRACED_STEPS = 16
REPLAYED_STEPS = 32


@dataclasses.dataclass(frozen=True)
class Workload:
    """`batch` requests that run together, each with these numbers of prompt and output tokens."""

    batch: int
    prompt_tokens: int
    output_tokens: int


def start(engine: Engine, params: SamplingParams, workload: Workload, rng: np.random.Generator) -> None:
    """Add all requests, each with enough new tokens for the measurements that follow."""
    # The requests that are prefilled first must still be decoding when the last prompt has been prefilled.
    chunks = workload.batch * -(-workload.prompt_tokens // engine.pace.long_prefill_token_threshold)
    ahead = chunks * (1 + engine.options.num_speculative_tokens)
    room = engine.max_model_len - workload.prompt_tokens
    after = 2 * TRACED_STEPS * engine.pace.num_decode_steps
    most = min(workload.output_tokens * (1 + engine.options.num_speculative_tokens) + ahead + after, room)
    params = dataclasses.replace(params, max_tokens=most)
    for i in range(workload.batch):
        engine.add(str(i), random_prompt(rng, engine.config.vocab_size, workload.prompt_tokens), params)


def prefill(engine: Engine, workload: Workload) -> dict[str, float]:
    """Step until every request has a token; return the time of each request's first one, by request id."""
    first: dict[str, float] = {}
    while len(first) < workload.batch:
        events = engine.step()
        now = time.perf_counter()
        for event in events:
            first.setdefault(event.request_id, now)
    return first


def stop(engine: Engine, workload: Workload) -> None:
    """Cancel all requests."""
    for i in range(workload.batch):
        engine.cancel(str(i))
    while engine.unfinished:
        engine.step()


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
        engine.step()
    yield
    stop(engine, workload)
