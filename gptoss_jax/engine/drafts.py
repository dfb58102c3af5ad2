"""Guesses of the next tokens for speculative decoding, which the step then verifies exactly."""

from __future__ import annotations

from typing import Protocol

import numpy as np


class Drafter(Protocol):
    """Guesses what follows some tokens; a small model could, too."""

    def guess(self, tokens: np.ndarray, most: int) -> list[int]:
        """Up to `most` tokens that may follow."""
        ...


class PromptLookup:
    """Guesses that what followed the last few tokens before will follow them again."""

    def __init__(self, longest: int = 4, shortest: int = 2) -> None:
        self._sizes = range(longest, shortest - 1, -1)

    def guess(self, tokens: np.ndarray, most: int) -> list[int]:
        """What followed the latest earlier occurrence of the longest ending that has one."""
        for size in self._sizes:
            if len(tokens) <= size:
                continue
            windows = np.lib.stride_tricks.sliding_window_view(tokens[:-1], size)
            found = np.flatnonzero((windows == tokens[-size:]).all(axis=1))
            if len(found):
                start = int(found[-1]) + size
                return tokens[start : start + most].tolist()
        return []
