"""Failures and interrupts at any point of a step concern the requests of that step alone."""

import random
from collections.abc import Iterator
from typing import Any

import jax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptoss_jax.checkpoints.loading import random_model
from gptoss_jax.engine.engine import Engine
from gptoss_jax.types import SamplingParams
from tests.engine.faults import Broken, Faults, play_through
from tests.engine.schedules import OPTIONS, TINY, Requests, assert_empty, greedy_requests, in_each_part, play, tiny

POINTS = ("plan", "prepare", "start", "lost", "read")
"""Where a step may fail; `lost` is a start that fails after the device has taken over the state."""


def check(engine: Engine, requests: Requests, seed: int, rate: float, monkeypatch: pytest.MonkeyPatch) -> Faults:
    with monkeypatch.context() as patch:
        faults = Faults(engine, random.Random(seed), rate)
        faults.install(patch)
        out = play_through(engine, requests, random.Random(seed), faults)
    while engine._flying:
        engine.step()
    assert_empty(engine)
    for name, tokens in out.items():
        own, _ = play(engine, {name: requests[name]}, random.Random(0), cancels=0)
        assert own[name][0] == tokens
    return faults


@pytest.fixture(scope="module")
def engines() -> Iterator[dict[str, Engine]]:
    return {}


def engine_of(engines: dict[str, Engine], mesh: str | None) -> Engine:
    if str(mesh) not in engines:
        model = tiny() if mesh is None else random_model(TINY, mesh, dtype="float32")
        engines[str(mesh)] = Engine(model, in_each_part(OPTIONS, model))
    return engines[str(mesh)]


@pytest.mark.parametrize("mesh", [None, pytest.param("data=2,expert=2,tensor=2", marks=pytest.mark.slow)])
def test_failures_and_interrupts_change_no_other_request(
    mesh: str | None, engines: dict[str, Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, found = engine_of(engines, mesh), []

    @settings(max_examples=8)
    @given(st.integers(0, 10**6))
    def run(seed: int) -> None:
        found.append(check(engine, greedy_requests(seed, 10), seed, 0.04, monkeypatch))

    run()
    assert sum(faults.failures for faults in found) > len(found)
    assert sum(faults.interrupts for faults in found) > len(found)


@pytest.mark.parametrize("point", POINTS)
def test_a_failed_step_leaves_nothing_in_the_prefix_cache(
    point: str, engines: dict[str, Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt whose first step failed or was interrupted is computed again by the next request."""
    engine = engine_of(engines, None)
    prompt, params = [*range(60, 90)], SamplingParams(max_tokens=5, temperature=0)
    with monkeypatch.context() as patch:
        faults = Faults(engine, random.Random(0), 0.0)
        faults.install(patch)
        failing = iter([True])

        def once(*args: Any) -> float:
            return 0.0 if next(failing, False) else 1.0

        target = {"lost": "start"}.get(point, point)
        real = {"plan": engine._scheduler.plan, "prepare": engine._runner.prepare, "start": engine._runner.start}

        def fails(*args: Any) -> Any:
            if once() > 0:
                return real[target](*args) if target in real else device_get(*args)
            if point == "lost":
                real["start"](*args)
                for array in jax.tree.leaves(engine._runner._state):
                    array.delete()
            raise KeyboardInterrupt if point == "plan" else Broken(point)

        device_get = jax.device_get
        place = {"plan": engine._scheduler, "prepare": engine._runner, "start": engine._runner}.get(target, jax)
        patch.setattr(place, "device_get" if target == "read" else target, fails)
        engine.add("a", prompt, params)
        try:
            events = [event for _ in range(3) for event in engine.step()]
        except KeyboardInterrupt:
            engine.cancel("a")
            events = []
    assert [event.request_id for event in events if event.error] == ([] if point == "plan" else ["a"])
    again, _ = play(engine, {"b": (prompt, params)}, random.Random(0), cancels=0)
    fresh, _ = play(Engine(tiny(), OPTIONS), {"b": (prompt, params)}, random.Random(0), cancels=0)
    assert again == fresh
    assert_empty(engine)
