"""The counters add up, whatever becomes of the requests, and the text is what Prometheus and its tools read."""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse

from gptoss_jax.engine.outputs import Load
from gptoss_jax.errors import DeadlineError, EngineError, OverloadedError, UsageError
from gptoss_jax.serving.api.app import Access
from gptoss_jax.serving.api.limits import KeyLimits
from gptoss_jax.serving.api.metrics import PHASES, REASONS, Histogram, Metrics
from gptoss_jax.serving.generated import Request
from tests.serving.api.operations import GENERATE, app_of, running
from tests.serving.api.support import ANSWER, CALL, PROMPTS, ScriptedOwner, server_over
from tests.text.harmony.test_parse import tokens_of

MALFORMED = "<|channel|>analysis<|message|>Hm.<|end|>no header<|return|>"


class Owner(ScriptedOwner):
    """Refuses and fails some requests by their prompts, and has a load."""

    def __init__(self) -> None:
        super().__init__(self._answer, per_step=3, delay=0.001)
        self.loads = 0

    def _answer(self, request: Request, index: int) -> Any:
        prompt = PROMPTS.tokenizer.decode(request.prompt_token_ids)
        if "wait" in prompt:
            return "<|channel|>final<|message|>" + "word " * 3000
        for word, script in (
            ("fail", EngineError("the device failed")),
            ("late", DeadlineError("the request's time limit was reached")),
            ("call", CALL),
            ("malformed", MALFORMED),
        ):
            if word in prompt:
                return script
        return ANSWER

    async def submit(self, request: Request) -> Any:
        prompt = PROMPTS.tokenizer.decode(request.prompt_token_ids)
        if "overload" in prompt:
            raise OverloadedError("overloaded: 9 requests would wait, at most 8 may")
        if "wrong" in prompt:
            raise UsageError("too long", "prompt")
        return await super().submit(request)

    async def load(self) -> Load:
        self.loads += 1
        return Load(
            running=3, waiting=2, pages_used=25, pages=100, sliding_pages_used=30, sliding_pages=60, tokens=7
        )


def samples(text: str) -> dict[str, float]:
    """The samples by name and labels, such as requests_finished_total{stop}."""
    found = {}
    for family in parse(text):
        for sample in family.samples:
            assert sample.name not in found
            labels = ",".join(f"{name}={value}" for name, value in sample.labels.items())
            found[sample.name.removeprefix("gptoss_jax_") + (f"{{{labels}}}" if labels else "")] = sample.value
    return found


def assert_adds_up(found: dict[str, float]) -> None:
    finished = sum(found[f"requests_finished_total{{reason={reason}}}"] for reason in REASONS)
    unfinished = sum(found[f"requests_unfinished{{phase={phase}}}"] for phase in PHASES)
    assert found["requests_started_total"] == finished + unfinished


