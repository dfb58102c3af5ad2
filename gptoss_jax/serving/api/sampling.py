"""The fields of requests that say how tokens are sampled."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from gptoss_jax.errors import UsageError
from gptoss_jax.serving.api.errors import ApiError, as_api_error, bad_request
from gptoss_jax.types import SamplingParams

MAX_N = 128
"""The most completions of a prompt."""

MAX_SAMPLED_TOKENS = 2**22
"""The most tokens of a request's prompts, each counted once for each of its completions."""

StopString = Annotated[str, Meta(max_length=1000)]
TopLogprobs = Annotated[int, Meta(ge=0, le=20)]


class SamplingFields(msgspec.Struct, kw_only=True):
    """Fields that mean the same in Chat Completions and Completions: OpenAI's and vLLM's; null is the default."""

    n: Annotated[int, Meta(ge=1, le=MAX_N)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: Annotated[int, Meta(ge=-(2**63))] | None = None
    stop: StopString | Annotated[list[StopString], Meta(max_length=64)] | None = None
    stop_token_ids: Annotated[list[int], Meta(max_length=1024)] | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: Annotated[dict[str, float], Meta(max_length=1024)] | None = None
    prompt_logprobs: TopLogprobs | None = None
    structured_outputs: dict[str, Any] | None = None
    priority: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None


_NAMES = frozenset(field.name for field in dataclasses.fields(SamplingParams))


def sampling_params(fields: SamplingFields, **others: Any) -> SamplingParams:
    """The parameters of a request's fields and of `others`; None is the default. Raises UsageError."""
    given = {name: getattr(fields, name) for name in fields.__struct_fields__ if name in _NAMES} | others
    if given["seed"] is not None and given["seed"] < 0:
        given["seed"] += 2**64
    return SamplingParams(**{name: value for name, value in given.items() if value is not None})


def check_size(prompt_tokens: int, n: int) -> None:
    """Raise ApiError if the prompts' tokens, counted once for each of `n` completions, are too many."""
    if prompt_tokens * n > MAX_SAMPLED_TOKENS:
        raise bad_request(
            f"n: expected at most {MAX_SAMPLED_TOKENS} prompt tokens over all completions, found {prompt_tokens * n}",
            "n",
        )


def renamed(error: Exception, names: Mapping[str, str]) -> ApiError:
    """The error that a client sees, in terms of its request's fields: `names` has them by the engine's names."""
    found = as_api_error(error)
    if not isinstance(error, UsageError) or error.field is None:
        return found
    name = names.get(error.field) or names.get(error.field.partition(".")[0])
    if name is None:
        return found
    return ApiError(found.status, f"{name}: {error.message}", found.kind, name, found.code, found.headers)
