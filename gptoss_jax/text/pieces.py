"""Splits text with long runs into the pieces that byte-pair encoding processes one by one.

tiktoken defines the encoding, but its regex engine overflows its stack on whitespace runs of a few hundred thousand
characters (observed with version 0.14). `gptoss_jax.text.tokenizer` splits such text with this module, which gives the
same pieces, and encodes the pieces with tiktoken.
"""

import re
from collections.abc import Iterator
from functools import cached_property

import regex
from tiktoken import Encoding

_CLASS = re.compile(r"\\[pP](?:\{\^?[^}]+\}|[A-Z])|\\[sSwWdD]")

# One character for each general category that a pre-tokeniser's pattern can distinguish.
_REPRESENTATIVES = (
    "\u0100\u0101\u01c5\u02b0\u3042\u0301\u0903\u20dd\u0663\u2167\u00b2\u3000\u2028\u2016\u20ac\ue000\u203f\u200b"
)


def has_long_run(text: str, limit: int) -> bool:
    """Whether any run of whitespace, or of non-whitespace, is longer than `limit` characters."""
    if len(text) <= limit:
        return False
    return max(map(len, text.split()), default=0) > limit or any(
        run.end() - run.start() > limit for run in re.finditer(r"\s{2,}", text)
    )


class PieceSplitter:
    """Splits text into the same pieces as tiktoken's engine, with the `regex` package, whose stack does not overflow.

    The two engines may use different versions of Unicode. For splitting only, a character that they classify
    differently is replaced by one that `regex` classifies as tiktoken classifies the original.
    """

    def __init__(self, pattern: str) -> None:
        self._pattern = regex.compile(pattern)
        self._class_names = sorted(set(_CLASS.findall(pattern)))

    def pieces(self, text: str) -> Iterator[str] | None:
        """The pieces of `text` in order, or None if a character's class cannot be expressed in `regex`."""
        substituted = self._substituted(text)
        if substituted is None:
            return None
        return (text[found.start() : found.end()] for found in self._pattern.finditer(substituted))

    @cached_property
    def _engines(self) -> list[tuple[Encoding, regex.Pattern[str]]]:
        single_bytes = {bytes([value]): value for value in range(256)}
        return [
            (Encoding("class", pat_str=name, mergeable_ranks=single_bytes, special_tokens={}), regex.compile(name))
            for name in self._class_names
        ]

    def _substituted(self, text: str) -> str | None:
        """`text` with every character replaced whose class in `regex` differs, or None if that is not possible."""
        letters = "".join(sorted(character for character in set(text) if character > "\x7f"))
        if not letters:
            return text
        # Unmatched characters give no token, so the decoded tokens are exactly the characters of the class.
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
