"""One thread owns the engine: clients in any threads get their own tokens, whatever the others do."""

import dataclasses
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from gptoss_jax.engine.engine import Engine
from gptoss_jax.engine.outputs import TokenEvent
from gptoss_jax.errors import EngineError, UsageError
from gptoss_jax.serving import worker as workers
from gptoss_jax.serving.worker import Inbox, Worker
from gptoss_jax.types import SamplingParams
from tests.engine.schedules import OPTIONS, TINY, assert_empty, tiny

Prompt = tuple[int, ...]


def engine(**options: Any) -> Engine:
    return Engine(tiny(), dataclasses.replace(OPTIONS, **options), eos_token_ids=())


@pytest.fixture
def worker() -> Iterator[Worker]:
    own = Worker(engine())
    yield own
    own.close()


def prompt_of(seed: int) -> Prompt:
    rng = random.Random(seed)
    return tuple(rng.randrange(TINY.vocab_size) for _ in range(rng.randrange(1, 30)))


def params_of(seed: int) -> SamplingParams:
    return SamplingParams(max_tokens=20 if seed == 19 else 1 + seed % 6, temperature=float(seed % 2), seed=seed)


def read(inbox: Inbox, *names: str) -> dict[str, list[int]]:
    """The tokens of these requests, once all have finished. Raises the error of one that failed."""
    out: dict[str, list[int]] = {name: [] for name in names}
    left = set(names)
    while left:
        for event in inbox.get(60):
            if event.error is not None:
                raise event.error
            out[event.request_id].append(event.token_id)
            if event.finish_reason:
                left.remove(event.request_id)
    return out


@pytest.fixture(scope="module")
def alone() -> Callable[[int], list[int]]:
    """The tokens of a request that runs alone."""
    own, known = engine(), dict[int, list[int]]()

    def tokens(seed: int) -> list[int]:
        if seed not in known:
            own.add("0", prompt_of(seed), params_of(seed))
            events: list[TokenEvent] = []
            while own.unfinished:
                events += own.step()
            known[seed] = [event.token_id for event in events]
        return known[seed]

    return tokens


def test_many_threads_get_their_own_tokens(worker: Worker, alone: Callable[[int], list[int]]) -> None:
    """64 threads with 4 requests each: some abort theirs, some read slowly, some stop reading."""
    expected = {seed: alone(seed) for seed in range(16)}

    def client(number: int) -> None:
        rng, inbox = random.Random(number), Inbox()
        seeds = [rng.randrange(16) for _ in range(4)]
        names = {worker.submit(prompt_of(seed), params_of(seed), inbox): seed for seed in seeds}
        if number % 4 == 1:
            for name in list(names):
                worker.abort(name)
            return
        if number % 4 == 2:
            time.sleep(0.2 * rng.random())
        out = read(inbox, *names)
        assert {name: expected[seed] for name, seed in names.items()} == out

    with ThreadPoolExecutor(64) as pool:
        list(pool.map(client, range(64)))
    assert worker.drain(60)
    worker.call(lambda own: assert_empty(own))


