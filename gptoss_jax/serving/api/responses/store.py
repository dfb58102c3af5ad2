"""Stored responses: a SQLite database in a file or in memory, with limits on their number, size and age.

Each response has a turn, which is its input and output items and the turn before. A turn stays as long as a response
has it, or a later turn: so a conversation keeps its context if its older responses are deleted.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import msgspec

from gptoss_jax.errors import UsageError
from gptoss_jax.serving.api.encoding import encode
from gptoss_jax.serving.api.responses.items import Item

_SCHEMA = """
CREATE TABLE IF NOT EXISTS turns (
  id INTEGER PRIMARY KEY AUTOINCREMENT, previous INTEGER REFERENCES turns, date TEXT NOT NULL, bytes INTEGER NOT NULL
) STRICT;
CREATE INDEX IF NOT EXISTS turns_previous ON turns (previous);
CREATE TABLE IF NOT EXISTS items (
  turn INTEGER NOT NULL REFERENCES turns ON DELETE CASCADE, position INTEGER NOT NULL, part TEXT NOT NULL,
  id TEXT NOT NULL, body BLOB NOT NULL, PRIMARY KEY (turn, position)
) STRICT, WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS items_id ON items (id);
CREATE TABLE IF NOT EXISTS responses (
  number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, owner TEXT NOT NULL, created REAL NOT NULL,
  turn INTEGER NOT NULL UNIQUE REFERENCES turns, body BLOB NOT NULL, bytes INTEGER NOT NULL
) STRICT;
CREATE INDEX IF NOT EXISTS responses_created ON responses (created, number);
CREATE TABLE IF NOT EXISTS totals (responses INTEGER NOT NULL, bytes INTEGER NOT NULL) STRICT;
INSERT INTO totals SELECT 0, 0 WHERE NOT EXISTS (SELECT * FROM totals);
CREATE TRIGGER IF NOT EXISTS turn_added AFTER INSERT ON turns
  BEGIN UPDATE totals SET bytes = bytes + NEW.bytes; END;
CREATE TRIGGER IF NOT EXISTS turn_deleted AFTER DELETE ON turns
  BEGIN UPDATE totals SET bytes = bytes - OLD.bytes; END;
CREATE TRIGGER IF NOT EXISTS response_added AFTER INSERT ON responses
  BEGIN UPDATE totals SET responses = responses + 1, bytes = bytes + NEW.bytes; END;
CREATE TRIGGER IF NOT EXISTS response_deleted AFTER DELETE ON responses
  BEGIN UPDATE totals SET responses = responses - 1, bytes = bytes - OLD.bytes; END;
"""
_VERSION = 1

_CONVERSATION = """
WITH RECURSIVE chain (turn, depth) AS (
  SELECT turn, 0 FROM responses WHERE id = ? AND owner = ?
  UNION ALL SELECT previous, depth + 1 FROM chain JOIN turns ON turns.id = chain.turn WHERE previous IS NOT NULL
)
SELECT body FROM items JOIN chain USING (turn) ORDER BY depth DESC, position
"""

_ROW_BYTES = 200
"""What a row takes besides its body, about."""


@dataclasses.dataclass(frozen=True)
class StoreOptions:
    """Where responses are stored, and how many.

    Args:
      path: the database's file; ":memory:" keeps responses until the process ends.
      max_responses: the most responses.
      max_bytes: the most bytes of all responses and their items.
      max_age: seconds after which a response is deleted.
    """

    path: str = ":memory:"
    max_responses: int = 10_000
    max_bytes: int = 2**29
    max_age: float = 30 * 86400.0


@dataclasses.dataclass(frozen=True)
class Conversation:
    """The conversation up to the end of a response: its status, its turn, its date, and all items."""

    status: str
    turn: int
    date: str
    items: list[Item]


@dataclasses.dataclass(frozen=True)
class Record:
    """A response to be stored, with the conversation before it and its input."""

    response: dict[str, Any]
    owner: str
    date: str
    before: Conversation | None
    given: Sequence[Item]


@dataclasses.dataclass(frozen=True)
class Page:
    """Some of a response's input items as JSON, with the first and the last id; `more` if others follow."""

    items: list[msgspec.Raw]
    first: str
    last: str
    more: bool


