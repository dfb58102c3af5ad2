"""The parts of responses that Chat Completions and Completions share."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any

import msgspec

from gptoss_jax.serving.api.errors import bad_request
from gptoss_jax.serving.turns import Usage
from gptoss_jax.text.tokenizer import Tokenizer
from gptoss_jax.types import TokenLogprobs

LEAST_LOGPROB = -9999.0
"""OpenAI's log-probability of tokens that are very unlikely; JSON has no infinity."""


class StreamOptions(msgspec.Struct):
    """OpenAI's and vLLM's options of streams."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None


def check_stream(stream: bool | None, options: StreamOptions | None, prompt_logprobs: int | None) -> None:
    """Raise ApiError for options of a stream without a stream, and for what cannot be streamed."""
    if options is not None and not stream:
        raise bad_request("stream_options: expected only with stream: true", "stream_options")
    if stream and prompt_logprobs is not None:
        raise bad_request("prompt_logprobs: expected only without stream", "prompt_logprobs")


def new_id(prefix: str) -> str:
    """A new id of an object."""
    return f"{prefix}-{uuid.uuid4().hex}"


def usage_object(usages: Sequence[Usage]) -> dict[str, Any]:
    """The token counts of all requests that make up a response."""
    prompt, completion = sum(u.prompt_tokens for u in usages), sum(u.completion_tokens for u in usages)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(u.cached_tokens for u in usages)},
        "completion_tokens_details": {"reasoning_tokens": sum(u.reasoning_tokens for u in usages)},
    }


def bounded(logprob: float) -> float:
    """A log-probability that JSON can hold."""
    return max(logprob, LEAST_LOGPROB)


class TokenTexts:
    """The texts of tokens in lists of log-probabilities.

    A token that is not UTF-8 by itself is written as its bytes, such as "bytes:\\xf0\\x9f", and a special or unknown
    one by its id, such as "token_id:42"; so are all tokens if `by_id`, or without a tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer | None, by_id: bool = False) -> None:
        self._tokenizer, self._by_id = tokenizer, by_id
        self._special = set(tokenizer.special_tokens.values()) if tokenizer else set()

    def is_text(self, token: int) -> bool:
        """Whether a token is part of generated text, that is, not special."""
        return self._tokenizer is not None and token not in self._special

    def decoded(self, token: int) -> bytes:
        """The bytes that a token decodes to."""
        return self._tokenizer.decode_bytes((token,)) if self._tokenizer else b""

    def data(self, token: int) -> bytes | None:
        """The bytes of an ordinary token; None for a special or unknown one."""
        known = self._tokenizer is not None and self.is_text(token) and token in self._tokenizer
        return self.decoded(token) if known else None

    def text(self, token: int) -> str:
        """The text of a token."""
        data = None if self._by_id else self.data(token)
        if data is None:
            return f"token_id:{token}"
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def prompt_logprobs(self, logprobs: Sequence[TokenLogprobs | None]) -> list[dict[str, Any] | None]:
        """vLLM's list of the log-probabilities of a prompt's tokens."""
        return [None if one is None else self._ranked(one) for one in logprobs]

    def _ranked(self, logprobs: TokenLogprobs) -> dict[str, Any]:
        ranks = {token: rank for rank, token in enumerate(logprobs.top, 1)}
        return {
            str(token): {"logprob": bounded(value), "rank": ranks.get(token), "decoded_token": self.text(token)}
            for token, value in ({logprobs.token_id: logprobs.logprob} | logprobs.top).items()
        }
