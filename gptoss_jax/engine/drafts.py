"""Drafters for speculative decoding; the step verifies their drafts exactly."""

from __future__ import annotations

from typing import Protocol

import numpy as np


class Drafter(Protocol):
    """Proposes the tokens that may follow a sequence."""

    def propose(self, tokens: np.ndarray, most: int) -> list[int]:
        """Up to `most` drafts that continue `tokens`, int [N]."""
        ...


class PromptLookup:
    """Prompt lookup: drafts the tokens that followed an earlier occurrence of the sequence's last few tokens."""

    def __init__(self, longest: int = 4, shortest: int = 2) -> None:
        self._sizes = range(longest, shortest - 1, -1)

    def propose(self, tokens: np.ndarray, most: int) -> list[int]:
        """The tokens after the latest earlier occurrence of the longest suffix that occurred before."""
        for size in self._sizes:
            if len(tokens) <= size:
                continue
            windows = np.lib.stride_tricks.sliding_window_view(tokens[:-1], size)
            found = np.flatnonzero((windows == tokens[-size:]).all(axis=1))
            if len(found):
                start = int(found[-1]) + size
                return tokens[start : start + most].tolist()
        return []