def test_counters_add_up_after_200_mixed_requests() -> None:
    owner = Owner()
    server = server_over(owner)
    kinds = ["answer", "short", "call", "malformed", "fail", "late", "overload", "wrong", "wait and leave", "two"]
    expected = {
        "stop": 3 * 20,
        "length": 20,
        "tool_calls": 20,
        "error": 20,
        "timeout": 20,
        "rejected": 40,
        "aborted": 20,
    }

    async def one(client: httpx.AsyncClient, kind: str, i: int) -> None:
        params = {"max_tokens": 4 if kind == "short" else 9999, "n": 2 if kind == "two" else 1}
        body = {"prompt": kind, "params": params, "stream": i % 2 == 0}
        if kind != "wait and leave":
            if kind in ("fail", "late", "overload", "wrong"):
                body["stream"] = False
            statuses = {"fail": 503, "late": 504, "overload": 503, "wrong": 400}
            assert (await client.post(GENERATE, json=body)).status_code == statuses.get(kind, 200)
            return
        body["stream"] = True
        async with client.stream("POST", GENERATE, json=body) as answer:
            async for _ in answer.aiter_bytes():
                return

    async def use(port: int) -> str:
        rng = random.Random(0)
        order = [(kind, i) for i in range(20) for kind in kinds]
        rng.shuffle(order)
        limits = httpx.Limits(max_connections=40)
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", limits=limits, timeout=30) as client:
            tasks = [asyncio.ensure_future(one(client, kind, i)) for kind, i in order]
            while not all(task.done() for task in tasks):
                assert_adds_up(samples((await client.get("/metrics")).text))
                await asyncio.sleep(0.02)
            for task in tasks:
                task.result()
            for _ in range(500):
                text = (await client.get("/metrics")).text
                if not any(samples(text)[f"requests_unfinished{{phase={phase}}}"] for phase in PHASES):
                    return text
                await asyncio.sleep(0.01)
        raise AssertionError("some requests have not ended")

    with running(app_of(server)) as port:
        text = asyncio.run(use(port))
    found = samples(text)
    assert_adds_up(found)
    assert found["requests_started_total"] == 200
    assert {r: found[f"requests_finished_total{{reason={r}}}"] for r in REASONS} == expected
    assert found["requests_shed_total{cause=queue}"] == 20
    assert found["malformed_outputs_total"] == 20
    tokenizer = PROMPTS.tokenizer
    counts = {script: len(tokens_of(tokenizer, script)) for script in (ANSWER, CALL, MALFORMED)}
    whole = 20 * (counts[ANSWER] * 3 + counts[CALL] + counts[MALFORMED] + 4)
    succeeded = expected["stop"] + expected["length"] + expected["tool_calls"]
    assert found["request_generation_tokens_count"] == found["e2e_request_latency_seconds_count"] == succeeded
    assert found["request_generation_tokens_sum"] == whole
    # Those that were aborted or failed generated some, too.
    assert whole < found["generation_tokens_total"] < whole + 20 * 3 * 3000
    began = succeeded + expected["aborted"] + expected["error"] + expected["timeout"]
    for name in ("time_to_first_token_seconds", "request_queue_time_seconds", "request_prompt_tokens"):
        assert found[f"{name}_count"] == began
    assert found["request_prompt_tokens_sum"] == found["prompt_tokens_total"]
    # Messages of reasoning, with their headers; the short one ends within.
    reasoning = {script: len(tokens_of(tokenizer, script.partition("<|end|>")[0])) + 1 for script in counts}
    assert found["reasoning_tokens_total"] == 20 * (
        reasoning[ANSWER] * 3 + reasoning[CALL] + reasoning[MALFORMED] + 4
    )
    assert found["http_responses_total{status=503}"] == 40
    assert found["http_responses_total{status=504}"] == found["http_responses_total{status=400}"] == 20


def test_the_engines_gauges_are_those_that_routers_read() -> None:
    owner = Owner()

    async def use() -> None:
        server = server_over(owner)
        for _ in range(3):
            found = samples((await server.metrics.render(owner))[0].decode())
        assert owner.loads == 1, "scrapes within half a second share one question"
        assert found["num_requests_running"] == 3
        assert found["num_requests_waiting"] == 2
        assert found["kv_cache_usage_perc"] == 0.5, "that of the fuller pool"
        assert found["kv_cache_pages_used{pool=full}"] == 25
        assert found["engine_tokens_total"] == 7
        assert found["engine_up"] == 1

    asyncio.run(use())


def test_an_engine_that_does_not_answer_holds_up_no_scrape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptoss_jax.serving.api.metrics.LOAD_TIMEOUT", 0.05)
    monkeypatch.setattr("gptoss_jax.serving.api.metrics.LOAD_SECONDS", 0.0)

    class Stuck(ScriptedOwner):
        released = asyncio.Event()
        failed = False
        asked = 0

        async def load(self) -> Load:
            self.asked += 1
            await self.released.wait()
            if self.failed:
                raise EngineError("the engine has ended")
            return Load(running=1)

    async def use() -> None:
        owner = Stuck()
        metrics = Metrics()

        async def scraped() -> dict[str, float]:
            async with asyncio.timeout(2):
                return samples((await metrics.render(owner))[0].decode())

        assert (await scraped())["engine_up"] == 0
        assert (await scraped())["engine_up"] == 0
        assert owner.asked == 1
        owner.released.set()
        await asyncio.sleep(0)
        assert (await scraped())["num_requests_running"] == 1
        owner.failed = True
        found = await scraped()
        assert found["engine_up"] == 0
        assert "num_requests_running" not in found

    asyncio.run(use())


def test_requests_refused_by_limits_are_counted_by_cause() -> None:
    server = server_over(ScriptedOwner())
    access = Access(limits=KeyLimits(requests_per_minute=2, tokens_per_minute=1000))
    with running(app_of(server, access)) as port, httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
        assert client.post(GENERATE, json={"prompt": "hi"}).status_code == 200
        assert client.post(GENERATE, json={"prompt": "word " * 2000}).status_code == 429
        assert client.post(GENERATE, json={"prompt": "hi"}).status_code == 429
        server.drain()
        assert client.post(GENERATE, json={"prompt": "hi"}).status_code == 503
        found = samples(client.get("/metrics").text)
    assert {
        cause: found[f"requests_shed_total{{cause={cause}}}"] for cause in ("tokens", "requests", "draining")
    } == {
        "tokens": 1,
        "requests": 1,
        "draining": 1,
    }
    # The second was given to the engine's queue; the last two were not.
    assert found["requests_started_total"] == 2
    assert found["requests_finished_total{reason=rejected}"] == 1
    assert_adds_up(found)