class Store:
    """The stored responses. Each method runs in one thread of the store, and commits before it returns.

    The least recently created responses are deleted first. Nothing is found for another owner than the one who stored
    it. Methods raise sqlite3.Error if the database fails; the constructor raises UsageError if it cannot be opened.
    """

    def __init__(self, options: StoreOptions = StoreOptions(), clock: Callable[[], float] = time.time) -> None:
        self._options, self._clock = options, clock
        try:
            self._database = _open(options.path)
        except (sqlite3.Error, OSError) as error:
            raise UsageError(f"cannot be used as the store of responses: {error}", where=options.path) from None
        self._thread = ThreadPoolExecutor(1, "response-store")

    def close(self) -> None:
        """Close the database once what runs has ended."""
        self._thread.shutdown()
        self._database.close()

    async def put(self, record: Record) -> None:
        """Store a response; within the limits, those that exceed them are deleted."""
        await self._run(self._put, record)

    async def get(self, response_id: str, owner: str) -> dict[str, Any] | None:
        """A response, whose output items are JSON."""
        return await self._run(self._get, response_id, owner)

    async def delete(self, response_id: str, owner: str) -> bool:
        """Delete a response; False if there is none."""
        return await self._run(self._delete, response_id, owner)

    async def conversation(self, response_id: str, owner: str) -> Conversation | None:
        """The conversation up to the end of a response."""
        return await self._run(self._read_conversation, response_id, owner)

    async def find_items(self, ids: Sequence[str], owner: str) -> dict[str, Item]:
        """The items with these ids that a stored response has in its input or its output."""
        return await self._run(self._find_items, ids, owner)

    async def input_items(
        self, response_id: str, owner: str, limit: int, descending: bool, after: str | None
    ) -> Page | None:
        """Some input items of a response. Raises KeyError if `after` is none of their ids."""
        return await self._run(self._input_items, response_id, owner, limit, descending, after)

    async def totals(self) -> tuple[int, int]:
        """The number of responses, and the bytes of all that is stored."""
        return await self._run(self._totals)

    async def _run[**P, T](self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        def transaction() -> T:
            with self._transaction():
                self._expire()
                return work(*args, **kwargs)

        return await asyncio.get_running_loop().run_in_executor(self._thread, transaction)

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._database.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._database.execute("ROLLBACK")
            raise
        self._database.execute("COMMIT")

    def _put(self, record: Record) -> None:
        before, output = record.before, record.response["output"]
        # The conversation before may have been deleted since it was read.
        known = before is not None and self._one("SELECT 1 FROM turns WHERE id = ?", before.turn) is not None
        context = [] if before is None or known else before.items
        rows = [
            (part, item["id"], encode(item))
            for part, items in (("context", context), ("input", record.given), ("output", output))
            for item in items
        ]
        size = sum(len(body) + _ROW_BYTES for _, _, body in rows) + _ROW_BYTES
        previous = before.turn if before is not None and known else None
        turn = self._database.execute(
            "INSERT INTO turns (previous, date, bytes) VALUES (?, ?, ?)", (previous, record.date, size)
        ).lastrowid
        self._database.executemany(
            "INSERT INTO items VALUES (?, ?, ?, ?, ?)",
            [(turn, position, *row) for position, row in enumerate(rows)],
        )
        body = encode({name: value for name, value in record.response.items() if name != "output"})
        self._database.execute(
            "INSERT INTO responses (id, owner, created, turn, body, bytes) VALUES (?, ?, ?, ?, ?, ?)",
            (record.response["id"], record.owner, self._clock(), turn, body, len(body) + _ROW_BYTES),
        )
        self._shrink()

    def _get(self, response_id: str, owner: str) -> dict[str, Any] | None:
        row = self._one("SELECT turn, body FROM responses WHERE id = ? AND owner = ?", response_id, owner)
        if row is None:
            return None
        items = self._database.execute(
            "SELECT body FROM items WHERE turn = ? AND part = 'output' ORDER BY position", (row[0],)
        )
        return {**msgspec.json.decode(row[1]), "output": [msgspec.Raw(body) for (body,) in items]}

    def _delete(self, response_id: str, owner: str) -> bool:
        row = self._one("SELECT number FROM responses WHERE id = ? AND owner = ?", response_id, owner)
        if row is not None:
            self._drop(row[0])
        return row is not None

    def _read_conversation(self, response_id: str, owner: str) -> Conversation | None:
        row = self._one(
            "SELECT body, turn, date FROM responses JOIN turns ON turns.id = turn"
            " WHERE responses.id = ? AND owner = ?",
            response_id,
            owner,
        )
        if row is None:
            return None
        items = [
            msgspec.json.decode(body) for (body,) in self._database.execute(_CONVERSATION, (response_id, owner))
        ]
        return Conversation(msgspec.json.decode(row[0])["status"], row[1], row[2], items)

    def _find_items(self, ids: Sequence[str], owner: str) -> dict[str, Item]:
        found = {}
        for item_id in ids:
            row = self._one(
                "SELECT items.body FROM items JOIN responses USING (turn) WHERE items.id = ? AND owner = ?"
                " AND part != 'context' ORDER BY number DESC LIMIT 1",
                item_id,
                owner,
            )
            if row is not None:
                found[item_id] = msgspec.json.decode(row[0])
        return found

    def _input_items(
        self, response_id: str, owner: str, limit: int, descending: bool, after: str | None
    ) -> Page | None:
        row = self._one("SELECT turn FROM responses WHERE id = ? AND owner = ?", response_id, owner)
        if row is None:
            return None
        rows = self._database.execute(
            "SELECT id, body FROM items WHERE turn = ? AND part = 'input' ORDER BY position", row
        ).fetchall()
        if descending:
            rows.reverse()
        if after is not None:
            ids = [item_id for item_id, _ in rows]
            if after not in ids:
                raise KeyError(after)
            rows = rows[ids.index(after) + 1 :]
        shown = rows[:limit]
        first, last = (shown[0][0], shown[-1][0]) if shown else ("", "")
        return Page([msgspec.Raw(body) for _, body in shown], first, last, len(rows) > limit)

    def _totals(self) -> tuple[int, int]:
        row = self._one("SELECT responses, bytes FROM totals")
        assert row is not None
        return row[0], row[1]

    def _expire(self) -> None:
        """Delete the responses that are too old."""
        oldest = self._clock() - self._options.max_age
        while row := self._one(
            "SELECT number FROM responses WHERE created < ? ORDER BY created, number LIMIT 1", oldest
        ):
            self._drop(row[0])

    def _shrink(self) -> None:
        """Delete the oldest responses until the rest is within the limits."""
        while True:
            responses, size = self._totals()
            if responses <= self._options.max_responses and size <= self._options.max_bytes:
                return
            row = self._one("SELECT number FROM responses ORDER BY created, number LIMIT 1")
            if row is None:
                return
            self._drop(row[0])

    def _drop(self, number: int) -> None:
        """Delete a response, and the turns that nothing has any more."""
        row = self._one("DELETE FROM responses WHERE number = ? RETURNING turn", number)
        turn = row[0] if row else None
        while turn is not None:
            row = self._one(
                "DELETE FROM turns WHERE id = ? AND NOT EXISTS (SELECT 1 FROM responses WHERE turn = turns.id)"
                " AND NOT EXISTS (SELECT 1 FROM turns AS later WHERE later.previous = turns.id)"
                " RETURNING previous",
                turn,
            )
            turn = row[0] if row else None

    def _one(self, query: str, *values: Any) -> tuple[Any, ...] | None:
        # A statement that returns rows has run to its end only once all of them are read.
        rows = self._database.execute(query, values).fetchall()
        return rows[0] if rows else None


def _open(path: str) -> sqlite3.Connection:
    if path != ":memory:":
        # Conversations are nobody else's to read; SQLite gives its other files the permissions of this one.
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    database = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    database.execute("PRAGMA foreign_keys = ON")
    database.execute("PRAGMA journal_mode = WAL")
    # In WAL mode a commit survives the end of the process, though not of the machine.
    database.execute("PRAGMA synchronous = NORMAL")
    version = database.execute("PRAGMA user_version").fetchone()[0]
    if version not in (0, _VERSION):
        raise sqlite3.DatabaseError(f"its version is {version}, expected {_VERSION}")
    database.executescript(_SCHEMA)
    database.execute(f"PRAGMA user_version = {_VERSION}")
    return database