def test_a_reader_that_never_reads_holds_its_own_request(
    worker: Worker, alone: Callable[[int], list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "INBOX_EVENTS", 4)
    slow, quick = Inbox(), Inbox()
    name = worker.submit(prompt_of(19), params_of(19), slow)
    while worker.load().waiting or worker.load().running:
        time.sleep(0.01)
    load = worker.load()
    assert (load.running, load.waiting, load.pages_used) == (0, 0, 0)
    # Others run meanwhile.
    others = [worker.submit(prompt_of(seed), params_of(seed), quick) for seed in range(6)]
    assert list(read(quick, *others).values()) == [alone(seed) for seed in range(6)]
    assert len(slow._events) < len(alone(19)) == 20
    assert read(slow, name)[name] == alone(19)


def test_a_request_that_cannot_run_fails_alone(worker: Worker, alone: Callable[[int], list[int]]) -> None:
    bad, good = Inbox(), Inbox()
    first = worker.submit([TINY.vocab_size], params_of(3), bad)
    second = worker.submit(prompt_of(3), params_of(3), good)
    with pytest.raises(UsageError, match="outside the vocabulary"):
        read(bad, first)
    assert read(good, second)[second] == alone(3)


def test_priorities_and_time_limits(worker: Worker) -> None:
    inbox, started = Inbox(), []
    release = threading.Event()
    blocked = threading.Thread(target=worker.call, args=(lambda _: release.wait(60),))
    blocked.start()
    params = SamplingParams(max_tokens=2, temperature=0)
    names = [worker.submit([1, 2, 3], params, inbox, priority=-i) for i in range(12)]
    late = worker.submit(prompt_of(1), params, other := Inbox(), priority=1, timeout=0.0)
    release.set()
    blocked.join()
    with pytest.raises(EngineError, match="time limit"):
        read(other, late)
    while len(started) < 24:
        started += [event.request_id for event in inbox.get(60)]
    assert list(dict.fromkeys(started)) == names[::-1]


def test_more_than_may_wait_is_rejected() -> None:
    own, release, inbox = Worker(engine(), 2, 50), threading.Event(), Inbox()
    blocked = threading.Thread(target=own.call, args=(lambda _: release.wait(60),))
    blocked.start()
    params = SamplingParams(max_tokens=1)
    name = own.submit([1] * 20, params, inbox)
    with pytest.raises(EngineError, match="overloaded: 51 prompt tokens would wait, at most 50 may"):
        own.submit([1] * 31, params, inbox)
    own.submit([1], params, inbox)
    with pytest.raises(EngineError, match="overloaded: 3 requests would wait, at most 2 may"):
        own.submit([1], params, inbox)
    release.set()
    blocked.join()
    assert own.drain(60)
    with pytest.raises(EngineError, match="takes no requests"):
        own.submit([1], params, inbox)
    assert name in {event.request_id for event in inbox.get(60)}
    own.close()


def test_two_failures_in_a_row_end_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    own = engine()
    start, broken = own._runner.start, [1]

    def fails(launched: Any) -> None:
        start(launched)
        if broken:
            broken.pop()
            for array in own._runner._state.cache.stores:
                array.delete()
            raise RuntimeError("the device is gone")

    monkeypatch.setattr(own._runner, "start", fails)
    worker, params = Worker(own), SamplingParams(max_tokens=3)
    inbox = Inbox()
    with pytest.raises(RuntimeError, match="the device is gone"):
        read(inbox, worker.submit([1, 2], params, inbox))
    # One failure concerns its own requests; once a token has been computed, it is forgotten.
    read(inbox, worker.submit([1, 2], params, inbox))
    broken += [1, 1, 1]
    for _ in range(2):
        with pytest.raises((RuntimeError, EngineError), match="the device is gone"):
            read(inbox, worker.submit([1, 2], params, inbox))
    worker._thread.join(60)
    with pytest.raises(EngineError, match="the device failed 2 times in a row: the device is gone"):
        worker.submit([1, 2], params, inbox)
    with pytest.raises(EngineError, match="2 times in a row"):
        worker.load()


def test_closing_fails_what_runs(worker: Worker) -> None:
    inbox = Inbox()
    names = [worker.submit([1, 2], SamplingParams(max_tokens=60), inbox) for _ in range(6)]
    worker.close()
    with pytest.raises(EngineError, match="was closed"):
        read(inbox, *names)
    with pytest.raises(EngineError, match="was closed"):
        worker.submit([1], SamplingParams(), inbox)


def test_an_inbox_that_breaks_the_worker_is_reported_to_all(worker: Worker) -> None:
    """A client's `wake` that raises ends nothing but its own notice."""

    def wake() -> None:
        raise ValueError("no")

    inbox, other = Inbox(wake), Inbox()
    name = worker.submit([1, 2], SamplingParams(max_tokens=3), inbox)
    theirs = worker.submit([1, 2], SamplingParams(max_tokens=3), other)
    assert len(read(other, theirs)[theirs]) == 3
    assert len(read(inbox, name)[name]) == 3


@pytest.mark.filterwarnings("ignore:.*fork.*")
def test_a_forked_process_is_refused(worker: Worker) -> None:
    receive, send = os.pipe()
    if (child := os.fork()) == 0:
        try:
            worker.submit([1], SamplingParams(), Inbox())
        except EngineError as error:
            os.write(send, str(error).encode())
        os._exit(0)
    os.waitpid(child, 0)
    assert b"create the LLM after the fork" in os.read(receive, 1000)


def test_the_first_token_says_how_long_its_sequence_waited_to_be_admitted() -> None:
    own = Worker(engine(max_num_seqs=1))
    inbox = Inbox()
    began = time.monotonic()
    first = own.submit(prompt_of(1), SamplingParams(max_tokens=3, temperature=0.0), inbox)
    second = own.submit(prompt_of(2), SamplingParams(max_tokens=3, temperature=0.0), inbox)
    queued: dict[str, list[float]] = {first: [], second: []}
    ended: dict[str, float] = {}
    while len(ended) < 2:
        for event in inbox.get(60):
            queued[event.request_id].append(event.queue_seconds)
            if event.finish_reason:
                ended[event.request_id] = time.monotonic() - began
    own.close()
    assert queued[first][1:] == queued[second][1:] == [0, 0]
    assert 0 < queued[first][0] < ended[first]
    assert ended[first] * 0.9 < queued[second][0] < ended[second]
