"""Failures and interrupts at random points of an engine's steps."""

import random
from collections.abc import Callable, Mapping
from typing import Any

import jax
import pytest

from gptoss_jax.engine.engine import Engine
from gptoss_jax.engine.leading import LeadingEngine
from gptoss_jax.types import SamplingParams

Requests = Mapping[str, tuple[list[int], SamplingParams]]


class Broken(Exception):
    """A failure of the device, or of the compiler."""


class Faults:
    """Makes an engine fail or be interrupted at random points; `concerned` are the requests that may fail for it."""

    def __init__(self, engine: Engine, rng: random.Random, rate: float, interrupts: bool = True) -> None:
        self.engine, self.rng, self.rate, self.interrupted = engine, rng, rate, interrupts
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
                    if self.interrupted:
                        self.interrupts += 1
                        raise KeyboardInterrupt
                    return function(*args)
                self.fail(args, point)
            return function(*args)

        return run

    def losing(self, start: Callable[..., Any]) -> Callable[..., Any]:
        def run(launched: Any) -> None:
            start(launched)
            if self.rng.random() < self.rate:
                self.engine._runner.wait()
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


def play_through(
    engine: Engine | LeadingEngine, requests: Requests, rng: random.Random, faults: Faults
) -> dict[str, list[int]]:
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
