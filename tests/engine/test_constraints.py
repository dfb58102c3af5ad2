"""Constrained sequences: each token is the most likely allowed token, and the device does not wait for masks."""

import dataclasses
import random
from functools import cache, partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptoss_jax.checkpoints.loading import random_model
from gptoss_jax.engine.engine import Engine
from gptoss_jax.engine.options import EngineOptions
from gptoss_jax.engine.runner import Launched
from gptoss_jax.model.gpt_oss import GptOss
from gptoss_jax.types import SamplingParams, Scope, StructuredOutputsParams
from tests.engine.schedules import TINY, Requests, assert_empty, in_each_part, overcommit, play, prompts
from tests.engine.test_engine import logits_before

OPTIONS = EngineOptions(
    max_num_seqs=4,
    page_size=32,
    long_prefill_token_threshold=16,
    max_num_batched_tokens=16,
    kv_cache_memory=230_000,
)
"""Eight pages, so that sequences are preempted."""


class Third:
    """Allows a third of the tokens, which depends on all previous tokens; appends its calls to `log`."""

    def __init__(self, seed: int, log: list[str] | None = None) -> None:
        self._state, self._log = seed, [] if log is None else log

    @property
    def allowed(self) -> np.ndarray:
        return (np.arange(TINY.vocab_size) * 7 + self._state) % 3 == 0

    def fill(self, bitmask: np.ndarray) -> None:
        assert (bitmask == 0xFFFFFFFF).all()
        bitmask[:] = np.packbits(self.allowed, bitorder="little").view(np.uint32)
        self._log.append("fill")

    def accept(self, token: int) -> None:
        assert self.allowed[token]
        self._state = (self._state * 31 + token + 1) % 1009
        self._log.append("accept")


def third(params: StructuredOutputsParams | None, scope: Scope, log: list[str] | None = None) -> Third:
    return Third(int((params and params.regex) or 0), log)


@cache
def tiny() -> GptOss:
    return random_model(TINY, dtype="float32")


@cache
def engine() -> Engine:
    return overcommit(Engine(tiny(), OPTIONS, constrain=third))


def constrained(seed: int, **more: object) -> SamplingParams:
    form = StructuredOutputsParams(regex=str(seed))
    return SamplingParams(**{"max_tokens": 8, "temperature": 0, "structured_outputs": form} | more)


def requests(seed: int, count: int) -> Requests:
    """Constrained requests, some of which end early, among unconstrained ones."""
    rng = random.Random(seed)
    kinds = (
        constrained(seed, n=2),
        constrained(seed + 1, stop_token_ids=list(range(0, 96, 5))),
        SamplingParams(max_tokens=8, temperature=0),
    )
    return {
        str(i): (prompt, dataclasses.replace(rng.choice(kinds), max_tokens=rng.randint(1, 30)))
        for i, prompt in enumerate(prompts(seed, count))
    }


def assert_right(prompt: list[int], params: SamplingParams, tokens: list[int], whole: bool = True) -> None:
    """Each token is the most likely of those allowed after its predecessors, up to near-ties."""
    constraint = third(params.structured_outputs, "text") if params.structured_outputs else None
    generated = np.zeros(TINY.vocab_size, bool)
    for row, token in zip(logits_before(tiny(), prompt, tokens), tokens, strict=True):
        row = row - params.presence_penalty * generated
        if constraint is not None:
            row[~constraint.allowed] = -np.inf
            constraint.accept(token)
        assert row[token] >= row.max() - 2e-4
        generated[token] = True
    ended = [token in params.stop_token_ids for token in tokens]
    assert not any(ended[:-1])
    assert not whole or ended[-1] or len(tokens) == params.max_tokens


def assert_all_right(todo: Requests, out: dict[str, dict[int, list[int]]], cancelled: set[str]) -> None:
    for name, (prompt, params) in todo.items():
        assert name in cancelled or len(out[name]) == params.n
        for tokens in out[name].values():
            assert_right(prompt, params, tokens, whole=name not in cancelled)


@pytest.mark.slow
@settings(max_examples=10)
@given(st.integers(0, 10**6))
def test_any_schedule_gives_the_likeliest_of_the_tokens_allowed(seed: int) -> None:
    todo = requests(seed, 10)
    out, cancelled = play(engine(), todo, random.Random(seed), cancels=0.1)
    assert_empty(engine())
    assert_all_right(todo, out, cancelled)


@pytest.mark.slow
def test_constraints_hold_through_preemption() -> None:
    before = engine().load.preemptions
    todo = {str(i): (prompt, constrained(i, max_tokens=40)) for i, prompt in enumerate(prompts(0, 6))}
    out, cancelled = play(engine(), todo, random.Random(0), cancels=0)
    assert engine().load.preemptions > before
    assert_all_right(todo, out, cancelled)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["data=2,expert=2,tensor=2", pytest.param("expert=8", marks=pytest.mark.long)])
def test_a_schedule_over_a_mesh(mesh: str) -> None:
    model = random_model(TINY, mesh, dtype="float32")
    spread = Engine(model, in_each_part(OPTIONS, model), constrain=third)
    todo = requests(3, 12)
    out, cancelled = play(spread, todo, random.Random(3))
    assert_empty(spread)
    assert_all_right(todo, out, cancelled)


@pytest.mark.parametrize("stopped", [False, True])
def test_the_next_forward_pass_is_launched_before_masks_are_requested(
    stopped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    log: list[str] = []
    start = engine()._runner.start

    def started(step: Launched) -> None:
        start(step)
        assert step.outputs is None
        log.append("pass")

    monkeypatch.setattr(engine()._runner, "start", started)
    monkeypatch.setattr(engine(), "_constrain", partial(third, log=log))
    asked = constrained(1, max_tokens=4, stop_token_ids=list(range(96)) if stopped else [])
    play(engine(), {"a": ([1, 2, 3], asked)}, random.Random(0), cancels=0)
    # A forward pass made void by a stop token has no mask.
    rest = ["pass", "accept"] if stopped else ["pass", "accept", "fill"] * 3 + ["accept"]
    assert log == ["pass", "fill", *rest]


def test_everything_is_launched_between_steps() -> None:
    """Requests can thus be cancelled between steps, and the last step can be measured."""
    for name in "ab":
        engine().add(name, [1, 2, 3], constrained(1, max_tokens=30))
    for _ in range(4):
        engine().step()
        assert engine()._flying
        assert engine()._flying[-1].outputs is not None
    assert engine().cancel("a")
    engine().step()
    assert engine().replay(2) > 0
    assert engine().program()[0].count("HloModule") == 2
    assert engine().cancel("b")
    assert_empty(engine())


def test_only_penalties_need_counts() -> None:
    counting = Engine(tiny(), OPTIONS, constrain=third)
    for more, counted in (({}, False), ({"presence_penalty": 2.0}, True)):
        request = ([1, 2, 3], constrained(1, max_tokens=30, **more))
        out, _ = play(counting, {"a": request}, random.Random(0), cancels=0)
        assert_right(*request, out["a"][0])
        assert (counting._runner._generated.counts is not None) == counted
