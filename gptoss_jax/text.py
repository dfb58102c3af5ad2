"""From tokens to text as they come: whole characters, and stop strings wherever tokens cut them."""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Passes text on until one of some strings appears; holds back what may be the beginning of one."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """More text in, what is certain out; sets `stopped` at the first match, whose text is left out."""
        if self.stopped or not self._stop:
            return "" if self.stopped else text
        self._held += text
        found = min((at for s in self._stop if (at := self._held.find(s)) >= 0), default=None)
        if found is not None:
            self.stopped = True
            out, self._held = self._held[:found], ""
            return out
        keep = max(_overlap(self._held, s) for s in self._stop)
        out, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return out

    def finish(self) -> str:
        """What is still held back, when no more text comes."""
        out, self._held = self._held, ""
        return out


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
