"""Reads a trace: the arrival times and lengths of requests."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from gptoss_jax.benching.workload import Arrival
from gptoss_jax.commands.files import parse_json, read_text
from gptoss_jax.errors import UsageError


def read_trace(path: Path, flag: str = "--trace") -> list[Arrival]:
    """The requests of a JSON-lines file named by a flag, by arrival time. Raises UsageError, naming the line."""
    arrivals = []
    for number, text in enumerate(read_text(path, flag).splitlines(), 1):
        if text.strip():
            where = f"{flag}: {path}: line {number}"
            arrivals.append(_arrival(parse_json(text, where, dict), where))
    if not arrivals:
        raise UsageError(f"{path}: expected one request per line, found none", flag)
    return sorted(arrivals, key=lambda arrival: arrival.arrival_s)


def _arrival(line: dict[str, Any], where: str) -> Arrival:
    names = [field.name for field in dataclasses.fields(Arrival)]
    if sorted(line) != sorted(names):
        raise UsageError(f"expected {', '.join(names)}, found {', '.join(sorted(line)) or 'nothing'}", where=where)
    seconds = line["arrival_s"]
    if not isinstance(seconds, int | float) or isinstance(seconds, bool) or not 0 <= seconds < 1e9:
        raise UsageError(f"expected seconds from 0, found {seconds!r:.60}", "arrival_s", where)
    for name in names[1:]:
        if type(line[name]) is not int or line[name] < 1:
            raise UsageError(f"expected an integer from 1, found {line[name]!r:.60}", name, where)
    return Arrival(**line)
