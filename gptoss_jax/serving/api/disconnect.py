"""Ends the work of a request whose client has left."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from starlette.types import Receive

from gptoss_jax.serving.api.errors import ApiError


async def disconnected(receive: Receive) -> None:
    """Returns once the client has left; the request's body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def while_connected[T](receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled as soon as the client leaves; the request's body must have been read.

    Work that reads an async generator closes it with `contextlib.aclosing`, so that its request is aborted at once.
    Raises ApiError with the status 499, which nobody receives, if the client has left.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(disconnected(receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        left = not working.done()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.wait((working, leaving))
    if left:
        if not working.cancelled():
            working.exception()
        raise ApiError(499, "the client closed the connection")
    return working.result()
