"""Random arrivals and cancels for an engine; `python -m tests.engine.schedules` plays one in several processes."""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Mapping
from typing import Any

from gptoss_jax import cli
from gptoss_jax.config import ModelConfig
from gptoss_jax.engine.engine import Engine, EngineOptions
from gptoss_jax.engine.leading import LeadingEngine, follow
from gptoss_jax.engine.params import SamplingParams
from gptoss_jax.loading import random_model

TINY = ModelConfig(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    num_local_experts=5,
    num_experts_per_tok=2,
    sliding_window=7,
    layer_types=("sliding_attention", "full_attention"),
    max_position_embeddings=512,
    eos_token_id=(),
)
OPTIONS = EngineOptions(max_batch=4, page_size=4, prefill_chunk=16, step_tokens=32, kv_cache_memory=60_000)
"""Few pages, so that sequences are pre-empted."""

Requests = Mapping[str, tuple[list[int], SamplingParams]]


def prompts(seed: int, count: int, vocab: int = 96) -> list[list[int]]:
    """Prompts of mixed lengths, half of which begin alike."""
    rng = random.Random(seed)
    shared = [rng.randrange(vocab) for _ in range(40)]
    return [
        shared[: rng.randint(0, 40) * rng.randint(0, 1)]
        + [rng.randrange(vocab) for _ in range(rng.randint(1, 30))]
        for _ in range(count)
    ]


def greedy_requests(seed: int, count: int, vocab: int = 96) -> Requests:
    """Requests for up to 20 of the likeliest tokens."""
    rng = random.Random(seed)
    return {
        str(i): (prompt, SamplingParams(max_tokens=rng.randint(1, 20), temperature=0))
        for i, prompt in enumerate(prompts(seed, count, vocab))
    }


def play(
    engine: Engine | LeadingEngine, requests: Requests, rng: random.Random, cancels: float = 0.05
) -> tuple[dict[str, dict[int, list[int]]], set[str]]:
    """The tokens of each request's completions, and who was cancelled; arrivals and cancels are at random moments."""
    out: dict[str, dict[int, list[int]]] = {name: {} for name in requests}
    waiting, cancelled = list(requests), set()
    added: list[str] = []
    while waiting or engine.unfinished:
        for _ in range(rng.choice([0, 0, 1, 3])):
            if waiting and engine.unfinished < 30:
                name = waiting.pop()
                engine.add(name, *requests[name])
                added.append(name)
        if added and rng.random() < cancels:
            victim = rng.choice(added[-20:])
            if engine.cancel(victim):
                cancelled.add(victim)
        for event in engine.step():
            assert event.request_id not in cancelled
            out[event.request_id].setdefault(event.index, []).append(event.token_id)
    return out, cancelled


def assert_empty(engine: Engine) -> None:
    """Nothing is left of any request: every page, ring and slot counts as free."""
    assert engine.unfinished == engine.load.waiting == engine.load.running == 0
    for part in engine._scheduler.parts:
        for pool in (part.prefixes.pages, part.prefixes.rings):
            assert pool.available == pool.size
            assert not any(pool._holders)
        assert sorted(part._free_slots) == list(range(engine.shape.slots))
    assert not engine._constraints
    assert not engine._prompt_logprobs
    while engine._in_flight:
        assert engine.step() == []


def main(arguments: list[str] | None = None) -> int:
    """One of several processes, that play one schedule over a mesh of all their devices."""
    from sharding.membership import membership
    from sharding.multihost import start

    parser = argparse.ArgumentParser()
    cli.add_cluster_flags(parser)
    parser.add_argument("--mesh")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    cluster = start(membership(options.coordinator_address, options.num_processes, options.process_id))
    cluster.agree({})
    cluster.initialize_jax()
    engine = Engine(random_model(TINY, options.mesh, dtype="float32"), OPTIONS)
    if not cluster.is_leader:
        follow(engine, cluster)
        assert_empty(engine)
        return cluster.exit_code
    requests: Any = greedy_requests(options.seed, 16)
    out, cancelled = play(LeadingEngine(engine, cluster), requests, random.Random(options.seed))
    assert_empty(engine)
    json.dump({"out": out, "cancelled": sorted(cancelled), "preemptions": engine.load.preemptions}, sys.stdout)
    return 0


if __name__ == "__main__":
    cli.run(main)
