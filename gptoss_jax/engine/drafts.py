"""Drafters for speculative decoding; the step verifies their drafts exactly."""

from __future__ import annotations

from typing import Protocol

import numpy as np


class Drafter(Protocol):
    """Proposes the tokens that may follow a sequence."""

    def propose(self, tokens: list[int], most: int) -> list[int]:
        """Up to `most` drafts that continue the prompt and `tokens`, which are longer at each call."""
        ...


class DrafterFactory(Protocol):
    """Creates the drafter of a sequence."""

    def __call__(self, prompt: np.ndarray) -> Drafter:
        """A drafter of the tokens after a prompt int32 [N]."""
        ...


class PromptLookup:
    """Drafts the tokens that followed an earlier occurrence of the sequence's last few tokens.

    What follows each n-gram is kept in a dictionary, so a call costs as much as there are new tokens.
    """

    def __init__(self, prompt: np.ndarray, longest: int = 4, shortest: int = 2) -> None:
        self._tokens: list[int] = prompt.tolist()
        self._generated = 0
        self._sizes = range(longest, shortest - 1, -1)
        self._follows: dict[tuple[int, ...], int] = {}
        for end in range(1, len(self._tokens)):
            self._enter(end)

    def _enter(self, end: int) -> None:
        """Note that the n-grams before position `end` are followed by what is there."""
        for size in self._sizes:
            if size <= end:
                self._follows[tuple(self._tokens[end - size : end])] = end

    def propose(self, tokens: list[int], most: int) -> list[int]:
        """The tokens after the latest earlier occurrence of the longest suffix that occurred before."""
        for token in tokens[self._generated :]:
            self._tokens.append(token)
            self._enter(len(self._tokens) - 1)
        self._generated = len(tokens)
        for size in self._sizes:
            start = self._follows.get(tuple(self._tokens[-size:]))
            if start is not None:
                return self._tokens[start : start + most]
        return []
