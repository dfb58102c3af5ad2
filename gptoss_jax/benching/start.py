"""How long a process takes from its start to its first tokens, with and without programs that are compiled already."""

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
    """Seconds of a process's phases, one after the other; `total` from its start to its last token.

    `first_token` compiles the prompt's step and the one after it, which the engine starts before it reads the first's
    token, or reads both from the cache; `again` is the time to the first token of a second request.
    """

    compile_cache: str
    phases: dict[str, float]
    total: float
    again: float


def measure(arguments: Sequence[str]) -> list[Start]:
    """Run `python -m gptoss_jax.bench` with these arguments in fresh processes: with an empty compile cache, then with
    what the first one left there.

    Raises UsageError with what the process said where it failed.
    """
    with tempfile.TemporaryDirectory() as cache:
        return [_fresh_process(kind, cache, arguments) for kind in ("cold", "warm")]


def _fresh_process(kind: str, cache: str, arguments: Sequence[str]) -> Start:
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
    return Start(kind, found["phases"], found["total"], found["again"])


class Stopwatch:
    """Tells phases apart, from when the process was started."""

    def __init__(self, started_at: float) -> None:
        self._started = self._last = started_at
        self.phases: dict[str, float] = {}

    def lap(self, name: str) -> None:
        """The phase that ends now."""
        now = time.time()
        self.phases[name] = now - self._last
        self._last = now

    @property
    def total(self) -> float:
        """Seconds until the last lap."""
        return self._last - self._started
