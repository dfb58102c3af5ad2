"""What the engine reports: the tokens of its steps, and its load."""

from __future__ import annotations

import dataclasses

from gptoss_jax.types import FinishReason, TokenLogprobs


@dataclasses.dataclass(slots=True)
class TokenEvent:
    """A new token of completion `index` of a request, or the error that ended it.

    `prompt_logprobs` come with the first token, and so do `queue_seconds`, the time until the sequence was first
    admitted; `finish_reason` comes with the last. `cached_tokens` is the number of prompt tokens found in the prefix
    cache. `drafted` and `accepted` count the sequence's drafts so far. With an `error` the finish reason is "error",
    and there is no token.
    """

    request_id: str
    index: int
    token_id: int
    logprobs: TokenLogprobs | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    finish_reason: FinishReason | None = None
    cached_tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    error: Exception | None = None
    queue_seconds: float = 0.0


@dataclasses.dataclass
class Load:
    """The engine's current load and its counters since the start, summed over all data-parallel ranks.

    Args:
      waiting, running: sequences that wait to be admitted, and that are being computed.
      pages_used, pages: pages of the full-attention layers held by running sequences, and all of them.
      sliding_pages_used, sliding_pages: those of the sliding layers.
      hit_tokens: tokens found in the prefix cache when sequences were admitted.
      tokens, padding: tokens computed by forward passes, and padding tokens beside them.
      preemptions: how often a running sequence was preempted.
      failures: how often the device failed, so that the cache was made anew.
      steps: steps launched.
      launches: launches, each of one or more steps.
      idle_launches: launches that came after the device had finished the previous one, and so had waited for the host.
      step_seconds: a moving average of the time between the ends of steps while launches follow each other.
      drafted, accepted: tokens drafted by speculative decoding, and those of them that were accepted.
      programs, compiled_after_warm_up: compiled programs, and those that were compiled since the last `warm_up`.
    """

    waiting: int = 0
    running: int = 0
    pages_used: int = 0
    pages: int = 0
    sliding_pages_used: int = 0
    sliding_pages: int = 0
    hit_tokens: int = 0
    tokens: int = 0
    padding: int = 0
    preemptions: int = 0
    failures: int = 0
    steps: int = 0
    launches: int = 0
    idle_launches: int = 0
    step_seconds: float = 0.0
    drafted: int = 0
    accepted: int = 0
    programs: int = 0
    compiled_after_warm_up: int = 0
