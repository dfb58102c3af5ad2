"""A request's sequence: its tokens, and what it holds on the device."""

from __future__ import annotations

import dataclasses
import functools
import time

import numpy as np

from gptoss_jax.engine.pages import block_key
from gptoss_jax.types import SamplingParams


@dataclasses.dataclass(eq=False)
class Sequence:
    """A prompt and what has been generated after it; `tokens` grows as tokens are read back from the device.

    Args:
      salt: starts the chain of its block keys; see `pages.block_key`.
      leader: the sequence of the same prompt whose pages this one waits for.
      priority: sequences of lower numbers run first, and are preempted last.
      arrival: its place in the order of arrival, which decides among those of one priority.
      ahead: tokens that launches in flight are generating, which the host does not know yet.
      computed: positions whose keys are in the cache or are being computed by launches in flight.
      settled: positions whose keys are known to be computed, since a launch that computed them has been read back.
      rank, slot: where it runs; -1 if it does not.
      epoch: changes when the sequence leaves its slot, so that results of launches in flight can be told apart.
      pages: its pages of the full pool, in order; `sliding` those of the sliding pool, by block.
      branches: numbers of blocks after which its prompt ends or parts from another; the window before each is kept.
      prefix_hits: prompt tokens found in the prefix cache when it was first admitted.
      drafts: proposed tokens for the next step.
      created: when it was added; `admitted` when it was first admitted, in seconds of `time.monotonic`.
    """

    request_id: str
    index: int
    prompt: np.ndarray
    params: SamplingParams
    max_tokens: int
    seed: int
    salt: bytes = b""
    leader: Sequence | None = None
    priority: int = 0
    arrival: int = 0
    tokens: list[int] = dataclasses.field(default_factory=list)
    ahead: int = 0
    computed: int = 0
    settled: int = 0
    rank: int = -1
    slot: int = -1
    epoch: int = 0
    pages: list[int] = dataclasses.field(default_factory=list)
    sliding: dict[int, int] = dataclasses.field(default_factory=dict)
    branches: frozenset[int] = frozenset()
    prefix_hits: int = 0
    drafts: list[int] = dataclasses.field(default_factory=list)
    drafted: int = 0
    accepted: int = 0
    created: float = dataclasses.field(default_factory=time.monotonic)
    admitted: float = 0.0
    _keys: list[bytes] = dataclasses.field(default_factory=list)

    @functools.cached_property
    def cuts(self) -> bool:
        """Whether top-k or top-p limit its tokens."""
        return self.params.temperature > 0 and (self.params.top_k > 0 or self.params.top_p < 1)

    @functools.cached_property
    def may_be_adjusted(self) -> bool:
        """Whether its parameters ever change its logits before sampling."""
        return self.params.penalised or bool(self.params.logit_bias) or self.params.min_tokens > 0

    @property
    def order(self) -> tuple[int, int]:
        """Those with lower numbers come first."""
        return self.priority, self.arrival

    @property
    def adjusted(self) -> bool:
        """Whether its parameters change the logits of its next token before sampling."""
        if not self.may_be_adjusted:
            return False
        return self.params.penalised or bool(self.params.logit_bias) or self.generated < self.params.min_tokens

    @property
    def newest(self) -> int:
        """The last known token."""
        return self.tokens[-1] if self.tokens else int(self.prompt[-1])

    @property
    def known_length(self) -> int:
        """Prompt and generated tokens that the host has."""
        return len(self.prompt) + len(self.tokens)

    @property
    def generated(self) -> int:
        """Tokens generated, those in flight included."""
        return len(self.tokens) + self.ahead

    @property
    def length(self) -> int:
        """All tokens, those in flight included."""
        return self.known_length + self.ahead

    @property
    def decoding(self) -> bool:
        """Whether the keys of all tokens but the last are computed."""
        return self.computed == self.length - 1

    def span(self, start: int, stop: int) -> np.ndarray:
        """The known tokens int32 from position `start` to `stop`."""
        edge = len(self.prompt)
        if stop <= edge:
            return self.prompt[start:stop]
        own = np.asarray(self.tokens[max(start - edge, 0) : stop - edge], np.int32)
        return own if start >= edge else np.concatenate([self.prompt[start:], own])

    def keys(self, block: int, length: int) -> list[bytes]:
        """The keys of the whole blocks among its first `length` tokens, which are known."""
        while len(self._keys) < length // block:
            start = len(self._keys) * block
            before = self._keys[-1] if self._keys else self.salt
            self._keys.append(block_key(self.span(start, start + block), before))
        return self._keys[: length // block]
