"""Who holds which page and ring, and what finished prompts left behind for later ones. Plain Python."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Hashable, Sequence

import numpy as np


class CachedPool:
    """Numbered things, each held by some, free, or free but still known by the key of what it contains.

    What is taken is a thing that nothing is known of, or else the one whose content has not been asked for longest.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._blank = list(range(size - 1, -1, -1))
        self._holders = [0] * size
        self._keys: list[Hashable | None] = [None] * size
        self._by_key: dict[Hashable, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()

    @property
    def available(self) -> int:
        """How many can be taken now."""
        return len(self._blank) + len(self._idle)

    @property
    def held(self) -> int:
        """How many somebody holds."""
        return self.size - self.available

    def take(self) -> int:
        """Hold a thing whose content no longer matters. Raises IndexError if there is none."""
        if self._blank:
            thing = self._blank.pop()
        elif self._idle:
            thing, _ = self._idle.popitem(last=False)
            del self._by_key[self._keys[thing]]
            self._keys[thing] = None
        else:
            raise IndexError("nothing is free")
        self._holders[thing] = 1
        return thing

    def find(self, key: Hashable) -> int | None:
        """The thing with this content."""
        return self._by_key.get(key)

    def hold(self, thing: int) -> None:
        """Hold a thing that `find` has found."""
        if self._holders[thing] == 0:
            del self._idle[thing]
        self._holders[thing] += 1

    def refresh(self, thing: int) -> None:
        """Take note that a thing's content has been asked for."""
        if thing in self._idle:
            del self._idle[thing]
            self._idle[thing] = None

    def name(self, thing: int, key: Hashable) -> None:
        """Say what a held thing contains; if another contains the same, this one stays unknown."""
        if self._keys[thing] is None and key not in self._by_key:
            self._keys[thing] = key
            self._by_key[key] = thing

    def release(self, thing: int) -> None:
        """Hold a thing no longer; its content stays known until somebody takes it."""
        self._holders[thing] -= 1
        if self._holders[thing] == 0:
            if self._keys[thing] is None:
                self._blank.append(thing)
            else:
                self._idle[thing] = None


def block_keys(tokens: np.ndarray, block: int) -> list[bytes]:
    """A key for each whole block of tokens, which depends on it and all before it (a chain of BLAKE2b)."""
    keys: list[bytes] = []
    previous = b""
    data = np.ascontiguousarray(tokens, np.int32)
    for start in range(0, len(data) - block + 1, block):
        digest = hashlib.blake2b(previous, digest_size=16)
        digest.update(data[start : start + block].tobytes())
        previous = digest.digest()
        keys.append(previous)
    return keys


class Prefixes:
    """What one part of the batch remembers of prompts: pages by block key, and rings by the key of the last block.

    A prefix can be reused if all its pages and the sliding layers' ring at its end are cached.
    """

    def __init__(self, pages: int, snapshots: int, first_snapshot: int) -> None:
        self.pages = CachedPool(pages)
        self.rings = CachedPool(snapshots)
        self._first = first_snapshot

    def known_blocks(self, keys: Sequence[bytes]) -> int:
        """How many leading blocks have their pages."""
        return next((i for i, key in enumerate(keys) if self.pages.find(key) is None), len(keys))

    def longest(self, keys: Sequence[bytes]) -> tuple[int, int | None]:
        """The longest reusable prefix in pages, and the row of its ring, which becomes the most recently used."""
        for blocks in range(self.known_blocks(keys), 0, -1):
            ring = self.rings.find(keys[blocks - 1])
            if ring is not None:
                self.rings.refresh(ring)
                return blocks, self._first + ring
        return 0, None

    def snapshot(self, key: bytes) -> int | None:
        """A ring's row, held, to keep the ring at the end of a block in; None if it is kept already or none is free.

        It is up to the caller that the copy happens before anything could take it up.
        """
        if self.rings.find(key) is not None or self.rings.available == 0:
            return None
        ring = self.rings.take()
        self.rings.name(ring, key)
        return self._first + ring

    def release_snapshot(self, row: int) -> None:
        """Let a ring that `snapshot` gave be replaced when it is the one unused for longest."""
        self.rings.release(row - self._first)
