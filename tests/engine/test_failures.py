"""Failures and interrupts at any point of a step concern the requests of that step alone."""

import random
from collections.abc import Callable, Iterator
from typing import Any

import jax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptoss_jax.checkpoints.loading import random_model
from gptoss_jax.engine.engine import Engine
from gptoss_jax.types import SamplingParams
from tests.engine.schedules import OPTIONS, TINY, Requests, assert_empty, greedy_requests, in_each_part, play, tiny

POINTS = ("plan", "prepare", "start", "lost", "read")
"""Where a step may fail; `lost` is a start that fails after the device has taken over the state."""


class Broken(Exception):
    """A failure of the device, or of the compiler."""


class Faults:
    """Makes an engine fail or be interrupted at random points; `concerned` are the requests that may fail for it."""

    def __init__(self, engine: Engine, rng: random.Random, rate: float) -> None:
        self.engine, self.rng, self.rate = engine, rng, rate
        self.concerned: set[str] = set()
        self.failures = self.interrupts = 0

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        scheduler, runner = self.engine._scheduler, self.engine._runner
        monkeypatch.setattr(scheduler, "plan", self.before(scheduler.plan, "plan"))
        monkeypatch.setattr(runner, "prepare", self.before(runner.prepare, "prepare"))
        monkeypatch.setattr(runner, "start", self.before(self.losing(runner.start), "start"))
        monkeypatch.setattr(jax, "device_get", self.before(jax.device_get, "read"))

    def before(self, function: Callable[..., Any], point: str) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            if self.rng.random() < self.rate:
                # An interrupt waits while a launch starts, and planning does not fail.
                if point == "plan" or (point != "start" and self.rng.random() < 0.5):
                    self.interrupts += 1
                    raise KeyboardInterrupt
                self.fail(args, point)
            return function(*args)

        return run

    def losing(self, start: Callable[..., Any]) -> Callable[..., Any]:
        def run(launched: Any) -> None:
            start(launched)
            if self.rng.random() < self.rate:
                for array in jax.tree.leaves(self.engine._runner._state):
                    array.delete()
                self.fail((launched,), "lost")

        return run

    def fail(self, args: tuple[Any, ...], point: str) -> None:
        self.failures += 1
        if point in ("lost", "read"):
            flying = [work for launched in self.engine._flying for work in launched.plan.work]
            self.concerned |= {work.sequence.request_id for work in flying}
        if point != "read":
            plan = args[0] if point == "prepare" else args[0].plan
            self.concerned |= {work.sequence.request_id for work in plan.work}
        raise Broken(point)


def play_through(engine: Engine, requests: Requests, rng: random.Random, faults: Faults) -> dict[str, list[int]]:
    """The tokens of each request that did not fail; interrupted calls are repeated."""
    out: dict[str, list[int]] = {name: [] for name in requests}
    waiting, failed = list(requests), set()
    while waiting or engine.unfinished:
        for _ in range(rng.choice([0, 0, 1, 3])):
            if waiting:
                name = waiting.pop()
                engine.add(name, *requests[name])
        try:
            events = engine.step()
        except KeyboardInterrupt:
            continue
        for event in events:
            assert event.request_id not in failed
            if event.error is not None:
                assert isinstance(event.error, Broken)
                assert event.request_id in faults.concerned
                failed.add(event.request_id)
            else:
                out[event.request_id].append(event.token_id)
    return {name: tokens for name, tokens in out.items() if name not in failed}


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
