"""What requests may cost: rates and concurrency of each key, and time limits."""

from __future__ import annotations

import contextvars
import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from typing import Self

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gptoss_jax.errors import OverloadedError
from gptoss_jax.serving.api.errors import ApiError, as_api_error, bad_request
from gptoss_jax.serving.api.middleware import is_health, refuse, starts_work, state_of

TIMEOUT_HEADER = "x-request-timeout"
"""A request's own time limit, in seconds."""


@dataclasses.dataclass(frozen=True)
class KeyLimits:
    """What each key may use; None for no limit. Without keys, all clients share one set of limits.

    Args:
      concurrent_requests: requests that run at once.
      requests_per_minute: requests for new work.
      tokens_per_minute: tokens of prompts and completions.
    """

    concurrent_requests: int | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None


class Bucket:
    """An allowance that refills evenly up to `per_minute`.

    It may be overdrawn, since a completion's length is not known before, and then has to refill first.
    """

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.per_minute, self._clock = per_minute, clock
        self._level, self._at = float(per_minute), clock()

    @property
    def level(self) -> float:
        """What is left."""
        now = self._clock()
        self._level = min(self.per_minute, self._level + (now - self._at) * self.per_minute / 60)
        self._at = now
        return self._level

    def spend(self, amount: int) -> None:
        """Take an amount, whether it is there or not."""
        self._level = self.level - amount

    def seconds_until(self, amount: float) -> float:
        """Seconds until `amount` is left, if nothing more is spent."""
        return max(0.0, (amount - self.level) * 60 / self.per_minute)


class _Account:
    """What a key has used."""

    def __init__(self, limits: KeyLimits) -> None:
        self.limits = limits
        self.running = 0
        self.requests = _bucket(limits.requests_per_minute)
        self.tokens = _bucket(limits.tokens_per_minute)

    def take(self) -> None:
        """Count a new request. Raises ApiError if it is one too many."""
        most = self.limits.concurrent_requests
        if most is not None and self.running >= most:
            raise _exceeded("concurrent_requests", f"at most {most} requests may run at once", 1)
        if self.requests and self.requests.level < 1:
            text = f"the limit is {self.requests.per_minute} requests per minute"
            raise _exceeded("requests", text, self.requests.seconds_until(1))
        if self.tokens and self.tokens.level < 1:
            text = f"the limit is {self.tokens.per_minute} tokens per minute"
            raise _exceeded("tokens", text, self.tokens.seconds_until(1))
        if self.requests:
            self.requests.spend(1)

    def headers(self) -> Iterator[tuple[str, str]]:
        for what, bucket in (("requests", self.requests), ("tokens", self.tokens)):
            if bucket:
                yield f"x-ratelimit-limit-{what}", str(bucket.per_minute)
                yield f"x-ratelimit-remaining-{what}", str(max(0, math.floor(bucket.level)))
                yield f"x-ratelimit-reset-{what}", _duration(bucket.seconds_until(bucket.per_minute))
        if (most := self.limits.concurrent_requests) is not None:
            yield "x-ratelimit-limit-concurrent-requests", str(most)
            yield "x-ratelimit-remaining-concurrent-requests", str(max(0, most - self.running))


def _bucket(per_minute: int | None) -> Bucket | None:
    return None if per_minute is None else Bucket(per_minute)


