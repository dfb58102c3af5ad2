"""Grammars are checked in other processes, within limits of time and memory."""

from __future__ import annotations

import asyncio
import itertools
import os
import re
import signal
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from gptoss_jax.errors import EngineError, OverloadedError, UsageError
from gptoss_jax.serving.api import grammars
from gptoss_jax.serving.api.grammars import GrammarChecks
from gptoss_jax.types import StructuredOutputsParams as Params

OBJECT = {
    "type": "object",
    "properties": {"a": {"type": "integer"}},
    "required": ["a"],
    "additionalProperties": False,
}


def bomb(pattern: str = "a") -> Params:
    """A schema of 2 kB whose references stand for a hundred thousand patterns."""
    names = ["v", "w", "x", "y", "z"]
    ten = {one: {"allOf": [{"$ref": f"#/$defs/{next_}"}] * 10} for one, next_ in itertools.pairwise(names)}
    last = {"allOf": [{"properties": {"q": {"pattern": pattern + "{1,1000}"}}}] * 10}
    return Params(json={"$ref": "#/$defs/v", "$defs": {**ten, "z": last}})


def run(use: Callable[[GrammarChecks], Awaitable[None]], **options: Any) -> None:
    async def main() -> None:
        checks = GrammarChecks(**{"processes": 1, **options})
        try:
            async with asyncio.timeout(60):
                await use(checks)
        finally:
            pids = [process._popen.pid for process in checks._processes if process._popen]
            await checks.close()
            assert not any(Path(f"/proc/{pid}").exists() for pid in pids)

    asyncio.run(main())


def pid_of(checks: GrammarChecks) -> int:
    [process] = checks._processes
    assert process._popen
    return process._popen.pid


def test_grammars_are_accepted_or_refused_by_field() -> None:
    async def use(checks: GrammarChecks) -> None:
        for params in (
            None,
            Params(json_object=True),
            Params(json=OBJECT),
            Params(json='{"type": "string"}'),
            Params(regex="[0-9]+"),
            Params(choice=("yes", "no")),
            Params(grammar='start: "a" | "b"'),
        ):
            await checks.check(params)
        for params, field, text in (
            (Params(json={"type": "nonsense"}), "json", "nonsense"),
            (Params(json="{"), "json", "JSON"),
            (Params(json="[1]"), "json", "list"),
            (Params(json={"$ref": "#/$defs/none"}), "json", "none"),
            (Params(regex="("), "regex", "regex"),
            (Params(grammar="start: nothing"), "grammar", "nothing"),
            (Params(json={"const": float("nan")}), "json", ""),
            (Params(json={"enum": ["v" * 600_000]}), "json", "at most 524288 bytes"),
            (Params(json=nested(400)), "json", ""),
            (Params(json=nested(100_000)), "json", "nested too deeply"),
        ):
            with pytest.raises(UsageError, match=re.compile(text, re.IGNORECASE)) as caught:
                await checks.check(params)
            assert caught.value.field == f"structured_outputs.{field}"
            assert "\n" not in caught.value.message
        pid = pid_of(checks)
        await checks.check(Params(regex="again"))
        assert pid_of(checks) == pid

    run(use)


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


def test_one_that_takes_too_long_is_refused_in_time_and_its_process_replaced() -> None:
    async def use(checks: GrammarChecks) -> None:
        await checks.check(Params(json=OBJECT))
        first = pid_of(checks)
        began = time.monotonic()
        blocked = asyncio.ensure_future(longest_pause())
        with pytest.raises(UsageError, match="takes too long") as caught:
            await checks.check(bomb())
        assert caught.value.field == "structured_outputs.json"
        # Without a limit, llguidance says after some seconds that it is too big.
        assert time.monotonic() - began < 4
        blocked.cancel()
        # The event loop goes on meanwhile.
        assert max(PAUSES) < 0.5
        began = time.monotonic()
        with pytest.raises(UsageError, match="takes too long"):
            await checks.check(bomb())
        assert time.monotonic() - began < 0.1, "the verdict was not kept"
        await checks.check(Params(regex="[a-z]+"))
        assert pid_of(checks) != first

    run(use)


PAUSES: list[float] = []


async def longest_pause() -> None:
    while True:
        before = time.monotonic()
        await asyncio.sleep(0.005)
        PAUSES.append(time.monotonic() - before)


def test_a_process_that_stops_or_dies_is_replaced() -> None:
    async def use(checks: GrammarChecks) -> None:
        await checks.check(Params(regex="a"))
        os.kill(pid_of(checks), signal.SIGSTOP)
        with pytest.raises(UsageError, match="too long"):
            await checks.check(Params(regex="b"))
        await checks.check(Params(regex="c"))
        os.kill(pid_of(checks), signal.SIGKILL)
        with pytest.raises(UsageError, match="too long or too much memory"):
            await checks.check(Params(regex="d"))
        await checks.check(Params(regex="e"))

    run(use, wall_seconds=0.5)


def test_a_client_that_leaves_does_not_disturb_others() -> None:
    async def use(checks: GrammarChecks) -> None:
        await checks.check(Params(regex="a"))
        same = [asyncio.ensure_future(checks.check(Params(json=OBJECT))) for _ in range(5)]
        await asyncio.sleep(0)
        assert len(checks._checks) == 1
        same[0].cancel()
        assert await asyncio.gather(*same[1:]) == [None] * 4
        # The next one gets its own answer.
        with pytest.raises(UsageError, match="regex"):
            await checks.check(Params(regex="("))

    run(use)


def test_no_more_than_a_number_wait() -> None:
    async def use(checks: GrammarChecks) -> None:
        waiting = [asyncio.ensure_future(checks.check(Params(regex=f"a{i}"))) for i in range(grammars.MAX_WAITING)]
        await asyncio.sleep(0)
        with pytest.raises(OverloadedError, match="too many grammars"):
            await checks.check(Params(regex="b"))
        await asyncio.gather(*waiting)
        await checks.check(Params(regex="b"))

    run(use)


def test_a_process_that_does_not_start_is_the_servers_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammars.sys, "executable", "/bin/false")

    async def use(checks: GrammarChecks) -> None:
        with pytest.raises(EngineError, match="the server's log"):
            await checks.check(Params(regex="a"))

    run(use)


def test_the_process_is_small_and_ends_with_its_parent() -> None:
    async def use(checks: GrammarChecks) -> None:
        await checks.check(Params(json=OBJECT))
        pid = pid_of(checks)
        status = Path(f"/proc/{pid}/status").read_text()
        match = re.search(r"VmHWM:\s+(\d+) kB", status)
        assert match
        assert int(match[1]) < 80_000
        assert not re.search(r"jax|libtpu|cuda", Path(f"/proc/{pid}/maps").read_text().replace("gptoss-jax", ""))
        # The end of the connection, as when the server is killed.
        streams = checks._processes[0]._streams
        assert streams
        streams[1].close()
        while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
            await asyncio.sleep(0.01)

    run(use)
