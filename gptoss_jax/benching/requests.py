"""The requests of a load: their prompts, their sizes, and when they arrive."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from gptoss_jax.benching.endpoints import Prompt
from gptoss_jax.benching.workload import Arrival, random_prompt

_WORDS = (
    "the of and to in is that for it as was with be by on not he his but at are this have from or had an they which "
    "one you were her all she there would their we him been has when who will more no if out so said what up its "
    "about into than them can only other new some could time these two may then do first any my now such like our "
    "over man me even most made after also did many before must through back years where much your way well down "
    "should because each just those people how too little state good very make world still own see men work long get"
)
WORDS = tuple(_WORDS.split())
"""Each is one token of the o200k vocabulary, alone and after a space."""


@dataclass(frozen=True)
class Request:
    """A prompt, as text or token ids, and the number of its tokens (None: unknown); the maximum output tokens."""

    prompt: Prompt
    input_tokens: int | None
    output_tokens: int


PromptMaker = Callable[[int], Prompt]
"""Makes a random prompt of a number of tokens."""


def random_ids(rng: np.random.Generator, vocab_size: int) -> PromptMaker:
    """Makes prompts of token ids below `vocab_size`."""
    return lambda length: random_prompt(rng, vocab_size, length)


def random_text(rng: np.random.Generator) -> PromptMaker:
    """Makes prompts of `WORDS`, for APIs that take text only. Their chat format adds tokens to those of the words."""
    return lambda length: " ".join(WORDS[index] for index in rng.integers(0, len(WORDS), length))


def random_requests(
    rng: np.random.Generator,
    make: PromptMaker,
    count: int,
    input_len: int,
    output_len: int,
    range_ratio: float = 0.0,
    prefix_len: int = 0,
) -> list[Request]:
    """Requests with random prompts that all begin with the same `prefix_len` tokens.

    Lengths are uniform over the integers in [len * (1 - range_ratio), len * (1 + range_ratio)], and at least 1;
    `input_len` does not include the prefix.
    """
    prefix = make(prefix_len)
    inputs, outputs = (_lengths(rng, count, length, range_ratio) for length in (input_len, output_len))
    return [
        Request(_joined(prefix, make(own)), prefix_len + own, output)
        for own, output in zip(inputs, outputs, strict=True)
    ]


def _lengths(rng: np.random.Generator, count: int, length: int, ratio: float) -> list[int]:
    low, high = math.floor(length * (1 - ratio)), math.ceil(length * (1 + ratio))
    return [max(1, drawn) for drawn in rng.integers(low, high + 1, count).tolist()]


def _joined(prefix: Prompt, rest: Prompt) -> Prompt:
    if isinstance(prefix, str) or isinstance(rest, str):
        return f"{prefix} {rest}" if prefix else rest
    return [*prefix, *rest]


def trace_requests(make: PromptMaker, arrivals: Sequence[Arrival]) -> list[Request]:
    """Requests with random prompts and the lengths of a trace."""
    return [Request(make(one.prompt_tokens), one.prompt_tokens, one.output_tokens) for one in arrivals]


def arrival_times(rng: np.random.Generator, count: int, rate: float, burstiness: float = 1.0) -> list[float]:
    """When requests arrive, in seconds from the start, at `rate` requests per second; all at 0 if that is infinite.

    The gaps follow a gamma distribution of shape `burstiness`: with 1 arrivals are a Poisson process, below 1 they
    come in bursts, above 1 they are more regular. All are scaled so that the last request arrives at count / rate.
    """
    if math.isinf(rate):
        return [0.0] * count
    times = np.cumsum(rng.gamma(burstiness, 1 / (rate * burstiness), count))
    if not times[-1] > 0:
        # Gaps of a tiny shape underflow.
        return [count / rate] * count
    scaled: list[float] = (times * (count / rate / times[-1])).tolist()
    return scaled
