"""Stored responses: limits on their number, size and age, owners, and restarts."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptoss_jax.errors import UsageError
from gptoss_jax.serving.api.app import Access
from gptoss_jax.serving.api.keys import Keys
from gptoss_jax.serving.api.responses.sealing import Sealing
from gptoss_jax.serving.api.responses.store import Record, Store, StoreOptions
from tests.serving.api.responses_support import Api
from tests.serving.api.support import ScriptedOwner, server_over, serving


def run[T](work: Awaitable[T]) -> T:
    async def wait() -> T:
        return await work

    return asyncio.run(wait())


@contextlib.contextmanager
def stored(clock: Callable[[], float] = time.time, **options: Any) -> Iterator[Store]:
    store = Store(StoreOptions(**options), clock)
    try:
        yield store
    finally:
        store.close()


def item(item_id: str, text: str = "x") -> dict[str, Any]:
    content = [{"type": "input_text", "text": text}]
    return {"type": "message", "id": item_id, "role": "user", "status": "completed", "content": content}


def put(store: Store, number: int, previous: int | None = None, owner: str = "", size: int = 1) -> None:
    before = None if previous is None else run(store.conversation(f"resp_{previous}", owner))
    assert (before is None) == (previous is None)
    response = {
        "id": f"resp_{number}",
        "status": "completed",
        "more": {"number": number},
        "output": [item(f"out_{number}", "y" * size)],
    }
    run(store.put(Record(response, owner, "2026-01-01", before, [item(f"in_{number}")])))


def get(store: Store, number: int, owner: str = "") -> Any:
    found = run(store.get(f"resp_{number}", owner))
    return found and msgspec.json.decode(msgspec.json.encode(found))


def ids(store: Store, number: int, owner: str = "") -> list[str]:
    conversation = run(store.conversation(f"resp_{number}", owner))
    assert conversation is not None
    return [one["id"] for one in conversation.items]


def rows(store: Store, query: str) -> Any:
    return store._database.execute(query).fetchall()


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("put"), st.integers(0, 30), st.sampled_from(["", "", "b"]), st.integers(0, 2000)),
        st.tuples(st.just("delete"), st.integers(0, 30), st.sampled_from(["", "b"])),
        st.tuples(st.just("wait"), st.integers(1, 60)),
    ),
    max_size=30,
)


@settings(max_examples=80, deadline=None)
@given(
    operations=OPERATIONS,
    max_responses=st.integers(1, 8),
    max_bytes=st.integers(1000, 20_000),
    max_age=st.integers(20, 200),
)
def test_limits(operations: list[Any], max_responses: int, max_bytes: int, max_age: int) -> None:
    """Responses are those that a list would have, oldest first, and their conversations are whole."""
    now = [1000.0]
    alive: dict[int, tuple[str, float]] = {}
    conversations: dict[int, list[str]] = {}
    options = {"max_responses": max_responses, "max_bytes": max_bytes, "max_age": max_age}
    with stored(lambda: now[0], **options) as store:
        for number, (kind, *arguments) in enumerate(operations):
            if kind == "put":
                previous, owner, size = arguments
                has = previous in alive and alive[previous][0] == owner
                put(store, number, previous if has else None, owner, size)
                alive[number] = (owner, now[0])
                before = conversations[previous] if has else []
                conversations[number] = [*before, f"in_{number}", f"out_{number}"]
            elif kind == "delete":
                wanted, owner = arguments
                fine = wanted in alive and alive[wanted][0] == owner
                assert run(store.delete(f"resp_{wanted}", owner)) == fine
                if fine:
                    del alive[wanted]
            else:
                now[0] += arguments[0]
            alive = {n: one for n, one in alive.items() if one[1] >= now[0] - max_age}
            run(store.totals())  # deletes what is too old
            found = [int(one[5:]) for (one,) in rows(store, "SELECT id FROM responses ORDER BY created, number")]
            # Only the size may have ended more, and the oldest of them.
            expected = list(alive)[-max_responses:]
            assert found == expected[len(expected) - len(found) :]
            alive = {n: alive[n] for n in found}
            count, size = run(store.totals())
            assert (count, size) == (len(found), _size(store))
            assert size <= max_bytes
            for n, (owner, _) in alive.items():
                assert get(store, n, owner)["more"] == {"number": n}
                assert get(store, n, "other") is None
                assert ids(store, n, owner) == conversations[n]
            orphans = "SELECT count(*) FROM turns WHERE id NOT IN (SELECT turn FROM responses) AND id NOT IN"
            assert rows(store, f"{orphans} (SELECT previous FROM turns WHERE previous IS NOT NULL)") == [(0,)]
            assert rows(store, "SELECT count(*) FROM items WHERE turn NOT IN (SELECT id FROM turns)") == [(0,)]


def _size(store: Store) -> int:
    tables = ("turns", "responses")
    return sum(rows(store, f"SELECT coalesce(sum(bytes), 0) FROM {table}")[0][0] for table in tables)


def test_size_limits_what_is_kept() -> None:
    with stored(max_bytes=20_000) as store:
        for number in range(20):
            put(store, number, size=3000)
        kept = [number for number in range(20) if get(store, number)]
        assert kept == list(range(20 - len(kept), 20))
        assert 4 <= len(kept) <= 6
        put(store, 20, size=30_000)
        assert run(store.totals()) == (0, 0)


def test_10000_responses_in_bounded_memory() -> None:
    """Their items are counted with what rows take; the database is not much larger."""
    limit = 4 * 2**20
    with stored(max_bytes=limit, max_responses=3000) as store:

        async def fill() -> None:
            for number in range(10_000):
                response = {"id": f"resp_{number}", "status": "completed", "output": [item("o", "y" * 500)]}
                await store.put(Record(response, "", "2026-01-01", None, [item("i", "z" * 500)]))

        asyncio.run(fill())
        count, size = run(store.totals())
        assert 1000 < count < 3000
        assert size <= limit
        [(pages,)], [(page,)] = rows(store, "PRAGMA page_count"), rows(store, "PRAGMA page_size")
        assert pages * page < 2 * limit


def test_a_conversation_is_whole_though_its_beginning_was_deleted_meanwhile() -> None:
    with stored() as store:
        put(store, 1)
        put(store, 2, previous=1)
        before = run(store.conversation("resp_2", ""))
        run(store.delete("resp_1", ""))
        run(store.delete("resp_2", ""))
        assert run(store.totals()) == (0, 0)
        put(store, 3)
        response = {"id": "resp_4", "status": "completed", "output": [item("out_4")]}
        run(store.put(Record(response, "", "2026-01-01", before, [item("in_4")])))
        assert ids(store, 4) == ["in_1", "out_1", "in_2", "out_2", "in_4", "out_4"]
        page = run(store.input_items("resp_4", "", 10, False, None))
        assert page is not None
        assert (page.first, page.last, page.more) == ("in_4", "in_4", False)
        assert run(store.find_items(["in_1", "in_4"], "")).keys() == {"in_4"}


def test_items_are_found_for_their_owner_only() -> None:
    with stored() as store:
        put(store, 1, owner="a")
        assert run(store.find_items(["in_1", "out_1", "in_2"], "a")).keys() == {"in_1", "out_1"}
        assert run(store.find_items(["in_1"], "b")) == {}
        run(store.delete("resp_1", "a"))
        assert run(store.find_items(["in_1"], "a")) == {}


def test_the_loop_goes_on_while_the_store_works() -> None:
    with stored() as store:
        threads, ticks = set(), []
        work = store._get

        def slow(*arguments: Any) -> Any:
            threads.add(threading.current_thread().name)
            time.sleep(0.2)
            return work(*arguments)

        store._get = slow  # type: ignore[method-assign]

        async def both() -> None:
            getting = [asyncio.ensure_future(store.get("resp_1", "")) for _ in range(2)]
            while not all(one.done() for one in getting):
                ticks.append(time.monotonic())
                await asyncio.sleep(0.005)

        asyncio.run(both())
        assert threads == {"response-store_0"}
        assert len(ticks) > 20
        assert max(later - earlier for earlier, later in itertools.pairwise(ticks)) < 0.15


def test_a_file_survives_a_restart(tmp_path: Path) -> None:
    path = str(tmp_path / "responses.db")
    with stored(path=path) as store:
        put(store, 1)
        put(store, 2, previous=1)
        sizes = run(store.totals())
    assert stat.S_IMODE(Path(path).stat().st_mode) == 0o600
    with stored(path=path) as store:
        assert (ids(store, 2), run(store.totals())) == (["in_1", "out_1", "in_2", "out_2"], sizes)
    with stored(path=path, max_responses=1) as store:
        put(store, 3)
        assert [get(store, number) is None for number in (1, 2, 3)] == [True, True, False]


KILLED = """
import asyncio, os, signal, sys
from gptoss_jax.serving.api.responses.store import Record, Store, StoreOptions

