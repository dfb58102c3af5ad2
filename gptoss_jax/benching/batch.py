"""A batch of alike requests in the engine."""

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
class Case:
    """How many requests run together, and how long their prompts and outputs are."""

    batch: int
    prompt_tokens: int
    output_tokens: int


def start(engine: Engine, params: SamplingParams, case: Case, rng: np.random.Generator) -> None:
    """Add all requests, each with as many new tokens as are looked at afterwards."""
    # Those that are prefilled first must still run when the last one has been.
    chunks = case.batch * -(-case.prompt_tokens // engine.pace.long_prefill_token_threshold)
    ahead = chunks * (1 + engine.options.num_speculative_tokens)
    room = engine.max_model_len - case.prompt_tokens
    after = 2 * TRACED_STEPS * engine.pace.num_decode_steps
    most = min(case.output_tokens * (1 + engine.options.num_speculative_tokens) + ahead + after, room)
    params = dataclasses.replace(params, max_tokens=most)
    for i in range(case.batch):
        engine.add(str(i), random_prompt(rng, engine.config.vocab_size, case.prompt_tokens), params)


def prefill(engine: Engine, case: Case) -> dict[str, float]:
    """Step until every request has a token; when each had its first."""
    first: dict[str, float] = {}
    while len(first) < case.batch:
        events = engine.step()
        now = time.perf_counter()
        for event in events:
            first.setdefault(event.request_id, now)
    return first


def stop(engine: Engine, case: Case) -> None:
    """Cancel all requests."""
    for i in range(case.batch):
        engine.cancel(str(i))
    while engine.unfinished:
        engine.step()


@contextlib.contextmanager
def decoding(engine: Engine, params: SamplingParams, case: Case, rng: np.random.Generator) -> Iterator[None]:
    """While the block runs, all requests decode; afterwards they are cancelled, so that it may repeat a launch."""
    start(engine, params, case, rng)
    prefill(engine, case)
    for _ in range(4):
        engine.step()
    yield
    stop(engine, case)
