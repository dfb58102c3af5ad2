"""The link between the engine's process and the front."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from benchmarks.fake_engine import FakeEngine
from gptoss_jax.errors import EngineError, UsageError
from gptoss_jax.serving.generated import Request
from gptoss_jax.serving.link.engine_end import EngineEnd
from gptoss_jax.serving.link.front_end import FrontEnd
from gptoss_jax.serving.worker import Worker
from gptoss_jax.types import SamplingParams, TokenLogprobs


@contextlib.asynccontextmanager
async def linked(engine: Any) -> AsyncIterator[tuple[FrontEnd, Worker]]:
    own, front = socket.socketpair()
    worker = Worker(engine)
    serving = threading.Thread(target=EngineEnd(own, engine, worker).serve, daemon=True)
    serving.start()
    owner = await FrontEnd.connect(front)
    try:
        yield owner, worker
    finally:
        owner.close()
        await asyncio.to_thread(serving.join, 5)
        assert not serving.is_alive()
        worker.close()
        own.close()


def run(engine: Any, use: Callable[[FrontEnd, Worker], Awaitable[None]]) -> None:
    async def main() -> None:
        async with asyncio.timeout(20), linked(engine) as ends:
            await use(*ends)

    asyncio.run(main())


def request(max_tokens: int = 5, prompt: tuple[int, ...] = (1, 2), n: int = 1) -> Request:
    return Request("r", list(prompt), SamplingParams(max_tokens=max_tokens, n=n))


async def all_tokens(owner: FrontEnd, asked: Request) -> dict[int, list[int]]:
    stream, found, left = await owner.submit(asked), {}, asked.params.n
    while left:
        for event in await stream.events():
            if event.error:
                raise event.error
            found.setdefault(event.index, []).append(event.token_id)
            left -= event.finish_reason is not None
    stream.close()
    return found


def test_each_request_gets_its_own_tokens() -> None:
    async def use(owner: FrontEnd, worker: Worker) -> None:
        ready = await owner.ready
        assert (ready.max_model_len, ready.vocab_size) == (131_072, 201_088)
        lengths = [1, 7, 30, 3] * 10
        found = await asyncio.gather(*(all_tokens(owner, request(n, n=1 + n % 2)) for n in lengths))
        assert found == [{i: ([*range(10, 15)] * 6)[:n] for i in range(1 + n % 2)} for n in lengths]
        assert not owner._streams
        assert not (await owner.load()).running

    run(FakeEngine(list(range(10, 15)), 0.001), use)


def test_a_request_that_can_never_run_is_refused_with_its_field() -> None:
    async def use(owner: FrontEnd, worker: Worker) -> None:
        with pytest.raises(UsageError, match="fewer tokens") as caught:
            await owner.submit(request(prompt=(1,) * 200_000))
        assert caught.value.field == "prompt"

    run(FakeEngine([1], 0.001), use)


def test_an_aborted_request_ends_in_the_engine() -> None:
    async def use(owner: FrontEnd, worker: Worker) -> None:
        stream = await owner.submit(request(100_000))
        await stream.events()
        stream.abort()
        while (await owner.load()).running:
            await asyncio.sleep(0.01)
        # One that is aborted before the engine has answered.
        asking = asyncio.ensure_future(owner.submit(request(100_000)))
        await asyncio.sleep(0)
        asking.cancel()
        await asyncio.sleep(0.05)
        assert not (await owner.load()).running

    run(FakeEngine([1], 0.001), use)


def test_requests_end_with_the_front() -> None:
    engine = FakeEngine([1], 0.001)

    async def use(owner: FrontEnd, worker: Worker) -> None:
        await owner.submit(request(100_000))
        owner.close()
        while engine.busy:
            await asyncio.sleep(0.01)

    run(engine, use)


class Dying(FakeEngine):
    def step(self) -> list[Any]:
        if self.tokens > 5:
            raise RuntimeError("the device is gone")
        return super().step()


def test_the_front_learns_why_the_engine_ended() -> None:
    async def use(owner: FrontEnd, worker: Worker) -> None:
        with pytest.raises(EngineError, match="the device is gone"):
            await all_tokens(owner, request(100))
        assert "the device is gone" in str(await owner.ended())
        with pytest.raises(EngineError, match="the device is gone"):
            await owner.submit(request())
        with pytest.raises(EngineError, match="the device is gone"):
            await owner.load()

    run(Dying([1], 0.001), use)


def test_a_dead_engine_process_ends_what_waits() -> None:
    async def main() -> None:
        own, front = socket.socketpair()
        owner = await FrontEnd.connect(front)
        waiting = asyncio.ensure_future(owner.submit(request()))
        await asyncio.sleep(0.01)
        own.close()
        with pytest.raises(EngineError, match="process has ended"):
            await waiting
        assert owner.ready.cancelled()

    asyncio.run(main())


def test_logprobs_and_errors_cross_the_link() -> None:
    from gptoss_jax.engine.outputs import TokenEvent
    from gptoss_jax.serving.link.messages import HEADER, Events, decode_reply, encoded, packed, unpacked

    given = [
        TokenEvent(
            "7", 1, 5, TokenLogprobs(5, -0.5, {5: -0.5, 6: -1.0}), [None, TokenLogprobs(1, -2.0, {})], "stop", 3
        ),
        TokenEvent("7", 0, -1, finish_reason="error", error=UsageError("wrong", "max_tokens")),
        TokenEvent("8", 0, 9, queue_seconds=1.5),
        TokenEvent("9", 0, 9),
    ]
    reply = decode_reply(encoded(Events([packed(event) for event in given]))[HEADER.size :])
    assert isinstance(reply, Events)
    found = [unpacked(fields) for fields in reply.events]
    error = found[1].error
    assert isinstance(error, UsageError)
    assert (error.message, error.field) == ("wrong", "max_tokens")
    found[1].error = given[1].error = None
    assert found == given
