"""Keys, limits, hosts and origins, request ids, draining, health, models, tokens, and the OpenAPI document."""

from __future__ import annotations

import asyncio
import hmac
import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from starlette.types import Message, Receive, Scope, Send

from gptoss_jax.errors import EngineError, OverloadedError, UsageError
from gptoss_jax.serving.api import openapi
from gptoss_jax.serving.api.app import BODIES, Access
from gptoss_jax.serving.api.grammars import GrammarChecks
from gptoss_jax.serving.api.keys import KeyGuard, Keys
from gptoss_jax.serving.api.lifecycle import Drain
from gptoss_jax.serving.api.limits import Bucket, KeyLimits
from gptoss_jax.serving.api.middleware import allowed_hosts
from gptoss_jax.text.tokenizer import Tokenizer
from gptoss_jax.types import SamplingParams
from tests.serving.api.operations import GENERATE, app_of, running
from tests.serving.api.support import PROMPTS, ScriptedOwner, server_over

KEYS = (("team-a", "sk-aaaaaaaaaaaaaaaa"), ("team-b", "sk-bbbbbbbbbbbbbbbb"))
LONG = "<|channel|>final<|message|>" + "word " * 200 + "<|return|>"


def client_of(port: int, key: str | None = None) -> httpx.Client:
    headers = {"authorization": f"Bearer {key}"} if key else {}
    return httpx.Client(base_url=f"http://127.0.0.1:{port}", headers=headers, timeout=20)


def error_of(answer: httpx.Response) -> dict[str, Any]:
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-request-id"]
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


@pytest.fixture
def scripted() -> ScriptedOwner:
    return ScriptedOwner()


def test_every_path_but_health_needs_a_key() -> None:
    server = server_over(ScriptedOwner())
    server.begin(4096, 1000)
    app = app_of(server, Access(keys=Keys(KEYS)))
    every = [(method, path) for _, path, method in openapi.operations(app.routes)]
    assert len(every) > 10
    with running(app) as port, client_of(port) as client:
        for method, path in [*every, ("GET", "/none"), ("GET", "//health"), ("GET", "/healthy"), ("PUT", "/")]:
            path = path.replace("{id}", "gpt-oss-test")
            for headers in ({}, {"authorization": "Bearer sk-wrong"}, {"x-api-key": "sk-wrong"}):
                answer = client.request(method, path, headers=headers)
                if path.startswith("/health/") or path == "/health":
                    assert answer.status_code == 200
                    continue
                assert answer.status_code == 401
                error = error_of(answer)
                assert (error["code"], error["type"]) == ("invalid_api_key", "invalid_request_error")
                assert "sk-wrong" not in answer.text
                assert answer.headers["www-authenticate"] == "Bearer"


def test_both_headers_are_read_and_name_the_key() -> None:
    with running(app_of(server_over(ScriptedOwner()), Access(keys=Keys(KEYS)))) as port:
        with client_of(port) as client:
            for name, key in KEYS:
                for headers in ({"authorization": f"bearer  {key}"}, {"x-api-key": key}):
                    answer = client.post(GENERATE, json={"prompt": "hi"}, headers=headers)
                    assert answer.json()["key"] == name
        openai_client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=KEYS[0][1])
        assert [model.id for model in openai_client.models.list()] == ["gpt-oss-test"]
        with pytest.raises(openai.AuthenticationError) as caught:
            openai_client.with_options(api_key="sk-no").models.list()
        assert caught.value.code == "invalid_api_key"


def test_hashes_of_all_keys_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []
    real = hmac.compare_digest
    monkeypatch.setattr(
        "gptoss_jax.serving.api.keys.hmac.compare_digest",
        lambda a, b: compared.append((a, b)) or real(a, b),
    )
    keys = Keys(KEYS)
    for given, name in (
        (KEYS[0][1], "team-a"),
        (KEYS[1][1], "team-b"),
        ("x", None),
        ("é\udcff", None),
        ("", None),
    ):
        compared.clear()
        assert keys.name_of(given) == name
        assert len(compared) == len(KEYS)
        assert all(len(a) == len(b) == 32 for a, b in compared)
    assert not any(key in repr(vars(keys)) for _, key in KEYS)


