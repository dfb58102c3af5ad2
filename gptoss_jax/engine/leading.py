"""One engine over several processes: process 0 leads, and the others repeat the calls of its engine.

Engines that receive the same calls in the same order compute the same, so only the calls are broadcast. Process 0
makes all decisions that depend on chance or time, such as seeds and cancellations.
"""

from __future__ import annotations

import contextlib
import dataclasses
import secrets
import signal
import threading
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import Any

from gptoss_jax.engine.engine import Engine, TokenEvent
from gptoss_jax.types import SamplingParams, Scope
from sharding.processes import Cluster


class LeadingEngine:
    """Process 0's engine, which broadcasts its calls to the other processes; used like an Engine."""

    def __init__(self, engine: Engine, cluster: Cluster) -> None:
        self._engine, self._cluster = engine, cluster

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def add(
        self,
        request_id: str,
        prompt_token_ids: Iterable[int],
        params: SamplingParams,
        scope: Scope = "text",
    ) -> None:
        """See Engine.add."""
        if params.seed is None:
            params = dataclasses.replace(params, seed=secrets.randbits(64))
        prompt = list(prompt_token_ids)
        self._engine.add(request_id, prompt, params, scope)
        fields = dataclasses.asdict(params)
        # JSON keys are strings, so the mapping is sent as pairs.
        fields["logit_bias"] = list((params.logit_bias or {}).items())
        tokens = [int(token) for token in prompt]
        self._tell("add", request_id=request_id, prompt=tokens, params=fields, scope=scope)

    def cancel(self, request_id: str) -> bool:
        """See Engine.cancel."""
        self._tell("cancel", request_id=request_id)
        return self._engine.cancel(request_id)

    def stop(self, request_id: str, index: int) -> None:
        """See Engine.stop."""
        self._tell("stop", request_id=request_id, index=index)
        self._engine.stop(request_id, index)

    def warm_up(self, progress: bool | None = None) -> int:
        """See Engine.warm_up."""
        self._tell("warm_up")
        return self._engine.warm_up(progress)

    def replay(self, steps: int) -> float:
        """See Engine.replay."""
        self._tell("replay", steps=steps)
        return self._engine.replay(steps)

    def step(self) -> list[TokenEvent]:
        """See Engine.step."""
        # An interrupt between the broadcast and the step would leave the other processes one step ahead.
        with _whole():
            self._tell("step")
            return self._engine.step()

    def _tell(self, call: str, **arguments: Any) -> None:
        self._cluster.broadcast({"call": call, **arguments})


@contextlib.contextmanager
def _whole() -> Iterator[None]:
    """Delay Ctrl-C until the end of the block."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pressed = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        pressed = True

    before = signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed:
        raise KeyboardInterrupt


def follow(engine: Engine, cluster: Cluster) -> None:
    """Repeat the calls of process 0's engine until it ends."""
    while (message := cluster.broadcast()) is not None:
        call = message.pop("call")
        if call == "step":
            engine.step()
        elif call == "cancel":
            engine.cancel(message["request_id"])
        elif call == "stop":
            engine.stop(message["request_id"], message["index"])
        elif call == "warm_up":
            engine.warm_up(progress=False)
        elif call == "replay":
            engine.replay(message["steps"])
        else:
            fields = message["params"]
            params = SamplingParams(**fields | {"logit_bias": dict(fields["logit_bias"]) or None})
            engine.add(message["request_id"], message["prompt"], params, message["scope"])
