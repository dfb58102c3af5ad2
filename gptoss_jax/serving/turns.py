"""Requests in asyncio: what each step of the engine adds to the items of each completion."""

from __future__ import annotations

import dataclasses
from collections import deque

from gptoss_jax.engine.outputs import TokenEvent
from gptoss_jax.errors import EngineError, UsageError
from gptoss_jax.serving.generated import Completion, Request, by_completion
from gptoss_jax.serving.owner import EventStream
from gptoss_jax.text.items import Item, ItemEvent
from gptoss_jax.text.tokenizer import Tokenizer
from gptoss_jax.types import FinishReason, TokenLogprobs


@dataclasses.dataclass
class Usage:
    """Token counts of a request, over all its completions."""

    prompt_tokens: int
    cached_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0


@dataclasses.dataclass(slots=True)
class Update:
    """What one step of the engine, or several that are read together, added to one completion.

    Args:
      index: the completion.
      events: what happened to its items.
      items: all its items so far.
      tokens: its new tokens, of any kind, as the engine reported them.
      finish_reason: why it ended, in its last update.
      malformed: violations of the harmony format so far, one line each.
      prompt_logprobs: those of the prompt, in the first update of a request that asked for them.
      usage: of the whole request, exact in the last update.
    """

    index: int
    events: list[ItemEvent]
    items: list[Item]
    tokens: list[TokenEvent]
    finish_reason: FinishReason | None
    malformed: list[str]
    prompt_logprobs: list[TokenLogprobs | None] | None
    usage: Usage


class Turn:
    """The updates of a request that was submitted; `aclose` aborts what has not finished."""

    def __init__(self, stream: EventStream, tokenizer: Tokenizer | None, request: Request) -> None:
        self._stream = stream
        self._completions = [Completion(request, tokenizer) for _ in range(request.params.n)]
        self._usage, self._unfinished = Usage(len(request.prompt_token_ids)), len(self._completions)
        self._unread: deque[list[TokenEvent]] = deque()

    def __aiter__(self) -> Turn:
        return self

    async def __anext__(self) -> Update:
        """The next update. Raises UsageError or EngineError if the request fails."""
        while self._unfinished:
            if not self._unread:
                self._unread.extend(by_completion(await self._stream.events()))
                continue
            own = self._unread.popleft()
            update = _update(self._completions[own[0].index], own, self._usage)
            if update is None:
                continue
            if update.finish_reason:
                self._unfinished -= 1
                if not own[-1].finish_reason:
                    # The text reached a stop string, which the engine cannot detect.
                    self._stream.abort(update.index)
            return update
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """Abort what has not finished; there are no more updates."""
        if self._unfinished:
            self._unfinished = 0
            self._stream.abort()
        self._stream.close()


def _update(completion: Completion, events: list[TokenEvent], usage: Usage) -> Update | None:
    """The update of a completion; None if it has ended already."""
    if (error := events[-1].error) is not None:
        if isinstance(error, UsageError | EngineError):
            raise error
        raise EngineError(f"{type(error).__name__}: {error}".partition("\n")[0]) from error
    if completion.finish_reason:
        return None
    before = completion.tokens
    new: list[ItemEvent] = []
    # A stop string may end the completion before the last of several tokens.
    for own in [[event] for event in events] if completion.stops else [events]:
        new += completion.push(own)
    usage.completion_tokens += completion.tokens - before
    usage.cached_tokens = max(usage.cached_tokens, events[-1].cached_tokens)
    if completion.finish_reason:
        usage.reasoning_tokens += completion.reasoning_tokens
    prompt_logprobs = next((e.prompt_logprobs for e in events if e.prompt_logprobs is not None), None)
    return Update(
        events[0].index,
        new,
        completion.turn.items,
        events[: completion.tokens - before],
        completion.finish_reason,
        list(completion.turn.malformed),
        prompt_logprobs,
        usage,
    )