class Grant:
    """The place of a request within its key's limits.

    The HTTP request and each of its runs of the engine hold it, so that a response in the background counts as running
    until it has ended.
    """

    def __init__(self, account: _Account, timeout: float | None) -> None:
        self.timeout = timeout
        self._account, self._holders = account, 0

    def __enter__(self) -> Self:
        self._holders += 1
        self._account.running += self._holders == 1
        return self

    def __exit__(self, *_: object) -> None:
        self._holders -= 1
        self._account.running -= self._holders == 0

    def charge_prompt(self, tokens: int) -> None:
        """Spend the tokens of a prompt. Raises ApiError if the key's allowance does not have them."""
        bucket = self._account.tokens
        if bucket is None:
            return
        if tokens > bucket.per_minute:
            text = f"the limit is {bucket.per_minute} tokens per minute, and the prompt has {tokens}"
            error = _exceeded("tokens", text, 60)
            error.headers["x-should-retry"] = "false"
            raise error
        if tokens > bucket.level:
            text = f"the limit is {bucket.per_minute} tokens per minute, and the prompt has {tokens}"
            raise _exceeded("tokens", text, bucket.seconds_until(tokens))
        bucket.spend(tokens)

    def charge(self, tokens: int) -> None:
        """Spend generated tokens."""
        if self._account.tokens and tokens:
            self._account.tokens.spend(tokens)


_current: contextvars.ContextVar[Grant | None] = contextvars.ContextVar("grant", default=None)


def current_grant() -> Grant | None:
    """The grant of the HTTP request that the caller works for; also in the tasks that it has started."""
    return _current.get()


class RateLimits:
    """ASGI middleware that holds each key to its limits, and the server to `max_requests` requests at once.

    All answers have `x-ratelimit-*` headers. A request's time limit is the smaller of `timeout` and its header
    `x-request-timeout`, in seconds.
    """

    def __init__(
        self,
        app: ASGIApp,
        limits: KeyLimits | None = None,
        max_requests: int | None = None,
        timeout: float | None = None,
        shed: Callable[[str], None] = lambda cause: None,
    ) -> None:
        self._app, self._limits, self._max, self._timeout = app, limits or KeyLimits(), max_requests, timeout
        self._shed = shed
        self._running = 0
        self._accounts: dict[str | None, _Account] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request, as an ASGI application."""
        if scope["type"] != "http" or is_health(scope):
            return await self._app(scope, receive, send)
        key = state_of(scope).get("key_name")
        account = self._accounts.setdefault(key, _Account(self._limits))

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in account.headers():
                    headers[name] = value
            await send(message)

        # Each event of a stream passes through it, so it is only there if it has something to add.
        answer = with_headers if self._limits != KeyLimits() else send
        if not starts_work(scope):
            return await self._app(scope, receive, answer)
        try:
            grant = self._admit(account, Headers(scope=scope))
        except (ApiError, OverloadedError) as error:
            return await refuse(as_api_error(error), scope, receive, answer)
        self._running += 1
        token = _current.set(grant)
        try:
            with grant:
                await self._app(scope, receive, answer)
        finally:
            _current.reset(token)
            self._running -= 1

    def _admit(self, account: _Account, headers: Headers) -> Grant:
        timeout = _timeout(headers.get(TIMEOUT_HEADER), self._timeout)
        if self._max is not None and self._running >= self._max:
            self._shed("requests_at_once")
            raise OverloadedError(
                f"overloaded: {self._running} requests are being answered, at most {self._max} may"
            )
        try:
            account.take()
        except ApiError as error:
            self._shed(error.kind)
            raise
        return Grant(account, timeout)


def _timeout(text: str | None, most: float | None) -> float | None:
    if text is None:
        return most
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise bad_request(f"{TIMEOUT_HEADER}: expected a number of seconds above 0, found {text!r:.40}")
    return seconds if most is None else min(seconds, most)


def _exceeded(kind: str, text: str, seconds: float) -> ApiError:
    """A refusal for a key's limits, with OpenAI's code."""
    wait = max(1, math.ceil(seconds))
    headers = {"retry-after": str(wait)}
    message = f"rate limit reached: {text}; try again in {_duration(wait)}"
    return ApiError(429, message, kind, code="rate_limit_exceeded", headers=headers)


def _duration(seconds: float) -> str:
    """A time as OpenAI writes it, such as 6m0s or 1.5s."""
    minutes, rest = divmod(round(seconds, 3), 60)
    return f"{minutes:.0f}m{rest:.3g}s" if minutes else f"{rest:g}s"