def test_a_file_of_keys(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "keys"
    file.write_text("\ufeff# ours\n\n team-a : sk-aaaa \nsk-alone\r\nteam-a:sk-new\n")
    file.chmod(0o600)
    keys = Keys.load(file, {"GPTOSS_JAX_API_KEY": " sk-env\n"})
    assert keys
    assert [keys.name_of(key) for key in ("sk-aaaa", "sk-new", "sk-env")] == ["team-a", "team-a", "env"]
    # A key without a name keeps the one it has when the lines around it change.
    file.write_text("other:sk-o\nsk-alone\n")
    again = Keys.load(file, {})
    assert again
    assert again.name_of("sk-alone") == keys.name_of("sk-alone")
    assert not caplog.records
    file.chmod(0o644)
    Keys.load(file, {})
    assert "chmod 600" in caplog.text
    assert Keys.load(None, {}) is None


def test_what_is_no_key_is_refused_without_being_shown(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    for content, text in (
        ("a:", "line 1: expected a key of printable"),
        ("\nsecret secret\n", "line 2: expected a key of printable"),
        (":secret", "line 1: expected a name"),
        ("a:sécret", "line 1: expected a key of printable"),
        ("# none", "at least one key"),
        ("a:secret\nb:secret", "found one twice"),
        ("x" * (2**20 + 1), "at most 1048576 bytes"),
    ):
        file.write_text(content)
        file.chmod(0o600)
        with pytest.raises(UsageError, match=text) as caught:
            Keys.load(file, {})
        assert "secret" not in str(caught.value)
        assert "--api-key-file" in str(caught.value)
    file.write_bytes(b"\xff")
    with pytest.raises(UsageError, match="UTF-8"):
        Keys.load(file, {})
    with pytest.raises(UsageError, match="No such file"):
        Keys.load(tmp_path / "none", {})
    with pytest.raises(UsageError, match="GPTOSS_JAX_API_KEY"):
        Keys.load(None, {"GPTOSS_JAX_API_KEY": ""})


def test_websockets_need_a_key_too() -> None:
    sent: list[Message] = []

    async def inner(scope: Scope, receive: Receive, send: Send) -> None:
        raise AssertionError("reached")

    async def send(message: Message) -> None:
        sent.append(message)

    scope: Scope = {"type": "websocket", "path": "/v1/responses", "headers": []}
    asyncio.run(KeyGuard(inner, Keys(KEYS))(scope, _never, send))
    assert sent[0]["type"] == "websocket.close"


async def _never() -> Message:
    await asyncio.Event().wait()
    raise AssertionError


ACCESS = Access(
    keys=Keys(KEYS),
    hosts=["localhost"],
    origins=["https://chat.example"],
    limits=KeyLimits(10, 1000, 1_000_000),
    max_requests=10,
    timeout=60,
)


def test_events_arrive_as_they_are_made() -> None:
    owner = ScriptedOwner(LONG, per_step=1, delay=0.05)
    with running(app_of(server_over(owner), ACCESS)) as port, client_of(port, KEYS[0][1]) as client:
        body = {"prompt": "hi", "stream": True, "params": {"max_tokens": 20}}
        began, times = time.monotonic(), []
        with client.stream("POST", GENERATE, json=body) as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            assert answer.headers["x-ratelimit-limit-requests"] == "1000"
            for line in answer.iter_lines():
                if line:
                    times.append(time.monotonic() - began)
    assert len(times) == 21
    # Twenty steps of 50 ms: the events came one after another, not all in the end.
    assert times[0] < 0.5
    assert times[10] - times[2] > 0.3


def test_a_client_that_leaves_ends_its_request() -> None:
    owner = ScriptedOwner(LONG, per_step=1, delay=0.01)
    server = server_over(owner)
    with running(app_of(server, ACCESS)) as port, client_of(port, KEYS[0][1]) as client:
        for _ in range(5):
            with client.stream("POST", GENERATE, json={"prompt": "hi", "stream": True}) as answer:
                next(answer.iter_lines())
        wait_for(lambda: len(owner.aborted) == 5 and not server.draining.in_flight)
        # Its place within the limits is free again.
        answer = client.get("/v1/models")
        assert answer.headers["x-ratelimit-remaining-concurrent-requests"] == "10"


def wait_for(condition: Callable[[], bool], seconds: float = 5) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_concurrent_requests() -> None:
    owner = ScriptedOwner(LONG, per_step=1, delay=0.003)
    access = Access(keys=Keys(KEYS), limits=KeyLimits(concurrent_requests=2))
    with running(app_of(server_over(owner), access)) as port, client_of(port, KEYS[0][1]) as client:
        body = {"prompt": "hi", "stream": True}
        with (
            client.stream("POST", GENERATE, json=body) as one,
            client.stream("POST", GENERATE, json=body) as two,
        ):
            assert one.headers["x-ratelimit-remaining-concurrent-requests"] == "1"
            assert two.headers["x-ratelimit-remaining-concurrent-requests"] == "0"
            refused = client.post(GENERATE, json=body)
            assert refused.status_code == 429
            assert error_of(refused)["code"] == "rate_limit_exceeded"
            assert refused.headers["retry-after"] == "1"
            # Others have places of their own, and reading needs none.
            with client_of(port, KEYS[1][1]) as other, other.stream("POST", GENERATE, json=body) as three:
                assert three.status_code == 200
            assert client.get("/v1/models").status_code == 200
        wait_for(lambda: client.post(GENERATE, json={"prompt": "hi"}).status_code == 200)


def test_requests_and_tokens_per_minute() -> None:
    access = Access(keys=Keys(KEYS), limits=KeyLimits(None, 3, 300))
    with running(app_of(server_over(ScriptedOwner()), access)) as port, client_of(port, KEYS[0][1]) as client:
        first = client.post(GENERATE, json={"prompt": "hi"})
        assert first.headers["x-ratelimit-limit-requests"] == "3"
        assert first.headers["x-ratelimit-remaining-requests"] == "2"
        assert first.headers["x-ratelimit-limit-tokens"] == "300"
        assert first.headers["x-ratelimit-reset-requests"][:2] in ("20", "19")
        # What the first used is only known after its headers; the next answer has it.
        used = 300 - int(client.get("/v1/models").headers["x-ratelimit-remaining-tokens"])
        prompt = len(plain(client, "hi"))
        assert prompt < used < 300
        too_long = client.post(GENERATE, json={"prompt": "word " * 400})
        assert too_long.status_code == 429
        assert too_long.headers["x-should-retry"] == "false"
        assert "the limit is 300 tokens per minute, and the prompt has" in error_of(too_long)["message"]
        assert error_of(too_long)["type"] == "tokens"


def test_the_rate_of_requests_is_held() -> None:
    access = Access(limits=KeyLimits(requests_per_minute=60))
    with running(app_of(server_over(ScriptedOwner()), access)) as port, client_of(port) as client:
        answers = [client.post(GENERATE, json={"prompt": "hi"}) for _ in range(62)]
        assert {answer.status_code for answer in answers[:60]} == {200}
        refused = answers[-1]
        assert refused.status_code == 429
        assert error_of(refused)["type"] == "requests"
        assert refused.headers["retry-after"] == "1"
        assert refused.headers["x-ratelimit-remaining-requests"] == "0"
        time.sleep(1.1)
        assert client.post(GENERATE, json={"prompt": "hi"}).status_code == 200
        # The SDK waits for the time in Retry-After, and succeeds.
        sdk = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="x", max_retries=2)
        for _ in range(2):
            assert sdk.post("/test/generate", body={"prompt": "hi"}, cast_to=object)


def test_generated_tokens_are_paid_for_later() -> None:
    now = [0.0]
    bucket = Bucket(600, lambda: now[0])
    bucket.spend(900)
    assert bucket.level == -300
    assert bucket.seconds_until(1) == pytest.approx(30.1)
    now[0] = 30.1
    assert bucket.level == pytest.approx(1)
    now[0] = 1000
    assert bucket.level == 600


def test_work_in_the_background_holds_its_place() -> None:
    owner = ScriptedOwner(LONG, per_step=1, delay=0.005)
    server = server_over(owner)
    finish = threading.Event()
    running_tasks = []

    async def inner(scope: Scope, receive: Receive, send: Send) -> None:
        async def background() -> None:
            request = PROMPTS.chat_request("r", [{"role": "user", "content": "hi"}], SamplingParams())
            async for _ in server.run(request):
                if finish.is_set():
                    break

        running_tasks.append(asyncio.ensure_future(background()))
        await asyncio.sleep(0.05)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    from starlette.applications import Starlette
    from starlette.routing import Mount

    from gptoss_jax.serving.api.app import middleware_of

    access = Access(limits=KeyLimits(concurrent_requests=1))
    app = Starlette(routes=[Mount("/", inner)], middleware=middleware_of(server, access))
    with running(app) as port, client_of(port) as client:
        assert client.post("/background").status_code == 200
        assert client.post("/background").status_code == 429
        assert server.draining.in_flight == 1
        # Cancelling is not new work.
        assert client.post("/v1/responses/x/cancel").status_code == 200
        finish.set()
        wait_for(lambda: client.post("/background").status_code == 200)


def test_the_server_answers_a_number_of_requests_at_once() -> None:
    owner = ScriptedOwner(LONG, per_step=1, delay=0.01)
    with running(app_of(server_over(owner), Access(max_requests=1))) as port, client_of(port) as client:
        with client.stream("POST", GENERATE, json={"prompt": "hi", "stream": True}):
            refused = client.post(GENERATE, json={"prompt": "hi"})
        assert refused.status_code == 503
        assert error_of(refused)["code"] == "overloaded"
        assert int(refused.headers["retry-after"]) > 0
        wait_for(lambda: client.post(GENERATE, json={"prompt": "hi"}).status_code == 200)


def test_a_full_queue_of_the_engine_is_503(scripted: ScriptedOwner) -> None:
    scripted.refusal = OverloadedError("overloaded: 9 requests would wait, at most 8 may")
    with running(app_of(server_over(scripted))) as port, client_of(port) as client:
        refused = client.post(GENERATE, json={"prompt": "hi"})
    assert refused.status_code == 503
    assert error_of(refused)["message"] == "overloaded: 9 requests would wait, at most 8 may"
    assert int(refused.headers["retry-after"]) > 0


def test_time_limits(scripted: ScriptedOwner) -> None:
    with running(app_of(server_over(scripted), Access(timeout=100))) as port, client_of(port) as client:
        for given, expected in ((None, 100), ("2.5", 2.5), ("1000", 100)):
            headers = {} if given is None else {"x-request-timeout": given}
            assert client.post(GENERATE, json={"prompt": "hi"}, headers=headers).status_code == 200
            assert scripted.requests[-1].timeout == expected
        for wrong in ("0", "-1", "nan", "inf", "soon", "1e999", ""):
            refused = client.post(GENERATE, json={"prompt": "hi"}, headers={"x-request-timeout": wrong})
            assert refused.status_code == 400
            assert "x-request-timeout: expected a number of seconds" in error_of(refused)["message"]
    assert len(scripted.requests) == 3


def test_deep_json_is_refused(scripted: ScriptedOwner) -> None:
    with running(app_of(server_over(scripted))) as port, client_of(port) as client:
        for depth in (2_000, 100_000):
            for open_, close in (("[", "]"), ('{"a":', "}")):
                body = f'{{"prompt": {open_ * depth}1{close * depth}}}'
                answer = client.post(GENERATE, content=body)
                assert answer.status_code == 400
                assert error_of(answer)["message"] == "the body is nested too deeply"


def plain(client: httpx.Client, prompt: str) -> list[int]:
    return PROMPTS.chat_request("r", [{"role": "user", "content": prompt}], SamplingParams()).prompt_token_ids


def test_a_server_on_loopback_answers_its_own_names_only() -> None:
    server = server_over(ScriptedOwner())
    server.begin(4096, 1000)
    hosts = allowed_hosts("127.0.0.1", ["gpu.lan"])
    with running(app_of(server, Access(hosts=hosts))) as port, client_of(port) as client:
        fine = ["localhost", "LOCALHOST:80", "127.0.0.1", "127.8.9.1:8000", "[::1]", "[::1]:8000", "gpu.lan:1"]
        for host in [*fine, "localhost.:8000"]:
            assert client.get("/v1/models", headers={"host": host}).status_code == 200
        wrong = ["evil.example", "localhost.evil.example", "evil.example:8000", "127.0.0.1.evil.example"]
        for host in [*wrong, "[::2]", "10.0.0.1", "", "localhost@evil.example", "[::1"]:
            answer = client.get("/v1/models", headers={"host": host})
            assert answer.status_code == 403
            assert error_of(answer)["code"] == "host_not_allowed"
            assert client.get("/health", headers={"host": host}).status_code == 200


def test_what_is_allowed_by_the_address() -> None:
    assert allowed_hosts("127.0.0.1") == allowed_hosts("::1") == allowed_hosts("localhost") == ["localhost"]
    assert allowed_hosts("0.0.0.0") is allowed_hosts("10.1.2.3") is allowed_hosts(None) is None
    assert allowed_hosts("0.0.0.0", ["a.example"]) == ["a.example"]


def test_pages_of_other_sites_start_nothing(scripted: ScriptedOwner) -> None:
    """A page may post text/plain to any host without asking it."""
    page = {"sec-fetch-site": "cross-site", "origin": "https://evil.example", "content-type": "text/plain"}
    with running(app_of(server_over(scripted))) as port, client_of(port) as client:
        answer = client.post(GENERATE, content='{"prompt": "hi"}', headers=page)
        assert answer.status_code == 403
        assert error_of(answer)["code"] == "origin_not_allowed"
        for site in ("same-origin", "none"):
            answer = client.post(GENERATE, json={"prompt": "hi"}, headers={"sec-fetch-site": site})
            assert answer.status_code == 200
        # Following a link is harmless.
        assert client.get("/v1/models", headers=page).status_code == 200
    assert len(scripted.requests) == 2


def test_cors_is_off_unless_origins_are_allowed() -> None:
    ask = {"origin": "https://chat.example", "access-control-request-method": "POST"}
    ask["access-control-request-headers"] = "authorization,content-type,x-stainless-os"
    page = {"origin": "https://chat.example", "sec-fetch-site": "cross-site"}
    with running(app_of(server_over(ScriptedOwner()))) as port, client_of(port) as client:
        assert client.options(GENERATE, headers=ask).status_code == 405
        answer = client.get("/v1/models", headers=page)
        assert not [name for name in answer.headers if name.startswith("access-control")]
    access = Access(keys=Keys(KEYS), origins=["https://chat.example"])
    with running(app_of(server_over(ScriptedOwner()), access)) as port, client_of(port) as client:
        answer = client.options(GENERATE, headers=ask)
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == "https://chat.example"
        assert "authorization" in answer.headers["access-control-allow-headers"]
        assert "access-control-allow-credentials" not in answer.headers
        key = {"authorization": f"Bearer {KEYS[0][1]}"}
        answer = client.post(GENERATE, json={"prompt": "hi"}, headers=page | key)
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == "https://chat.example"
        assert "x-ratelimit-remaining-tokens" in answer.headers["access-control-expose-headers"]
        # A page can read why it was refused.
        refused = client.post(GENERATE, json={}, headers=page)
        assert refused.status_code == 401
        assert refused.headers["access-control-allow-origin"] == "https://chat.example"
        other = client.options(GENERATE, headers=ask | {"origin": "https://evil.example"})
        assert other.status_code == 400
        assert error_of(other)["code"] == "origin_not_allowed"


def test_ids_go_in_and_out() -> None:
    with running(app_of(server_over(ScriptedOwner()))) as port, client_of(port) as client:
        assert client.get("/v1/models", headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
        made = {client.get("/none").headers["x-request-id"] for _ in range(3)}
        assert len(made) == 3
        assert all(name.startswith("req_") for name in made)
        for wrong in ("v" * 129, "two words", "\u00e9"):
            answer = client.get("/v1/models", headers={"x-request-id": wrong.encode("latin-1")})
            assert answer.headers["x-request-id"].startswith("req_")
        # An object's id is the server's.
        body = {"messages": [{"role": "user", "content": "hi"}], "request_id": "mine-1"}
        answer = client.post("/v1/chat/completions/render", json=body, headers={"x-request-id": "mine-1"})
        assert answer.json()["request_id"].startswith("chatcmpl-")
        assert answer.headers["x-request-id"] == "mine-1"


def test_new_work_is_refused_and_running_work_finishes() -> None:
    owner = ScriptedOwner(LONG, per_step=1, delay=0.01)
    server = server_over(owner)
    server.begin(4096, 1000)
    with running(app_of(server)) as port, client_of(port) as client:
        body = {"prompt": "hi", "stream": True, "params": {"max_tokens": 30}}
        with client.stream("POST", GENERATE, json=body) as answer:
            lines = answer.iter_lines()
            next(lines)
            server.drain()
            refused = client.post(GENERATE, json={"prompt": "hi"})
            assert refused.status_code == 503
            assert error_of(refused)["code"] == "overloaded"
            assert int(refused.headers["retry-after"]) > 0
            assert refused.headers["connection"] == "close"
            for path, status in (("/health/ready", 503), ("/health", 503), ("/health/live", 200)):
                found = client.get(path)
                assert (found.status_code, found.json()) == (status, {"status": "draining"})
            assert client.get("/v1/models").status_code == 200
            assert server.draining.in_flight == 2, "the HTTP request, and the run of the engine"
            rest = list(lines)
        assert rest[-2] == "data: [DONE]"
        wait_for(lambda: not server.draining.in_flight)
    assert not owner.aborted


def test_waiting_for_what_is_in_flight() -> None:
    async def use() -> None:
        drain = Drain()
        assert await drain.wait(0)
        with drain.working():
            drain.begin()
            assert not await drain.wait(0.01)
            waiting = asyncio.ensure_future(drain.wait())
            with drain.working():
                await asyncio.sleep(0)
            assert drain.in_flight == 1
            assert not waiting.done()
        assert await asyncio.wait_for(waiting, 1)
        with pytest.raises(OverloadedError, match="being shut down"):
            drain.check()

    asyncio.run(use())


def test_the_states_of_a_server() -> None:
    class Ending(ScriptedOwner):
        async def ended(self) -> EngineError:
            while not dead.is_set():
                await asyncio.sleep(0.005)
            return EngineError("the device is gone")

    dead = threading.Event()
    server = server_over(Ending())
    with running(app_of(server)) as port, client_of(port) as client:

        def states() -> list[tuple[int, str]]:
            found = [client.get(f"/health{path}") for path in ("", "/ready", "/live")]
            return [(answer.status_code, answer.json()["status"]) for answer in found]

        assert states() == [(503, "starting"), (503, "starting"), (200, "starting")]
        server.begin(4096, 1000)
        assert states() == [(200, "ready")] * 3
        dead.set()
        wait_for(lambda: server.health.failure is not None)
        assert states() == [(503, "failed")] * 3
        assert client.get("/health").json()["reason"] == "the device is gone"
        assert client.head("/health").status_code == 503


def test_models_by_all_their_names() -> None:
    server = server_over(ScriptedOwner(), names=["openai/gpt-oss-20b", "gpt-oss"], created=1234)
    with running(app_of(server)) as port:
        sdk = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="x", max_retries=0)
        listed = list(sdk.models.list())
        assert [model.id for model in listed] == ["openai/gpt-oss-20b", "gpt-oss"]
        for name in ("openai/gpt-oss-20b", "gpt-oss"):
            with client_of(port) as client:
                model = client.get(f"/v1/models/{name}").json()
            openai.types.Model.model_validate(model, strict=True)
            assert model == {
                "id": name,
                "object": "model",
                "created": 1234,
                "owned_by": "gptoss-jax",
                "max_model_len": 4096,
            }
            assert sdk.models.retrieve(name).id == name
        with pytest.raises(openai.NotFoundError) as caught:
            sdk.models.retrieve("gpt-5")
        assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    with running(app_of(server_over(ScriptedOwner()))) as port, client_of(port) as client:
        yield client


def test_text(client: httpx.Client) -> None:
    text = "Hello <|end|> wörld 🦄"
    found = client.post("/tokenize", json={"prompt": text, "return_token_strs": True}).json()
    assert found["tokens"] == PROMPTS.tokenizer.encode(text)
    assert PROMPTS.tokenizer.encode_special("<|end|>") not in found["tokens"]
    assert found["count"] == len(found["tokens"]) == len(found["token_strs"])
    assert found["max_model_len"] == 4096
    assert found["token_strs"][0] == PROMPTS.tokenizer.decode(found["tokens"][:1])
    assert client.post("/detokenize", json={"tokens": found["tokens"]}).json() == {"prompt": text}
    assert client.post("/tokenize", json={"prompt": ""}).json()["tokens"] == []


def test_a_conversation_has_the_tokens_of_its_completion() -> None:
    owner = ScriptedOwner()
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    history = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": None, "refusal": "No."},
        {"role": "user", "content": [{"type": "text", "text": "Go on."}]},
    ]
    body = {"messages": history, "tools": [tool], "reasoning_effort": "high"}
    with running(app_of(server_over(owner))) as port, client_of(port) as client:
        assert client.post("/v1/chat/completions", json=body).status_code == 200
        expected = owner.requests[0].prompt_token_ids
        found = client.post("/tokenize", json=body).json()["tokens"]
        assert found == expected
        more = {"max_tokens": 7, "temperature": 0.5, "logit_bias": {"5": 1.5}, "stream": True, "priority": 3}
        rendered = client.post("/v1/chat/completions/render", json=body | more).json()
        assert rendered["token_ids"] == expected
        sampling = rendered["sampling_params"]
        assert (sampling["max_tokens"], sampling["temperature"], sampling["logit_bias"]) == (7, 0.5, {"5": 1.5})
        assert (rendered["model"], rendered["stream"], rendered["priority"]) == ("gpt-oss-test", True, 3)
        whole = client.post("/tokenize", json=body | {"add_generation_prompt": False}).json()["tokens"]
        start = PROMPTS.tokenizer.encode_special("<|start|>")
        assert found == [*whole, start, *PROMPTS.tokenizer.encode("assistant")]
        text = client.post("/detokenize", json={"tokens": whole}).json()["prompt"]
    assert len(owner.requests) == 1
    assert text.startswith("<|start|>system<|message|>")
    assert text.endswith("<|start|>user<|message|>Go on.<|end|>")


