"""The owner of an engine: one thread that runs its steps, for any number of clients in other threads.

Clients submit requests and read their events from an `Inbox`. All calls of the engine are made by the worker's thread,
one after another, so clients in any threads, or nested in each other, never disturb one another.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import heapq
import itertools
import os
import queue
import threading
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np

from gptoss_jax.engine.compiling import as_in_this_thread
from gptoss_jax.engine.engine import Engine
from gptoss_jax.engine.outputs import Load, TokenEvent
from gptoss_jax.errors import DeadlineError, EngineError, OverloadedError
from gptoss_jax.types import SamplingParams, Scope

INBOX_EVENTS = 4096
"""Unread events of a request at which it is held until its reader has read half of them."""

FAILURES = 2
"""The engine ends after so many failures of the device with no token between them."""


class Inbox:
    """Events of one client's requests, until it reads them.

    A client that does not read slows its own requests: they are held while more than `INBOX_EVENTS` events for each of
    them are unread.

    Args:
      wake: called, from the worker's thread, when there is something to read again.
      each: whether to read each event as it comes, or many at once: when a request ends.
    """

    def __init__(self, wake: Callable[[], None] | None = None, each: bool = True) -> None:
        self._wake, self._each = wake, each
        self._ready = False
        self._condition = threading.Condition()
        self._events: list[TokenEvent] = []
        self._resume: Callable[[], object] | None = None
        self._names: set[str] = set()

    def get(self, timeout: float | None = None) -> list[TokenEvent]:
        """All unread events, once there are any; [] if none comes within `timeout` seconds."""
        with self._condition:
            self._condition.wait_for(lambda: self._ready, timeout)
            events, self._events, self._ready = self._events, [], False
            resume, self._resume = self._resume, None
        if resume:
            resume()
        return events

    def _put(self, events: list[TokenEvent], resume: Callable[[], object]) -> bool:
        """Add events; returns whether the reader is too far behind, and then calls `resume` when it has read them."""
        with self._condition:
            waited = self._ready
            self._events += events
            behind = len(self._events) > INBOX_EVENTS * max(1, len(self._names))
            if behind:
                self._resume = resume
            if not self._ready and (self._each or behind or any(event.finish_reason for event in events)):
                self._ready = True
                self._condition.notify_all()
        if self._wake and self._ready and not waited:
            with contextlib.suppress(Exception):
                # What a client's function does concerns the client alone.
                self._wake()
        return behind


@dataclasses.dataclass(eq=False)
class _Request:
    """A request that the engine has, and who waits for it; `left` completions are unfinished."""

    inbox: Inbox
    left: int
    tokens: int
    started: bool = False


class Worker:
    """A thread that owns an engine.

    Args:
      engine: the engine, which nothing else may call from now on, except for `check`.
      max_queued_requests, max_queued_tokens: requests, and tokens of their prompts, that may wait for their first
        token; `submit` rejects more.
    """

    def __init__(
        self, engine: Engine, max_queued_requests: int | None = None, max_queued_tokens: int | None = None
    ) -> None:
        self._engine = engine
        self._max_requests, self._max_tokens = max_queued_requests, max_queued_tokens
        self._commands: queue.SimpleQueue[Callable[[], Any] | None] = queue.SimpleQueue()
        self._requests: dict[str, _Request] = {}
        # A heap, whose entries stay until they are due or first, whatever becomes of their requests.
        self._deadlines: list[tuple[float, str]] = []
        self._names = map(str, itertools.count())
        self._lock = threading.Lock()
        self._queued = self._queued_tokens = 0
        self._ended: EngineError | None = None
        self._draining = False
        self._idle = threading.Event()
        self._idle.set()
        self._failures = self._failed_in_a_row = 0
        self._programs = -1
        self._pid = os.getpid()
        run = as_in_this_thread(lambda _: self._run())
        self._thread = threading.Thread(target=run, args=(None,), name="gptoss-jax engine", daemon=True)
        self._thread.start()

    def submit(
        self,
        prompt_token_ids: Iterable[int],
        params: SamplingParams,
        inbox: Inbox,
        scope: Scope = "text",
        *,
        priority: int = 0,
        timeout: float | None = None,
    ) -> str:
        """Queue a request; returns the name that its events have as `request_id`.

        A request that has not finished `timeout` seconds from now fails, and one that can never run fails with
        UsageError. Raises EngineError if the engine takes no requests.
        """
        self._check_process()
        prompt = prompt_token_ids if isinstance(prompt_token_ids, np.ndarray) else list(prompt_token_ids)
        deadline = None if timeout is None else time.monotonic() + timeout
        request = _Request(inbox, params.n, len(prompt))
        with self._lock:
            self._check_room(len(prompt))
            name = next(self._names)
            self._queued += 1
            self._queued_tokens += request.tokens
            self._idle.clear()
            self._commands.put(lambda: self._add(name, request, deadline, prompt, params, scope, priority))
        return name

    def abort(self, name: str, index: int | None = None) -> None:
        """Drop a request, or one of its completions; no events of it follow. Unknown names are ignored."""
        self._tell(lambda: self._drop(name) if index is None else self._stop(name, index))

    def leave(self, inbox: Inbox) -> None:
        """Drop all requests of a client."""

        def drop() -> None:
            for name in list(inbox._names):
                self._drop(name)

        self._tell(drop)

    def load(self) -> Load:
        """The engine's load."""
        return self.call(lambda engine: engine.load)

    @property
    def reason(self) -> EngineError | None:
        """Why the engine has ended; None while it runs."""
        return self._ended

    def join(self) -> EngineError:
        """Wait until the engine has ended; returns the reason."""
        self._thread.join()
        assert self._ended is not None
        return self._ended

    def call[T](self, function: Callable[[Engine], T]) -> T:
        """The result of a function of the engine, called between two steps. Raises EngineError once it has ended."""
        self._check_process()
        done, results, errors = threading.Event(), [], []

        def command() -> None:
            try:
                if self._ended:
                    raise self._ended
                results.append(function(self._engine))
            except BaseException as error:
                errors.append(error)
            done.set()

        if not self._tell(command):
            assert self._ended is not None
            raise self._ended
        done.wait()
        if errors:
            raise errors[0]
        return results[0]

    def drain(self, timeout: float | None = None) -> bool:
        """Take no more requests, and wait for those that there are; returns whether all have finished in time."""
        with self._lock:
            self._draining = True
        return self._idle.wait(timeout)

    def close(self) -> None:
        """End the thread between two steps; requests that have not finished fail."""
        if os.getpid() != self._pid:
            return
        self._tell(None)
        if self._thread is not threading.current_thread():
            self._thread.join()

    def _tell(self, command: Callable[[], Any] | None) -> bool:
        with self._lock:
            if self._ended is None:
                self._commands.put(command)
            return self._ended is None

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise EngineError(
                f"the engine runs in process {self._pid}, from which this one was forked; create the LLM after the "
                "fork, or start processes by spawning"
            )

    def _check_room(self, tokens: int) -> None:
        if self._ended or self._draining:
            raise self._ended or OverloadedError("the engine is being shut down and takes no requests")
        for limit, count, what in (
            (self._max_requests, self._queued + 1, "requests"),
            (self._max_tokens, self._queued_tokens + tokens, "prompt tokens"),
        ):
            if limit is not None and count > limit:
                raise OverloadedError(f"overloaded: {count} {what} would wait, at most {limit} may")

    def _run(self) -> None:
        reason = EngineError("the engine was closed")
        try:
            while self._take_commands():
                self._expire()
                if self._engine.busy:
                    self._deliver(self._engine.step())
        except BaseException as error:
            text = str(error).strip().partition("\n")[0]
            reason = error if isinstance(error, EngineError) else EngineError(f"{type(error).__name__}: {text}")
            reason.__cause__ = error if reason is not error else None
        self._end(reason)

    def _take_commands(self) -> bool:
        """Carry out what clients asked for, waiting if there is nothing else to do; False to end."""
        while True:
            try:
                busy = self._engine.busy
                if not busy:
                    self._keep_from_collector()
                command = self._commands.get(timeout=0 if busy else self._patience())
            except queue.Empty:
                return True
            if command is None:
                return False
            command()

    def _patience(self) -> float | None:
        while self._deadlines and self._deadlines[0][1] not in self._requests:
            heapq.heappop(self._deadlines)
        return max(0.0, self._deadlines[0][0] - time.monotonic()) if self._deadlines else None

    def _keep_from_collector(self) -> None:
        """Exclude what is there from garbage collection, which takes 0.2 s each time: mostly traces and programs."""
        if self._programs != (programs := self._engine.programs):
            self._programs = programs
            gc.freeze()

    def _add(
        self,
        name: str,
        request: _Request,
        deadline: float | None,
        prompt: list[int] | np.ndarray,
        params: SamplingParams,
        scope: Scope,
        priority: int,
    ) -> None:
        self._requests[name] = request
        request.inbox._names.add(name)
        if deadline is not None:
            heapq.heappush(self._deadlines, (deadline, name))
        try:
            if self._ended:
                raise self._ended
            self._engine.add(name, prompt, params, scope, priority)
        except Exception as error:
            self._fail(name, error)

    def _fail(self, name: str, error: Exception) -> None:
        """End a request that the engine does not have any more."""
        event = TokenEvent(name, 0, -1, finish_reason="error", error=error)
        self._requests[name].inbox._put([event], lambda: None)
        self._forget(name)

    def _forget(self, name: str) -> None:
        request = self._requests.pop(name)
        request.inbox._names.discard(name)
        if not request.started:
            self._start(request)
        if not self._requests:
            with self._lock:
                if not self._queued:
                    self._idle.set()

    def _start(self, request: _Request) -> None:
        request.started = True
        with self._lock:
            self._queued -= 1
            self._queued_tokens -= request.tokens

    def _drop(self, name: str) -> None:
        if name in self._requests and not self._ended:
            self._engine.cancel(name)
            self._forget(name)

    def _stop(self, name: str, index: int) -> None:
        if (request := self._requests.get(name)) and not self._ended:
            self._engine.stop(name, index)
            self._finished(name, request)

    def _finished(self, name: str, request: _Request) -> None:
        request.left -= 1
        if not request.left:
            self._forget(name)

    def _expire(self) -> None:
        while self._deadlines and self._deadlines[0][0] <= time.monotonic():
            _, name = heapq.heappop(self._deadlines)
            if name in self._requests:
                self._engine.cancel(name)
                self._fail(name, DeadlineError("the request's time limit was reached"))

    def _deliver(self, events: list[TokenEvent]) -> None:
        """Hand out the events of a step, and hold the requests of readers that are too far behind."""
        by_inbox: dict[Inbox, list[TokenEvent]] = {}
        for event in events:
            request = self._requests.get(event.request_id)
            if request is None:
                continue
            by_inbox.setdefault(request.inbox, []).append(event)
            if not request.started:
                self._start(request)
            if event.error is not None:
                self._forget(event.request_id)
            elif event.finish_reason:
                self._finished(event.request_id, request)
        for inbox, own in by_inbox.items():
            if inbox._put(own, partial(self._tell, partial(self._release, inbox))):
                for name in inbox._names:
                    self._engine.hold(name)
        self._note_failures(events)

    def _release(self, inbox: Inbox) -> None:
        if not self._ended:
            for name in inbox._names:
                self._engine.release(name)

    def _note_failures(self, events: list[TokenEvent]) -> None:
        """End the engine if the device failed twice and computed nothing between. Raises EngineError."""
        if self._failures != (failures := self._engine.failures):
            self._failures = failures
            self._failed_in_a_row += 1
            reason = next((event.error for event in events if event.error is not None), None)
            if self._failed_in_a_row >= FAILURES:
                raise EngineError(f"the device failed {FAILURES} times in a row: {reason}")
        elif any(event.error is None for event in events):
            self._failed_in_a_row = 0

    def _end(self, reason: EngineError) -> None:
        """Take no more requests, and fail all that there are."""
        with self._lock:
            self._ended = reason
        with contextlib.suppress(queue.Empty):
            while True:
                if command := self._commands.get_nowait():
                    command()
        for name in list(self._requests):
            self._fail(name, reason)
        self._idle.set()
        gc.unfreeze()