async def main():
    store = Store(StoreOptions(sys.argv[1]))
    for number in range(3):
        response = {"id": f"resp_{number}", "status": "completed", "output": []}
        await store.put(Record(response, "", "2026-01-01", None, []))
        print(number, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main())
"""


def test_a_kill_loses_nothing_that_was_stored(tmp_path: Path) -> None:
    path = str(tmp_path / "responses.db")
    done = subprocess.run([sys.executable, "-c", KILLED, path], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.split()) == (-signal.SIGKILL, ["0", "1", "2"]), done.stderr
    with stored(path=path) as store:
        assert all(get(store, number) for number in range(3))


def test_the_last_event_comes_after_the_commit(tmp_path: Path) -> None:
    path = str(tmp_path / "responses.db")
    with Api().running(response_store=StoreOptions(path=path)) as api:
        with api.http.stream("POST", "/v1/responses", json={"input": "Hello", "stream": True}) as answer:
            for line in answer.iter_lines():
                if line == "event: response.completed":
                    with contextlib.closing(sqlite3.connect(path)) as other:
                        assert other.execute("SELECT count(*) FROM responses").fetchone() == (1,)
                    break
            else:
                pytest.fail("no last event")
        [row] = sqlite3.connect(path).execute("SELECT id FROM responses")
    # Another server with the file and the secret goes on.
    with Api().running(response_store=StoreOptions(path=path)) as api:
        api.create(previous_response_id=row[0])


@pytest.mark.parametrize("content", [b"this is no database, " * 100, None])
def test_a_file_that_is_no_store_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "responses.db"
    if content is None:
        with contextlib.closing(sqlite3.connect(path)) as other:
            other.execute("PRAGMA user_version = 99")
    else:
        path.write_bytes(content)
    with pytest.raises(UsageError, match="cannot be used as the store of responses") as caught:
        Store(StoreOptions(path=str(path)))
    assert str(path) in str(caught.value)
    with pytest.raises(UsageError, match="no-such"):
        Store(StoreOptions(path=str(tmp_path / "no-such" / "responses.db")))


def test_a_response_that_cannot_be_stored_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Store, record: Record) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(Store, "_put", broken)
    with Api().running() as api:
        assert api.create()["store"] is False
        final = api.stream()[-1]["response"]
        assert (final["status"], final["store"]) == ("completed", False)
        assert api.http.get(f"/v1/responses/{final['id']}").status_code == 404


def test_another_key_finds_nothing() -> None:
    keys = Keys([("ann", "key-a"), ("bob", "key-b")])
    with serving(server_over(ScriptedOwner()), Access(keys=keys)) as url:
        ann, bob = (openai.OpenAI(base_url=f"{url}/v1", api_key=f"key-{x}", max_retries=0) for x in "ab")
        include = ["reasoning.encrypted_content"]
        made = ann.responses.create(model="gpt-oss-test", input="Hello", include=include)
        for call in (bob.responses.retrieve, bob.responses.delete, bob.responses.cancel):
            with pytest.raises(openai.NotFoundError):
                call(made.id)
        with pytest.raises(openai.NotFoundError):
            bob.responses.input_items.list(made.id)
        for body in (
            {"input": "Hello", "previous_response_id": made.id},
            {"input": [{"type": "item_reference", "id": made.output[0].id}]},
        ):
            with pytest.raises(openai.NotFoundError):
                bob.responses.create(model="gpt-oss-test", **body)
            ann.responses.create(model="gpt-oss-test", **body)
        reasoning = {**made.output[0].model_dump(), "content": None}
        question = {"role": "user", "content": "Hello"}
        ann.responses.create(model="gpt-oss-test", input=[question, reasoning])
        with pytest.raises(openai.BadRequestError, match="encrypted_content"):
            bob.responses.create(model="gpt-oss-test", input=[question, reasoning])
        assert ann.responses.retrieve(made.id).id == made.id


def test_an_old_response_is_not_found() -> None:
    with Api().running(response_store=StoreOptions(max_age=0.2)) as api:
        made = api.create()
        time.sleep(0.3)
        error = api.error(404, previous_response_id=made["id"])
        assert error["param"] == "previous_response_id"
        assert "previous_response_id" in error["message"]


@given(text=st.text(), owner=st.text(max_size=5), place=st.integers(0, 10**6), flip=st.integers(1, 255))
def test_sealed_text_is_read_only_whole(text: str, owner: str, place: int, flip: int) -> None:
    import base64

    sealing, other = Sealing(b"0123456789abcdef"), Sealing(b"0123456789abcdef")
    sealed = sealing.seal(text, owner)
    assert other.unseal(sealed, owner, "x") == text
    assert sealing.seal(text, owner) != sealed
    data = bytearray(base64.urlsafe_b64decode(sealed))
    data[place % len(data)] ^= flip
    wrong = base64.urlsafe_b64encode(data).decode()
    for blob, reader, name in (
        (wrong, sealing, owner),
        (sealed, Sealing(), owner),
        (sealed, sealing, owner + "x"),
        ("", sealing, owner),
        (text, sealing, owner),
    ):
        with pytest.raises(Exception, match=r"^field: is not what this server encrypted"):
            reader.unseal(blob, name, "field")


def test_a_short_secret_is_refused() -> None:
    with pytest.raises(UsageError, match="at least 16 bytes"):
        Sealing(b"short")


def test_servers_with_one_secret_read_each_others_reasoning() -> None:
    secret = b"a secret of more than 16 bytes"
    body = {"input": "Hello", "include": ["reasoning.encrypted_content"]}
    with Api().running(response_secret=secret) as one:
        reasoning = one.create(**body)["output"][0]
    with Api().running(response_secret=secret) as two, Api().running() as three:
        given = [{"role": "user", "content": "Hello"}, reasoning]
        two.create(input=given)
        assert three.error(input=given)["param"] == "input[1].encrypted_content"
        assert isinstance(three.http, httpx.Client)
