import asyncio

import pytest

from gptoss_jax.serving.api.disconnect import while_connected
from gptoss_jax.serving.api.errors import ApiError


async def _never():
    await asyncio.Event().wait()


async def _left():
    return {"type": "http.disconnect"}


def _run(receive, work):
    return asyncio.run(while_connected(receive, work))


def test_work_gives_its_result_and_its_error():
    async def fine():
        await asyncio.sleep(0)
        return 42

    async def failing():
        raise ValueError("as it is")

    assert _run(_never, fine()) == 42
    with pytest.raises(ValueError, match="as it is"):
        _run(_never, failing())


def test_work_is_cancelled_when_the_client_leaves():
    ended = []

    async def work():
        try:
            await _never()
        finally:
            ended.append(True)

    with pytest.raises(ApiError) as caught:
        _run(_left, work())
    assert caught.value.status == 499
    assert ended == [True]


def test_work_is_cancelled_with_the_handler():
    ended = []

    async def work():
        try:
            await _never()
        finally:
            ended.append(True)

    async def cancelled():
        handler = asyncio.ensure_future(while_connected(_never, work()))
        await asyncio.sleep(0.01)
        handler.cancel()
        await asyncio.wait((handler,))
        return handler.cancelled()

    assert asyncio.run(cancelled())
    assert ended == [True]
