"""Random arrivals and cancellations for an engine; `python -m tests.engine.schedules` runs one in several processes."""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import sys
from functools import cache
from typing import Any

import pytest

from gptoss_jax.checkpoints.loading import random_model
from gptoss_jax.commands.flags import add_cluster_flags
from gptoss_jax.commands.running import run_command
from gptoss_jax.engine.engine import Engine
from gptoss_jax.engine.leading import LeadingEngine, follow
from gptoss_jax.engine.options import EngineOptions
from gptoss_jax.engine.scheduler import Rank
from gptoss_jax.model.config import ModelConfig
from gptoss_jax.model.gpt_oss import GptOss
from gptoss_jax.types import SamplingParams
from tests.engine.faults import Faults, Requests, play_through

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
OPTIONS = EngineOptions(
    max_num_seqs=4, page_size=8, long_prefill_token_threshold=16, max_num_batched_tokens=32, kv_cache_memory=78_000
)
"""A cache of 12 pages of TINY, all of which one request may need, so that sequences are preempted."""

SOAK = dataclasses.replace(
    OPTIONS, page_size=24, max_num_batched_tokens=16, num_speculative_tokens=3, kv_cache_memory=160_000
)
"""A cache of six pages, of which a request may need four, and speculative decoding."""

ALONE = EngineOptions(max_num_seqs=1, page_size=32, long_prefill_token_threshold=128, max_num_batched_tokens=128)
"""One sequence at a time, with its prompt in one chunk."""

Tokens = dict[str, dict[int, list[int]]]
"""The tokens of each completion of each request."""


@cache
def tiny() -> GptOss:
    """TINY on one device."""
    return random_model(TINY, dtype="float32")


def in_each_part(options: EngineOptions, model: GptOss) -> EngineOptions:
    """Options that give each data-parallel rank of the model's mesh the slots and pages of `options` on one device."""
    parts, shares = model.partition.degree("batch"), model.partition.degree("kv_heads")
    memory = options.kv_cache_memory
    assert memory is not None
    return dataclasses.replace(
        options, max_num_seqs=options.max_num_seqs * parts, kv_cache_memory=memory // shares
    )


def prompts(seed: int, count: int, vocab: int = 96) -> list[list[int]]:
    """Prompts of mixed lengths, half of which share a prefix."""
    rng = random.Random(seed)
    shared = [rng.randrange(vocab) for _ in range(40)]
    return [
        shared[: rng.randint(0, 40) * rng.randint(0, 1)]
        + [rng.randrange(vocab) for _ in range(rng.randint(1, 30))]
        for _ in range(count)
    ]


def greedy_requests(seed: int, count: int, vocab: int = 96) -> Requests:
    """Requests for up to 20 greedily sampled tokens."""
    rng = random.Random(seed)
    return {
        str(i): (prompt, SamplingParams(max_tokens=rng.randint(1, 20), temperature=0))
        for i, prompt in enumerate(prompts(seed, count, vocab))
    }


def soak_requests(seed: int, count: int) -> Requests:
    """Requests of several kinds, for up to 12 tokens.

    Requests with further options ask for all of them together, since each combination is a step shape to compile.
    """
    rng = random.Random(seed)
    kinds: tuple[dict[str, Any], ...] = (
        {"temperature": 0},
        {"temperature": 0, "n": 2},
        {"temperature": 0, "stop_token_ids": [5, 6, 7]},
        {
            "temperature": 0.8,
            "top_p": 0.9,
            "n": 3,
            "repetition_penalty": 1.2,
            "frequency_penalty": 0.5,
            "logit_bias": {7: 2.0},
            "logprobs": 2,
        },
    )
    return {
        str(i): (prompt, SamplingParams(max_tokens=rng.randint(1, 12), seed=i, **rng.choice(kinds)))
        for i, prompt in enumerate(prompts(seed, count))
    }


