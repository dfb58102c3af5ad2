"""Startup time: from the start of a process to its first tokens, with a cold and with a warm compile cache."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

from gptoss_jax.errors import UsageError

PHASES = ("import", "devices", "weights", "engine", "first_token", "more_tokens")


@dataclasses.dataclass(frozen=True)
class Start:
    """Seconds of a process's consecutive phases; `total` is from its start to its last token.

    `first_token` includes compiling, or reading from the cache, the programs of the prefill step and of the decode step
    after it, which the engine launches before it reads the first token, and `more_tokens` those of the launches of
    several decode steps that follow. `second_request` is the time to first token of a second
    request. `compile_cache` is "cold" or "warm".
    """

    compile_cache: str
    phases: dict[str, float]
    total: float
    second_request: float


def measure(arguments: Sequence[str]) -> list[Start]:
    """Run `python -m gptoss_jax.bench` with these arguments in two fresh processes, which share a compile cache.

    The cache is empty for the first process. Raises UsageError with the error line of a process that fails.
    """
    with tempfile.TemporaryDirectory() as cache:
        return [_fresh_process(state, cache, arguments) for state in ("cold", "warm")]


def _fresh_process(state: str, cache: str, arguments: Sequence[str]) -> Start:
    command = [sys.executable, "-m", "gptoss_jax.bench", *arguments, "--started-at", repr(time.time())]
    own = {
        "JAX_COMPILATION_CACHE_DIR": cache,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
    }
    ended = subprocess.run(command, env=os.environ | own, capture_output=True, text=True)
    if ended.returncode:
        lines = ended.stderr.strip().splitlines() or [f"exit code {ended.returncode}"]
        raise UsageError(lines[-1].removeprefix("error: "))
    found = json.loads(ended.stdout)
    return Start(state, found["phases"], found["total"], found["second_request"])


class Stopwatch:
    """Times consecutive phases. The first one begins at `started_at`, a `time.time()`."""

    def __init__(self, started_at: float) -> None:
        self._started = self._last = started_at
        self.phases: dict[str, float] = {}

    def lap(self, name: str) -> None:
        """End the current phase, and record it under this name."""
        now = time.time()
        self.phases[name] = now - self._last
        self._last = now

    @property
    def total(self) -> float:
        """Seconds from `started_at` to the last lap."""
        return self._last - self._started
