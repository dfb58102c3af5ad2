"""An engine without a model, whose steps take a given time; it has what `Worker` and `EngineEnd` need of an Engine."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable
from typing import Any

from gptoss_jax.engine.outputs import Load, TokenEvent
from gptoss_jax.errors import expect
from gptoss_jax.types import FinishReason, SamplingParams, Scope


@dataclasses.dataclass
class _Config:
    vocab_size: int


class FakeEngine:
    """Generates the tokens of `script`, again and again, for up to `max_num_seqs` sequences at a time.

    A step takes `step_seconds` from the start of the previous one, as on a device that is never waited for, and gives
    each sequence one token.
    """

    def __init__(
        self, script: list[int], step_seconds: float, max_num_seqs: int = 256, vocab_size: int = 201_088
    ) -> None:
        self._script, self._step_seconds, self._most = script, step_seconds, max_num_seqs
        self._requests: dict[str, list[Any]] = {}
        self._held: set[str] = set()
        self._due = 0.0
        self.failures = self.programs = self.tokens = self.late = 0
        self.max_model_len, self.config = 131_072, _Config(vocab_size)

    @property
    def busy(self) -> bool:
        return len(self._requests) > len(self._held)

    @property
    def load(self) -> Load:
        return Load(running=len(self._requests), tokens=self.tokens)

    def check(self, prompt: Iterable[int], params: SamplingParams, scope: Scope = "text") -> None:
        expect(len(list(prompt)) < self.max_model_len, "prompt", "fewer tokens", "too many")

    def add(
        self, name: str, prompt: Iterable[int], params: SamplingParams, scope: Scope = "text", priority: int = 0
    ) -> None:
        self._requests[name] = [[0] * params.n, params]

    def cancel(self, name: str) -> bool:
        self._held.discard(name)
        return self._requests.pop(name, None) is not None

    def stop(self, name: str, index: int) -> None:
        if name in self._requests:
            self._requests[name][0][index] = -1

    def hold(self, name: str) -> None:
        if name in self._requests:
            self._held.add(name)

    def release(self, name: str) -> None:
        self._held.discard(name)

    def step(self) -> list[TokenEvent]:
        now = time.perf_counter()
        if now < self._due:
            time.sleep(self._due - now)
        else:
            self.late += self._due > 0
        self._due = max(self._due, now - self._step_seconds) + self._step_seconds
        events: list[TokenEvent] = []
        for name in [name for name in self._requests if name not in self._held][: self._most]:
            counts, params = self._requests[name]
            for index, count in enumerate(counts):
                if count < 0:
                    continue
                counts[index] = count + 1
                token = self._script[count % len(self._script)]
                finish: FinishReason | None = "length" if count + 1 >= (params.max_tokens or 4096) else None
                events.append(TokenEvent(name, index, token, finish_reason=finish))
                if finish:
                    counts[index] = -1
            if all(count < 0 for count in counts):
                del self._requests[name]
        self.tokens += len(events)
        return events
