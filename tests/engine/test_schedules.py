"""With random arrivals and cancellations on any mesh, requests get the tokens they get alone, and free all memory."""

import dataclasses
import json
import random
from functools import cache
from typing import Any

import pytest

from gptoss_jax.checkpoints.loading import load_model, random_model
from gptoss_jax.engine.engine import Engine
from tests.engine.schedules import (
    ALONE,
    OPTIONS,
    SOAK,
    TINY,
    Requests,
    Tokens,
    assert_as_alone,
    assert_empty,
    greedy_requests,
    in_each_part,
    overcommit,
    play,
    soak_requests,
    tiny,
)
from tests.sharding.test_processes import Outcome, Processes

MESHES = ("data=2,expert=2,tensor=2", "data=4,tensor=2", "expert=4,tensor=2", "expert=8")
TELLING = ("data=2,expert=2,tensor=2", "expert=8")
"""A mesh with all three axes, and one with expert parallelism only, where the all-to-all may be used."""


@cache
def alone() -> Engine:
    return Engine(tiny(), ALONE)


@cache
def embedded_alone() -> Engine:
    return Engine(load_model(dtype="float32"), ALONE, eos_token_ids=())


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh", [mesh if mesh in TELLING else pytest.param(mesh, marks=pytest.mark.long) for mesh in MESHES]
)
def test_a_schedule_over_a_mesh(mesh: str) -> None:
    model = random_model(TINY, mesh, dtype="float32")
    engine = overcommit(Engine(model, in_each_part(OPTIONS, model)))
    for seed in (1, 2):
        before, requests = engine.load.preemptions, greedy_requests(seed, 24)
        assert_as_alone(alone(), requests, *play(engine, requests, random.Random(seed)))
        assert engine.load.preemptions > before
        assert_empty(engine)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [None, pytest.param("data=2,expert=2,tensor=2", marks=pytest.mark.long)])
def test_a_schedule_of_the_embedded_model(mesh: str | None) -> None:
    """Runs with 12 pages, all of which one request may need."""
    options = dataclasses.replace(OPTIONS, kv_cache_memory=1_580_000)
    model = load_model(mesh=mesh, dtype="float32")
    engine = overcommit(Engine(model, in_each_part(options, model), eos_token_ids=()))
    for seed in (3, 4):
        before, requests = engine.load.preemptions, greedy_requests(seed, 24, model.config.vocab_size)
        assert_as_alone(embedded_alone(), requests, *play(engine, requests, random.Random(seed)))
        assert engine.load.preemptions > before
        assert_empty(engine)


def over_two_processes(*arguments: str) -> tuple[Tokens, set[str], dict[str, Any]]:
    """The tokens, the cancelled requests and the final load of a schedule run by processes of four devices each."""
    ends = Processes(2, 4, "tests.engine.schedules", *arguments).outcomes(300)
    assert [end.code for end in ends] == [0, 0], ends
    found = json.loads(ends[0].out)
    out = {name: {int(index): tokens for index, tokens in own.items()} for name, own in found["out"].items()}
    return out, set(found["cancelled"]), found["load"]


@pytest.mark.slow
def test_a_schedule_over_two_processes() -> None:
    out, cancelled, load = over_two_processes("--mesh", "expert=8", "--seed", "5")
    assert load["preemptions"] > 0
    assert_as_alone(alone(), greedy_requests(5, 24), out, cancelled)


def assert_soaked(requests: Requests, out: Tokens, cancelled: set[str], load: dict[str, Any]) -> None:
    """Many requests were cancelled, preempted and drafted for, no page is held, and the last schedule is unaffected."""
    assert len(cancelled) > len(requests) / 20
    assert load["preemptions"] > 0
    assert load["drafted"] > 0
    assert load["pages_used"] == 0
    assert all(len(out[name]) == params.n for name, (_, params) in requests.items() if name not in cancelled)
    last = dict(list(requests.items())[:300])
    assert_as_alone(alone(), last, out, cancelled)


@pytest.mark.slow
def test_a_soak_leaves_nothing_behind() -> None:
    """Runs 2000 requests of several kinds, many of which are cancelled."""
    requests = soak_requests(6, 2000)
    engine = overcommit(Engine(tiny(), SOAK))
    out, cancelled = play(engine, requests, random.Random(6), cancels=0.2)
    assert_empty(engine)
    assert engine.load.accepted > 0
    assert_soaked(requests, out, cancelled, dataclasses.asdict(engine.load))


@pytest.mark.long
def test_a_soak_over_a_mesh() -> None:
    model = random_model(TINY, "data=2,expert=2,tensor=2", dtype="float32")
    engine = overcommit(Engine(model, in_each_part(SOAK, model)))
    requests = soak_requests(7, 200)
    out, cancelled = play(engine, requests, random.Random(7), cancels=0.2)
    assert_empty(engine)
    assert engine.load.accepted > 0
    assert_soaked(requests, out, cancelled, dataclasses.asdict(engine.load))


@pytest.mark.long
def test_a_soak_over_two_processes() -> None:
    found = over_two_processes("--mesh", "data=2,expert=2,tensor=2", "--seed", "8", "--soak", "100")
    assert_soaked(soak_requests(8, 100), *found)


def with_faults(which: str) -> list[Outcome]:
    """The outcomes of two processes; both of them, or only the second, fail at random points of a schedule."""
    arguments = ("--mesh", "expert=8", "--seed", "7", "--faults", which)
    return Processes(2, 4, "tests.engine.schedules", *arguments).outcomes(300)


@pytest.mark.slow
def test_failures_that_all_processes_see_alike_concern_their_own_requests() -> None:
    """Launches fail at random points on both processes, and all other requests get their tokens."""
    ends = with_faults("alike")
    assert [end.code for end in ends] == [0, 0], ends
    out = {name: {0: tokens} for name, tokens in json.loads(ends[0].out)["out"].items()}
    requests = greedy_requests(7, 24)
    assert 0 < len(out) < len(requests)
    assert_as_alone(alone(), {name: requests[name] for name in out}, out, set())


@pytest.mark.slow
def test_a_failure_that_one_process_sees_ends_the_job() -> None:
    ends = with_faults("alone")
    assert [end.code for end in ends] == [2, 2], ends
    assert "does not have the same as process 1: failure: Broken after " in ends[1].err
