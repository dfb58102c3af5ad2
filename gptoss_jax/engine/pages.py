"""Who holds which page of the KV cache, and which contents free pages still have. Plain Python."""

from __future__ import annotations

import hashlib
from collections import Counter, OrderedDict
from collections.abc import Hashable, Iterator

import numpy as np


class PagePool:
    """Numbered pages, each held by some sequences, or free; a free page keeps its content until it is taken.

    Pages are taken in this order: those without known content, those released as cold, and those whose content has
    gone unused for longest.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._holders = [0] * size
        self._keys: list[Hashable | None] = [None] * size
        self._by_key: dict[Hashable, int] = {}
        self._blank: dict[int, None] = dict.fromkeys(range(size))
        self._cold: dict[int, None] = {}
        self._cached: OrderedDict[int, None] = OrderedDict()

    @property
    def available(self) -> int:
        """How many can be taken."""
        return len(self._blank) + len(self._cold) + len(self._cached)

    @property
    def held(self) -> int:
        """How many somebody holds."""
        return self.size - self.available

    def is_free(self, page: int) -> bool:
        """Whether nobody holds the page."""
        return self._holders[page] == 0

    def holders(self, page: int) -> int:
        """How many hold the page."""
        return self._holders[page]

    def free(self) -> Iterator[int]:
        """The free pages in the order in which they are to be taken."""
        yield from self._blank
        yield from self._cold
        yield from self._cached

    def take(self, page: int) -> None:
        """Hold a free page for new content."""
        self._remove(page)
        key, self._keys[page] = self._keys[page], None
        if key is not None:
            del self._by_key[key]
        self._holders[page] = 1

    def find(self, key: Hashable) -> int | None:
        """The page with this content."""
        return self._by_key.get(key)

    def hold(self, page: int) -> None:
        """Hold a page for its content."""
        if self._holders[page] == 0:
            self._remove(page)
        self._holders[page] += 1

    def _remove(self, page: int) -> None:
        for pages in (self._blank, self._cold, self._cached):
            if page in pages:
                del pages[page]
                return
        raise ValueError(f"page {page} is held")

    def refresh(self, page: int) -> None:
        """Record a use of a page's content; a cold page is no longer cold."""
        if self._holders[page] == 0:
            self._remove(page)
            self._cached[page] = None

    def name(self, page: int, key: Hashable) -> None:
        """Record the content of a held page, unless another page has the same."""
        if self._keys[page] is None and key not in self._by_key:
            self._keys[page] = key
            self._by_key[key] = page

    def release(self, page: int, cold: bool = False) -> None:
        """Hold a page no longer; a cold one is taken before others with known content."""
        self._holders[page] -= 1
        if self._holders[page] == 0:
            pages = self._blank if self._keys[page] is None else self._cold if cold else self._cached
            pages[page] = None


class PagePlan:
    """What a plan changes of a pool, which stays as it is until `commit`."""

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool
        self._free = pool.free()
        self._returned: dict[int, None] = {}
        self._held: Counter[int] = Counter()
        self._released: Counter[int] = Counter()
        self._taken: dict[int, None] = {}
        self.available = pool.available

    def take(self) -> int:
        """A page for new content. Raises IndexError if none is left."""
        page = next((page for page in self._free if page not in self._held), None)
        if page is None:
            if not self._returned:
                raise IndexError("no page is free")
            page, _ = self._returned.popitem()
        self.available -= 1
        self._taken[page] = None
        return page

    def give_back(self, page: int) -> None:
        """Undo a `take`."""
        del self._taken[page]
        self._returned[page] = None
        self.available += 1

    def find(self, key: Hashable) -> int | None:
        """The page with this content, unless it has been taken for other content."""
        page = self._pool.find(key)
        return None if page in self._taken else page

    def hold(self, page: int) -> None:
        """Hold a page that `find` has found."""
        if self._returned.pop(page, 0) is None or (self._pool.is_free(page) and not self._held[page]):
            self.available -= 1
        self._held[page] += 1

    def release(self, page: int) -> None:
        """Release a page that a sequence holds."""
        self._released[page] += 1
        if self._pool.holders(page) + self._held[page] == self._released[page]:
            self._returned[page] = None
            self.available += 1

    def commit(self) -> None:
        """Change the pool."""
        for page in self._held.elements():
            self._pool.hold(page)
        for page in self._released.elements():
            self._pool.release(page)
        for page in self._taken:
            self._pool.take(page)


def block_key(tokens: np.ndarray, before: bytes) -> bytes:
    """The key of a block of tokens after the block with the key `before` (a chain of BLAKE2b).

    The first block's `before` is empty, or a salt that separates contents that equal tokens do not make equal, such as
    those of different adapters or tenants.
    """
    digest = hashlib.blake2b(before, digest_size=16)
    digest.update(np.ascontiguousarray(tokens, np.int32).tobytes())
    return digest.digest()
