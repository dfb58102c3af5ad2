"""Turns prompts and conversations into requests."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gptoss_jax.errors import UsageError
from gptoss_jax.serving.generated import Request
from gptoss_jax.text import harmony
from gptoss_jax.text.tokenizer import Tokenizer
from gptoss_jax.text.tool_choice import chat_scope
from gptoss_jax.types import SamplingParams

Message = Mapping[str, Any]


class Prompts:
    """Makes requests with the tokenizer of a checkpoint's directory, which may have none."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.tokenizer = Tokenizer.from_dir(path) if (path / "tokenizer.json").exists() else None

    def raw_request(self, request_id: str, prompt: str | Sequence[int], params: SamplingParams) -> Request:
        """A request that continues text or token ids. Raises UsageError."""
        if params.stop:
            self.need_tokenizer("stop strings")
        if isinstance(prompt, str):
            return Request(request_id, self.need_tokenizer("text").encode(prompt), params, prompt=prompt)
        return Request(request_id, list(prompt), params)

    def chat_request(
        self, request_id: str, messages: Sequence[Message], params: SamplingParams, **options: Any
    ) -> Request:
        """A request for the assistant's next message; `options` as for `chat`. Raises UsageError."""
        tokenizer = self.need_tokenizer("conversations")
        if not messages:
            raise UsageError("expected at least one", "messages")
        options = {name: value for name, value in options.items() if value is not None}
        options.setdefault("current_date", datetime.date.today().isoformat())
        choice = {name: options.pop(name, None) for name in ("tool_choice", "parallel_tool_calls")}
        prompt = harmony.render(messages, tokenizer, **options)
        given = options.get("tools"), options.get("builtin_tools", ())
        has_grammar = params.structured_outputs is not None
        scope = chat_scope(harmony.tool_recipients(*given), **choice, has_grammar=has_grammar)
        tools = harmony.tool_names(*given)
        return Request(request_id, prompt, params, chat=True, scope=scope, tools=tools)

    def need_tokenizer(self, purpose: str) -> Tokenizer:
        """The tokenizer. Raises UsageError without one, saying what needs it."""
        if self.tokenizer is None:
            raise UsageError(
                f"no such file, so {purpose} cannot be used; pass token ids (generate --prompt-tokens)",
                where=str(self._path / "tokenizer.json"),
            )
        return self.tokenizer
