"""Byte-pair encoding of text that tiktoken cannot take: long runs, in time that grows with the input alone.

tiktoken is the definition of the encoding. Its merge loop is quadratic in the length of one piece before
version 0.13, and its regex engine overflows its stack on a run of whitespace of some hundred thousand
characters. The functions here give the same tokens, and `gptoss_jax.text.tokenizer` uses them only where
tiktoken would fail.
"""

import re
from array import array
from collections.abc import Iterator, Mapping
from functools import cached_property
from heapq import heappop, heappush

import regex
from tiktoken import Encoding

_CLASS = re.compile(r"\\[pP](?:\{\^?[^}]+\}|[A-Z])|\\[sSwWdD]")

# One character for each general category that a pre-tokeniser's pattern can tell apart.
_REPRESENTATIVES = (
    "\u0100\u0101\u01c5\u02b0\u3042\u0301\u0903\u20dd\u0663\u2167\u00b2\u3000\u2028\u2016\u20ac\ue000\u203f\u200b"
)


def merge(piece: bytes, ranks: Mapping[bytes, int]) -> list[int]:
    """Ranks of the tokens of one piece: always the lowest-ranked adjacent pair is joined, the leftmost
    among equals.

    `ranks` must hold every single byte of `piece`. Pairs wait in one bucket a rank, so that a run of one
    letter costs a sort of nearly sorted positions and not a priority-queue operation a byte.
    """
    size = len(piece)
    following = array("q", range(1, size + 1))
    preceding = array("q", range(-1, size - 1))
    waiting = array("q", [-1]) * size
    buckets: dict[int, list[int]] = {}
    queue: list[int] = []

    def offer(start: int, end: int) -> int:
        rank = ranks.get(piece[start:end], -1)
        waiting[start] = rank
        if rank >= 0:
            if rank in buckets:
                buckets[rank].append(start)
            else:
                buckets[rank] = [start]
                heappush(queue, rank)
        return rank

    for start in range(size - 1):
        offer(start, start + 2)
    while queue:
        rank = heappop(queue)
        starts = sorted(buckets.pop(rank))
        for done, start in enumerate(starts, 1):
            if waiting[start] != rank:
                continue
            middle = following[start]
            end = following[middle]
            following[start] = end
            waiting[middle] = waiting[start] = -1
            after = before = -1
            if end < size:
                preceding[end] = start
                after = offer(start, following[end])
            if preceding[start] >= 0:
                before = offer(preceding[start], end)
            if -1 < after < rank or -1 < before < rank:
                # A new pair comes first: the rest of this bucket waits its turn again.
                buckets[rank] = starts[done:]
                heappush(queue, rank)
                break
    return [ranks[piece[start:end]] for start, end in _spans(following)]


def _spans(following: "array[int]") -> Iterator[tuple[int, int]]:
    start = 0
    while start < len(following):
        yield start, following[start]
        start = following[start]


def has_long_run(text: str, limit: int) -> bool:
    """Whether some run of whitespace, or of anything else, is longer than `limit` characters."""
    if len(text) <= limit:
        return False
    return max(map(len, text.split()), default=0) > limit or any(
        run.end() - run.start() > limit for run in re.finditer(r"\s{2,}", text)
    )


class PieceSplitter:
    """Splits text into pieces as tiktoken's own engine does, with the `regex` package, which has no stack
    to overflow.

    The two engines may know different versions of Unicode. A character that they class differently is
    replaced, for the splitting only, by one that `regex` classes as tiktoken classes the original.
    """

    def __init__(self, pattern: str) -> None:
        self._pattern = regex.compile(pattern)
        self._class_names = sorted(set(_CLASS.findall(pattern)))

    def pieces(self, text: str) -> Iterator[str] | None:
        """The pieces of `text` in order, or None if a character's class cannot be expressed in `regex`."""
        alike = self._alike(text)
        if alike is None:
            return None
        return (text[found.start() : found.end()] for found in self._pattern.finditer(alike))

    @cached_property
    def _engines(self) -> list[tuple[Encoding, regex.Pattern[str]]]:
        single_bytes = {bytes([value]): value for value in range(256)}
        return [
            (Encoding("class", pat_str=name, mergeable_ranks=single_bytes, special_tokens={}), regex.compile(name))
            for name in self._class_names
        ]

    def _alike(self, text: str) -> str | None:
        letters = "".join(sorted(character for character in set(text) if character > "\x7f"))
        if not letters:
            return text
        # An unmatched character gives no token, so the decoded tokens are the characters of the class.
        theirs = [frozenset(engine.decode(engine.encode_ordinary(letters))) for engine, _ in self._engines]
        ours = [frozenset(pattern.findall(letters + _REPRESENTATIVES)) for _, pattern in self._engines]
        stand_ins = {tuple(c in group for group in ours): c for c in reversed(_REPRESENTATIVES)}
        table: dict[int, str] = {}
        for character in letters:
            wanted = tuple(character in group for group in theirs)
            if wanted != tuple(character in group for group in ours):
                if wanted not in stand_ins:
                    return None
                table[ord(character)] = stand_ins[wanted]
        return text.translate(table)
