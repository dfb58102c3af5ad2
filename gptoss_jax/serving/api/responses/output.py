"""Folds what the model generates into a response and the events that stream it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from gptoss_jax.serving.api.errors import ApiError
from gptoss_jax.serving.api.objects import TokenTexts, bounded
from gptoss_jax.serving.api.responses.events import Events
from gptoss_jax.serving.api.responses.fields import CreateRequest, shown_format
from gptoss_jax.serving.api.responses.ids import new_id
from gptoss_jax.serving.api.responses.tools import Tools
from gptoss_jax.serving.turns import Update, Usage
from gptoss_jax.text.items import Item, ItemEvent, ItemStart, ItemText, TextToken
from gptoss_jax.types import SamplingParams

_DELTAS = {
    "reasoning": "response.reasoning_text",
    "message": "response.output_text",
    "function_call": "response.function_call_arguments",
}
"""The events with the text of an item, by its type."""


def new_response(
    response_id: str, model: str, request: CreateRequest, tools: Tools, params: SamplingParams
) -> dict[str, Any]:
    """The response to a request before anything is generated."""
    reasoning = request.reasoning
    return {
        "id": response_id,
        "object": "response",
        "created_at": int(time.time()),
        "completed_at": None,
        "status": "in_progress",
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": request.instructions,
        "max_output_tokens": request.max_output_tokens,
        "max_tool_calls": request.max_tool_calls,
        "model": model,
        "output": [],
        "parallel_tool_calls": request.parallel_tool_calls is not False,
        "previous_response_id": request.previous_response_id,
        "prompt_cache_key": request.prompt_cache_key,
        "reasoning": {"effort": (reasoning and reasoning.effort) or "medium", "summary": None},
        "safety_identifier": request.safety_identifier,
        "service_tier": "default",
        "store": request.store is not False,
        "temperature": params.temperature,
        "top_p": params.top_p,
        "presence_penalty": params.presence_penalty,
        "frequency_penalty": params.frequency_penalty,
        "top_logprobs": request.top_logprobs or 0,
        "text": {
            "format": shown_format(request),
            "verbosity": (request.text and request.text.verbosity) or "medium",
        },
        "tool_choice": request.tool_choice or "auto",
        "tools": tools.shown,
        "truncation": request.truncation or "disabled",
        "usage": None,
        "user": request.user,
        "metadata": request.metadata or {},
    }


class Output:
    """A response while it is generated.

    Args:
      response: from `new_response`; its output, status and usage follow the updates.
      events: where its events go.
      tools: the request's tools.
      texts: the texts of tokens.
      seal: encrypts reasoning; None leaves it out.
    """

    def __init__(
        self,
        response: dict[str, Any],
        events: Events,
        tools: Tools,
        texts: TokenTexts,
        seal: Callable[[str], str] | None = None,
    ) -> None:
        self.response, self._events = response, events
        self._tools, self._texts, self._seal = tools, texts, seal
        self._open: Item | None = None

    def begin(self) -> None:
        """Add the events before the first update."""
        self._events.add("response.created", response=self.response)
        self._events.add("response.in_progress", response=self.response)

    def add(self, update: Update) -> None:
        """Take an update. The last one ends the response, but for its last event."""
        cut = update.items[-1] if update.finish_reason == "length" and update.items else None
        for event in _merged(update.events):
            if isinstance(event, ItemStart):
                self._start(event.item)
            elif isinstance(event, ItemText):
                self._text(event.text, event.tokens)
            else:
                self._end(event.item, complete=event.item.complete or event.item is not cut)
        if update.finish_reason:
            self._finish(update.finish_reason == "length", update.usage)

    def end(self) -> None:
        """Add the last event."""
        self._events.add(f"response.{self.response['status']}", response=self.response)

    def fail(self, error: ApiError) -> None:
        """End the response by an error: add its event, and those of the item that it cuts short."""
        if self._open is not None:
            self._end(self._open, complete=False)
        code = "server_error" if error.status >= 500 else "invalid_prompt"
        self._events.add("error", code=error.code or code, message=error.message, param=error.param)
        self.response |= {"status": "failed", "error": {"code": code, "message": error.message}}

    def _finish(self, cut: bool, usage: Usage) -> None:
        self.response |= {
            "status": "incomplete" if cut else "completed",
            "completed_at": None if cut else int(time.time()),
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "usage": {
                "input_tokens": usage.prompt_tokens,
                "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
                "output_tokens": usage.completion_tokens,
                "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
                "total_tokens": usage.prompt_tokens + usage.completion_tokens,
            },
        }

    @property
    def _place(self) -> dict[str, Any]:
        """The fields of events that refer to the current item."""
        output = self.response["output"]
        return {"output_index": len(output) - 1, "item_id": output[-1]["id"]}

    def _start(self, item: Item) -> None:
        self._open = item
        shown = self._new_item(item)
        self.response["output"].append(shown)
        self._events.add("response.output_item.added", output_index=self._place["output_index"], item=shown)
        if shown["type"] != "function_call":
            part = _text_part(shown, "", [])
            self._events.add("response.content_part.added", **self._place, content_index=0, part=part)

    def _new_item(self, item: Item) -> dict[str, Any]:
        if item.kind == "reasoning":
            shown = {"id": new_id("rs"), "type": "reasoning", "summary": [], "content": []}
        elif item.kind == "call":
            called = self._tools.called(item.tool or "")
            shown = {"id": new_id("fc"), "type": "function_call", "call_id": new_id("call"), **called}
            shown["arguments"] = ""
        else:
            phase = "commentary" if item.kind == "preamble" else "final_answer"
            shown = {"id": new_id("msg"), "type": "message", "role": "assistant", "phase": phase, "content": []}
        return {**shown, "status": "in_progress"}

    def _text(self, text: str, tokens: Sequence[TextToken]) -> None:
        shown = self.response["output"][-1]
        more: dict[str, Any] = {} if shown["type"] == "function_call" else {"content_index": 0}
        if shown["type"] == "message":
            more["logprobs"] = [self._logprobs(token) for token in tokens]
        self._events.add(f"{_DELTAS[shown['type']]}.delta", **self._place, **more, delta=text)

    def _end(self, item: Item, complete: bool) -> None:
        self._open = None
        shown, place = self.response["output"][-1], self._place
        done = f"{_DELTAS[shown['type']]}.done"
        if shown["type"] == "function_call":
            shown["arguments"] = item.text
            self._events.add(done, **place, name=shown["name"], arguments=item.text)
        else:
            logprobs = [self._logprobs(token) for token in item.tokens]
            part = _text_part(shown, item.text, logprobs)
            shown["content"] = [part]
            more = {"logprobs": logprobs} if shown["type"] == "message" else {}
            self._events.add(done, **place, content_index=0, text=item.text, **more)
            self._events.add("response.content_part.done", **place, content_index=0, part=part)
        if shown["type"] == "reasoning" and self._seal is not None:
            shown["encrypted_content"] = self._seal(item.text)
        shown["status"] = "completed" if complete else "incomplete"
        self._events.add("response.output_item.done", output_index=place["output_index"], item=shown)

    def _logprobs(self, token: TextToken) -> dict[str, Any]:
        found = token.logprobs
        top = [self._logprob(other, value) for other, value in found.top.items()]
        return {**self._logprob(token.token_id, found.logprob), "top_logprobs": top}

    def _logprob(self, token: int, value: float) -> dict[str, Any]:
        data = self._texts.data(token) or b""
        return {"token": self._texts.text(token), "bytes": list(data), "logprob": bounded(value)}


def _text_part(shown: dict[str, Any], text: str, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
    if shown["type"] == "reasoning":
        return {"type": "reasoning_text", "text": text}
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}


def _merged(events: Iterable[ItemEvent]) -> Iterator[ItemEvent]:
    """The events, with adjacent texts of an item as one."""
    texts: list[ItemText] = []
    for event in events:
        if isinstance(event, ItemText):
            texts.append(event)
            continue
        yield from _joined(texts)
        texts.clear()
        yield event
    yield from _joined(texts)


def _joined(texts: Sequence[ItemText]) -> Iterator[ItemText]:
    if texts:
        text = "".join(one.text for one in texts)
        yield ItemText(texts[0].item, text, [token for one in texts for token in one.tokens])
