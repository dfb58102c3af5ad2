"""One engine over several processes: process 0 leads, and the others repeat the calls of its engine.

Engines that receive the same calls in the same order compute the same, so only the calls are broadcast. Process 0
makes all decisions that depend on chance or time, such as seeds and cancellations.
"""

from __future__ import annotations

import contextlib
import dataclasses
import secrets
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from gptoss_jax.engine.engine import Engine
from gptoss_jax.engine.interrupts import uninterrupted
from gptoss_jax.errors import GptOssError
from gptoss_jax.types import ChatScope, SamplingParams
from sharding.processes import Cluster

ALIKE_SECONDS = 30.0
"""A process that has not failed as process 0 did within this time ends the job."""

CALLS = ("add", "cancel", "stop", "hold", "release", "step", "warm_up", "replay")
"""The methods of an engine that change it."""


class LeadingEngine:
    """Process 0's engine, whose calls are repeated in the other processes; used like an Engine."""

    def __init__(self, engine: Engine, cluster: Cluster) -> None:
        self._engine, self._cluster = engine, cluster
        engine.agree = partial(_agree, cluster)

    def __getattr__(self, name: str) -> Any:
        own = getattr(self._engine, name)
        return partial(self._lead, name, own) if name in CALLS else own

    def _lead(self, name: str, own: Callable[..., Any], *args: Any, **arguments: Any) -> Any:
        # An interrupt between the broadcast and the call would leave the other processes one call ahead.
        args = tuple(map(_seeded, args))
        with uninterrupted():
            encoded = {key: _encoded(value) for key, value in arguments.items()}
            self._cluster.broadcast({"call": name, "args": list(map(_encoded, args)), "arguments": encoded})
            return own(*args, **arguments)


def follow(engine: Engine, cluster: Cluster) -> None:
    """Repeat the calls of process 0's engine until it ends."""
    engine.agree = partial(_agree, cluster)
    while (message := cluster.broadcast()) is not None:
        arguments = {key: _decoded(value) for key, value in message["arguments"].items()}
        if "progress" in arguments:
            arguments["progress"] = False
        # Process 0 reports bad input for all.
        with contextlib.suppress(GptOssError):
            getattr(engine, message["call"])(*map(_decoded, message["args"]), **arguments)


def _agree(cluster: Cluster, failure: str) -> None:
    cluster.agree({"failure": failure}, ALIKE_SECONDS)


def _seeded(value: Any) -> Any:
    """Sampling parameters with a seed, which all processes then share."""
    if isinstance(value, SamplingParams) and value.seed is None:
        return dataclasses.replace(value, seed=secrets.randbits(64))
    return value


def _encoded(value: Any) -> Any:
    """An argument as JSON."""
    if isinstance(value, SamplingParams):
        # JSON keys are strings, so the mapping is sent as pairs.
        return {"params": dataclasses.asdict(value) | {"logit_bias": list((value.logit_bias or {}).items())}}
    if isinstance(value, ChatScope):
        return {"scope": dataclasses.asdict(value)}
    if isinstance(value, list | np.ndarray):
        return [int(token) for token in value]
    return value


def _decoded(value: Any) -> Any:
    if isinstance(value, dict) and "scope" in value:
        return ChatScope(**value["scope"])
    if isinstance(value, dict):
        fields = value["params"]
        return SamplingParams(**fields | {"logit_bias": dict(fields["logit_bias"]) or None})
    return value