UNITS = ("milliseconds", "microseconds", "minutes", "hours", "kilobytes", "megabytes", "percent")
ABBREVIATED = re.compile(r"_(s|ms|us|ns|sec|b|kb|mb|gb|min|hr|h)(_|$)")


def test_the_text_is_clean_by_promtools_rules() -> None:
    """The rules of `promtool check metrics`, as its package promlint has them."""
    server = server_over(Owner())
    text = asyncio.run(server.metrics.render(server.owner))[0].decode()
    families = list(parse(text))
    assert len({family.name for family in families}) == len(families)
    for family in families:
        assert family.documentation.strip()
        assert re.fullmatch(r"[a-z][a-z0-9_]*", family.name), "no capitals, and no colons, which are for rules"
        assert not ABBREVIATED.search(family.name)
        assert not any(unit in family.name for unit in UNITS)
        assert not re.search(r"(^|_)(gauge|counter|histogram|summary)(_|$)", family.name)
        names = {sample.name for sample in family.samples}
        if family.type == "counter":
            assert all(name.endswith("_total") for name in names)
        elif family.type == "histogram":
            assert names == {f"{family.name}_{part}" for part in ("bucket", "sum", "count")}
        else:
            assert family.type == "gauge"
            assert not any(name.endswith(("_total", "_count", "_sum", "_bucket")) for name in names)
        assert not any(
            set(sample.labels) & {"le", "quantile"} for sample in family.samples if family.type != "histogram"
        )


def test_both_formats_are_served() -> None:
    with running(app_of(server_over(Owner()))) as port:
        plain = httpx.get(f"http://127.0.0.1:{port}/metrics")
        assert plain.headers["content-type"].startswith("text/plain; version=")
        accept = {"accept": "application/openmetrics-text; version=1.0.0"}
        open_metrics = httpx.get(f"http://127.0.0.1:{port}/metrics", headers=accept)
        assert open_metrics.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    names = {family.name for family in parse_openmetrics(open_metrics.text)}
    assert {"gptoss_jax_requests_started", "gptoss_jax_time_to_first_token_seconds"} <= names


def test_a_histogram_has_cumulative_buckets() -> None:
    histogram = Histogram("x", "X.", [1, 2.5, 10])
    for value in (0.5, 1, 1.5, 2.5, 9, 11, 12):
        histogram.observe(value)
    histogram.observe(2, times=3)
    [family] = histogram.collect()
    found = {sample.labels.get("le", sample.name): sample.value for sample in family.samples}
    assert found == {
        "1.0": 2,
        "2.5": 7,
        "10.0": 8,
        "+Inf": 10,
        "gptoss_jax_x_count": 10,
        "gptoss_jax_x_sum": 37.5 + 6,
    }


def test_the_documentation_has_all_names() -> None:
    page = Path(__file__).parents[3] / "docs" / "metrics.md"
    documented = set(re.findall(r"`gptoss_jax_(\w+)`", page.read_text()))
    text = asyncio.run(server_over(Owner()).metrics.render(Owner()))[0].decode()
    served = {family.name + ("_total" if family.type == "counter" else "") for family in parse(text)}
    assert {name.removeprefix("gptoss_jax_") for name in served if name.startswith("gptoss_jax_")} == documented


def test_a_turn_that_is_never_read_is_counted_as_aborted() -> None:
    async def use() -> None:
        server = server_over(ScriptedOwner(delay=0.01))
        request = PROMPTS.chat_request("r", [{"role": "user", "content": "hi"}], _params(n=2))
        turn = await server.start(request)
        await anext(turn)
        # A reader may stop waiting for an update, and wait again.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.001):
                await anext(turn)
        assert server.draining.in_flight == 1
        await anext(turn)
        await turn.aclose()
        await turn.aclose()
        found = samples((await server.metrics.render(server.owner))[0].decode())
        assert found["requests_finished_total{reason=aborted}"] == 1
        assert_adds_up(found)
        assert server.draining.in_flight == 0

    asyncio.run(use())


def _params(**fields: Any) -> Any:
    from gptoss_jax.types import SamplingParams

    return SamplingParams(**fields)
