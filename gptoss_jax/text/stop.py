"""Finds stop strings in text that arrives piece by piece."""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Passes text through until a stop string occurs; withholds text that may be the beginning of one."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._held = ""
        self.matched: str | None = None
        self.looking = True

    @property
    def stopped(self) -> bool:
        """Whether a stop string has occurred, which is `matched`."""
        return self.matched is not None

    def push(self, text: str) -> str:
        """Consumes text and returns the part that no stop string can begin in.

        The first match sets `matched`; the stop string and the text after it are dropped. While `looking` is False,
        text is returned unchanged.
        """
        if self.stopped or not self._stop or not self.looking:
            return "" if self.stopped else text
        self._held += text
        found = min(((at, s) for s in self._stop if (at := self._held.find(s)) >= 0), default=None)
        if found is not None:
            at, self.matched = found
            out, self._held = self._held[:at], ""
            return out
        keep = max(_overlap(self._held, s) for s in self._stop)
        out, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return out

    @property
    def withholds(self) -> bool:
        """Whether text is withheld, since it may be the beginning of a stop string."""
        return bool(self._held)

    def finish(self) -> str:
        """The withheld text, at the end of the input."""
        out, self._held = self._held, ""
        return out


def _overlap(text: str, stop: str) -> int:
    """Length of the longest suffix of `text` that is a proper prefix of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
