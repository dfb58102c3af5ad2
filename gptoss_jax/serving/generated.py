"""A request, and the text of its completions as their tokens arrive."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from gptoss_jax.engine.outputs import TokenEvent
from gptoss_jax.text import harmony
from gptoss_jax.text.items import ChatItems, ItemEvent, RawItems
from gptoss_jax.text.tokenizer import Tokenizer
from gptoss_jax.types import FinishReason, SamplingParams, Scope

_MARKS = ("<|start|>", "<|channel|>", "<|constrain|>", "<|message|>", "<|end|>", *harmony.STOP_TOKENS)
"""The special tokens of the harmony format; other stop tokens are not part of the text."""


@dataclasses.dataclass
class Request:
    """A tokenized prompt with its sampling parameters.

    `chat` parses the completion as harmony; `tools` then holds the names of the available tools. `scope` is what
    structured output applies to, and the tool calls that a chat allows. Requests of lower `priority` numbers run first,
    and one that has not finished after `timeout` seconds fails.
    """

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    chat: bool = False
    prompt: str | None = None
    scope: Scope = "text"
    tools: frozenset[str] | None = None
    priority: int = 0
    timeout: float | None = None


class Completion:
    """One completion of a request: its items so far, and why it ended."""

    def __init__(self, request: Request, tokenizer: Tokenizer | None) -> None:
        self._least, stop = request.params.min_tokens, request.params.stop
        self._logged = request.params.logprobs is not None
        self.turn: ChatItems | RawItems
        self._marks = frozenset[int]()
        if request.chat:
            assert tokenizer is not None
            self.turn = ChatItems(tokenizer, stop, request.tools)
            special = tokenizer.special_tokens
            self._marks = frozenset(special[name] for name in _MARKS if name in special)
        else:
            self.turn = RawItems(tokenizer, stop)
        self.stops = bool(stop)
        self.tokens = 0
        self.finish_reason: FinishReason | None = None

    def push(self, events: list[TokenEvent]) -> list[ItemEvent]:
        """The items' events that further tokens cause; several tokens at once only without stop strings.

        The completion may end before the engine knows, by a stop string.
        """
        if self.finish_reason:
            return []
        last = events[-1]
        self.tokens += len(events)
        unseen = last.finish_reason == "stop" and last.token_id not in self._marks
        shown = events[:-1] if unseen else events
        logprobs = [event.logprobs for event in shown if event.logprobs is not None] if self._logged else []
        new = self.turn.push([event.token_id for event in shown], logprobs, self.tokens >= self._least)
        finish = "stop" if self.turn.stopped else last.finish_reason
        if finish:
            new += self.turn.finish()
            called = finish == "stop" and any(item.kind == "call" for item in self.turn.items)
            self.finish_reason = "tool_calls" if called else finish
        return new

    @property
    def reasoning_tokens(self) -> int:
        """The tokens of complete messages of reasoning, and of the last one once the completion has ended."""
        if isinstance(self.turn, RawItems):
            return 0
        kinds = (
            (message, harmony.meaning(message, self.turn.tools)) for message in self.turn.parser.result.messages
        )
        return sum(message.span[1] - message.span[0] for message, meant in kinds if meant.kind == "reasoning")


def by_completion(events: Iterable[TokenEvent]) -> Iterable[list[TokenEvent]]:
    """The events of each completion, in their order; a request's error ends one of its completions."""
    found: dict[tuple[str, int], list[TokenEvent]] = {}
    for event in events:
        found.setdefault((event.request_id, event.index), []).append(event)
    return found.values()