def play(
    engine: Engine | LeadingEngine, requests: Requests, rng: random.Random, cancels: float = 0.05
) -> tuple[Tokens, set[str]]:
    """The tokens of each completion, and the cancelled requests; arrivals and cancellations are random."""
    out: Tokens = {name: {} for name in requests}
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
            assert (event.logprobs is None) == (requests[event.request_id][1].logprobs is None)
            out[event.request_id].setdefault(event.index, []).append(event.token_id)
    return out, cancelled


def assert_as_alone(engine: Engine, requests: Requests, out: Tokens, cancelled: set[str]) -> None:
    """Each completion equals that of the request run alone on this engine; a cancelled one equals its beginning."""
    for name, request in requests.items():
        forget(engine)
        own, _ = play(engine, {name: request}, random.Random(0), cancels=0)
        if name in cancelled:
            own[name] = {index: own[name][index][: len(tokens)] for index, tokens in out[name].items()}
        assert out[name] == own[name], name


def overcommit(engine: Engine) -> Engine:
    """The engine, which from now on admits sequences although running ones will need their pages."""
    scheduler = engine._scheduler
    scheduler._expected = lambda sequence: scheduler.limits.blocks(sequence.known_length + 1)  # type: ignore[method-assign]
    return engine


def forget(engine: Engine) -> None:
    """Empty the prefix cache of an idle engine."""
    scheduler = engine._scheduler
    assert not any(rank.running for rank in scheduler.ranks)
    scheduler.ranks = [Rank(rank.number, rank.limits) for rank in scheduler.ranks]


def assert_empty(engine: Engine) -> None:
    """No request holds anything: all pages of both pools are free."""
    assert engine.unfinished == engine.load.waiting == engine.load.running == 0
    for rank in engine._scheduler.ranks:
        for pool in (rank.pages, rank.sliding):
            assert pool.available == pool.size
            assert not any(pool._holders)
    assert not engine._constraints
    assert not engine._prompt_logprobs
    while engine._flying:
        assert engine.step() == []


def main(arguments: list[str] | None = None) -> int:
    """One of several processes that run one schedule over a mesh of all their devices."""
    from sharding.processes import start
    from sharding.processes.membership import membership
    from sharding.processes.secret import cluster_secret

    parser = argparse.ArgumentParser()
    add_cluster_flags(parser)
    parser.add_argument("--mesh")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--faults", choices=("alike", "alone"), help="which processes fail: all alike, or one alone"
    )
    parser.add_argument("--soak", type=int, help="a soak of so many requests instead of 24 greedy ones")
    options = parser.parse_args(arguments)
    member = membership(options.coordinator_address, options.num_processes, options.process_id)
    cluster = start(member, secret=cluster_secret(options.cluster_secret_file))
    cluster.agree({})
    cluster.initialize_jax()
    model = random_model(TINY, options.mesh, dtype="float32")
    engine = overcommit(Engine(model, in_each_part(SOAK if options.soak else OPTIONS, model)))
    if options.faults:
        # All draw the same numbers.
        rate = 0.0 if options.faults == "alone" and cluster.is_leader else 0.05
        faults = Faults(engine, random.Random(options.seed), rate, interrupts=False)
        faults.install(pytest.MonkeyPatch())
    if not cluster.is_leader:
        follow(engine, cluster)
        assert_empty(engine)
        return cluster.exit_code
    seed, soak = options.seed, options.soak
    requests = soak_requests(seed, soak) if soak else greedy_requests(seed, 24)
    leading = LeadingEngine(engine, cluster)
    if options.faults:
        json.dump({"out": play_through(leading, requests, random.Random(seed), faults)}, sys.stdout)
        assert_empty(engine)
        return 0
    out, cancelled = play(leading, requests, random.Random(seed), cancels=0.2 if soak else 0.05)
    assert_empty(engine)
    found = {"out": out, "cancelled": sorted(cancelled), "load": dataclasses.asdict(engine.load)}
    json.dump(found, sys.stdout)
    return 0


if __name__ == "__main__":
    run_command(main)