def test_errors_name_the_field(client: httpx.Client) -> None:
    for path, body, param in (
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": []}, "prompt"),
        ("/tokenize", {"prompt": 1}, "prompt"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"messages": [{"role": "user", "content": 1}]}, "messages[0].content"),
        ("/tokenize", {"messages": [], "continue_final_message": True}, "continue_final_message"),
        ("/detokenize", {"tokens": [-1]}, "tokens[0]"),
        ("/detokenize", {"tokens": [1, 2**30]}, "tokens[1]"),
        ("/detokenize", {"tokens": [2**70]}, "tokens[0]"),
        ("/detokenize", {}, None),
    ):
        answer = client.post(path, json=body)
        assert answer.status_code == 400
        assert error_of(answer)["param"] == param
    assert client.post("/tokenize", json={"prompt": "a", "model": "gpt-5"}).status_code == 404


@pytest.mark.parametrize("body", [{"prompt": "a"}, {"messages": [{"role": "user", "content": "hi"}]}])
def test_long_text_does_not_hold_up_others(
    client: httpx.Client, body: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    began, finish = threading.Event(), threading.Event()

    def encode(self: Tokenizer, text: str) -> list[int]:
        began.set()
        assert finish.wait(5)
        return [1]

    monkeypatch.setattr(Tokenizer, "encode", encode)
    answers = []
    asking = threading.Thread(target=lambda: answers.append(client.post("/tokenize", json=body)))
    asking.start()
    assert began.wait(5)
    with httpx.Client(base_url=client.base_url, timeout=2) as other:
        assert other.get("/health/live").status_code == 200
    finish.set()
    asking.join(10)
    assert answers[0].status_code == 200


def test_a_refused_grammar_never_reaches_the_engine(scripted: ScriptedOwner) -> None:
    server = server_over(scripted, grammars=GrammarChecks(processes=1))
    with running(app_of(server)) as port, client_of(port) as client:
        for constraint, status in (({"json": {"type": "object"}}, 200), ({"regex": "("}, 400)):
            params = {"structured_outputs": constraint}
            answer = client.post(GENERATE, json={"prompt": "hi", "params": params})
            assert answer.status_code == status
        assert error_of(answer)["param"] == "structured_outputs.regex"
    assert len(scripted.requests) == 1


def test_the_document_has_every_route_and_nothing_else() -> None:
    app = app_of(server_over(ScriptedOwner()))
    with running(app) as port, client_of(port) as client:
        document = client.get("/openapi.json").json()
    assert document["openapi"] == "3.1.0"
    served = {(path, method.lower()) for key, path, method in openapi.operations(app.routes) if path != GENERATE}
    described = {(path, method) for path, item in document["paths"].items() for method in item}
    assert described == served
    for references in _references(document):
        target: Any = document
        for part in references.removeprefix("#/").split("/"):
            target = target[part]
    assert document["paths"]["/health"]["get"]["security"] == []
    [parameter] = document["paths"]["/v1/models/{id}"]["get"]["parameters"]
    assert (parameter["name"], parameter["in"], parameter["required"]) == ("id", "path", True)
    assert set(document["components"]["schemas"]["TokenizeResponse"]["required"]) >= {"count", "tokens"}
    body = document["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]
    assert body["schema"] == {"$ref": "#/components/schemas/ChatRequest"}
    assert "messages" in document["components"]["schemas"]["ChatRequest"]["properties"]


def test_what_the_document_names_is_known() -> None:
    """Types are for operations that there are, and all types of bodies of the application are described."""
    assert BODIES.keys() <= {key for key, one in openapi.OPERATIONS.items() if one.body}


def _references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(value.get("$ref"), str):
            yield value["$ref"]
        for inner in value.values():
            yield from _references(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _references(inner)


def test_a_client_that_leaves_within_its_body_is_not_logged(
    scripted: ScriptedOwner, caplog: pytest.LogCaptureFixture
) -> None:
    import socket

    with running(app_of(server_over(scripted))) as port:
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(f"POST {GENERATE} HTTP/1.1\r\nHost: a\r\nContent-Length: 99\r\n\r\n{{".encode())
            time.sleep(0.05)
        time.sleep(0.1)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
