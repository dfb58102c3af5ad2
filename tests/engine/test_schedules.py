"""Whatever is added and cancelled when, on whatever mesh: the tokens are a request's own, and nothing is left of it."""

import dataclasses
import json
import random
from functools import cache

import numpy as np
import pytest
from flax import nnx

from gptoss_jax.engine.engine import Engine, EngineOptions
from gptoss_jax.engine.params import SamplingParams
from gptoss_jax.loading import load_model, random_model
from gptoss_jax.model import GptOss
from tests.engine.schedules import OPTIONS, TINY, Requests, assert_empty, greedy_requests, play, prompts
from tests.test_multihost import Processes

MESHES = ("data=2,expert=2,tensor=2", "data=4,tensor=2", "expert=4,tensor=2", "expert=8")


@cache
def tiny() -> GptOss:
    return random_model(TINY, dtype="float32")


def assert_own_tokens(
    model: GptOss, requests: Requests, out: dict[str, dict[int, list[int]]], cancelled: set[str]
) -> None:
    """Each token is the likeliest after those before it, up to a near-tie, and none is missing."""
    forward = nnx.jit(lambda model, tokens: model(tokens))
    for name, (prompt, params) in requests.items():
        tokens = out[name].get(0, [])
        assert name in cancelled or len(tokens) == params.max_tokens
        padded = np.zeros((1, 128), np.int32)
        padded[0, : len(prompt) + len(tokens)] = prompt + tokens
        logits = np.asarray(forward(model, padded)[0])
        for index, token in enumerate(tokens):
            row = logits[len(prompt) + index - 1]
            assert row[token] >= row.max() - 2e-4


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
def test_a_schedule_over_a_mesh(mesh: str) -> None:
    engine = Engine(random_model(TINY, mesh, dtype="float32"), OPTIONS)
    for seed in (1, 2):
        requests = greedy_requests(seed, 16)
        assert_own_tokens(tiny(), requests, *play(engine, requests, random.Random(seed)))
        assert_empty(engine)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [None, "data=2,expert=2,tensor=2"])
def test_a_schedule_of_the_embedded_model(mesh: str | None) -> None:
    options = EngineOptions(max_batch=4, page_size=16, prefill_chunk=16, step_tokens=32, kv_cache_memory=3_000_000)
    engine = Engine(load_model(mesh=mesh, dtype="float32"), options, eos_token_ids=())
    model = load_model(dtype="float32")
    for seed in (3, 4):
        requests = greedy_requests(seed, 12, model.config.vocab_size)
        assert_own_tokens(model, requests, *play(engine, requests, random.Random(seed)))
        assert_empty(engine)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["data=2,expert=2,tensor=2", "expert=8"])
def test_a_schedule_over_two_processes(mesh: str) -> None:
    ends = Processes(2, 4, "tests.engine.schedules", "--mesh", mesh, "--seed", "5").outcomes(300)
    assert [end.code for end in ends] == [0, 0], ends
    found = json.loads(ends[0].out)
    out = {name: {int(index): tokens for index, tokens in own.items()} for name, own in found["out"].items()}
    assert_own_tokens(tiny(), greedy_requests(5, 16), out, set(found["cancelled"]))


@pytest.mark.slow
def test_a_soak_leaves_nothing_behind() -> None:
    """2000 requests of several kinds, many of which are cancelled."""
    rng = random.Random(6)
    # Prompts of one sequence a step, so that few kinds of step are compiled.
    engine = Engine(tiny(), dataclasses.replace(OPTIONS, step_tokens=16))
    kinds = (
        {"temperature": 0},
        {"temperature": 1.0, "top_p": 0.9, "seed": 1},
        {"temperature": 1.0, "top_p": 0.9, "n": 3},
        {"temperature": 0, "stop_token_ids": [5, 6, 7]},
    )
    requests: Requests = {
        str(i): (prompt, SamplingParams(max_tokens=rng.randint(1, 12), **rng.choice(kinds)))
        for i, prompt in enumerate(prompts(6, 2000))
    }
    out, cancelled = play(engine, requests, rng, cancels=0.2)
    assert len(cancelled) > 100
    assert all(len(out[name]) == params.n for name, (_, params) in requests.items() if name not in cancelled)
    assert engine.load.preemptions > 0
    assert_empty(engine)
    # Once more what was greedy, alone: nothing that came between has spoilt the cache.
    some = {name: requests[name] for name in list(requests)[:40] if requests[name][1].temperature == 0}
    again, _ = play(engine, some, random.Random(0), cancels=0)
    for name in some:
        assert name in cancelled or again[name] == out[name]
