"""Sampling parameters, request outputs and the constraint interface: plain data that does not import jax."""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Protocol

from gptoss_jax.errors import UsageError, expect

if TYPE_CHECKING:
    import numpy as np

FinishReason = Literal["stop", "length", "tool_calls", "error"]


@dataclasses.dataclass(frozen=True)
class StructuredOutputsParams:
    """A constraint on a request's answer. Exactly one field is set; anything else raises UsageError.

    Args:
      json: a JSON schema, as an object or as its text.
      regex: a regular expression that the whole answer must match.
      choice: the allowed answers.
      grammar: a context-free grammar, in Lark's or llama.cpp's (GBNF) notation.
      json_object: True requires a JSON object of any schema.
    """

    json: str | Mapping[str, Any] | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None

    def __post_init__(self) -> None:
        names = [field.name for field in dataclasses.fields(self)]
        given = [name for name in names if getattr(self, name) is not None and getattr(self, name) is not False]
        if len(given) != 1:
            found = " and ".join(given) or "none"
            raise UsageError(f"expected one of {', '.join(names)}, found {found}", "structured_outputs")
        [name] = given
        value, choice = getattr(self, name), self.choice
        texts = (
            isinstance(choice, Sequence)
            and not isinstance(choice, str)
            and all(isinstance(c, str) for c in choice)
        )
        fine, expected = {
            "json": (isinstance(value, str | Mapping), "a JSON schema"),
            "regex": (isinstance(value, str), "a regular expression"),
            "choice": (texts and bool(choice), "texts to choose from"),
            "grammar": (isinstance(value, str), "the text of a grammar"),
            "json_object": (value is True, "true"),
        }[name]
        expect(fine, f"structured_outputs.{name}", expected, value)


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How a request's tokens are sampled. Raises UsageError for a value out of range.

    Args:
      max_tokens: maximum number of tokens to generate; None allows as many as the context holds.
      temperature: divides the logits; 0 selects the most likely token.
      top_p: keeps the smallest set of most likely tokens whose total probability reaches this value.
      top_k: keeps this many of the most likely tokens, including ties with the last one; 0 or -1 keeps all.
      min_p: keeps tokens whose probability is at least this fraction of the most likely token's.
      seed: makes a request's tokens reproducible regardless of the other requests in the batch, up to the rounding of
        logits, which in bfloat16 depends on the number of tokens in a step; None draws a random seed.
      stop: strings that end the generation; the output text does not include them.
      stop_token_ids: tokens that end the request, in addition to the checkpoint's own; their text is left out as well.
      ignore_eos: continue past the checkpoint's own stop tokens: those of generation_config.json, or of config.json if
        it lists none, and harmony's.
      logprobs: number of most likely tokens to report at each position, besides the chosen one; None reports none.
      n: number of completions of the prompt; they share the prompt's pages, and completion i uses seed + i.
      min_tokens: number of tokens before which no token or string may end the request.
      repetition_penalty: divides the positive logits, and multiplies the negative logits, of tokens in the prompt and
        the output; values above 1 make them less likely.
      presence_penalty: subtracted from the logits of tokens that occur in the output.
      frequency_penalty: subtracted from a token's logit once for each of its occurrences in the output.
      logit_bias: values added to the logits, by token id.
      prompt_logprobs: like `logprobs`, for the tokens of the prompt.
      structured_outputs: constraint on the answer: in a chat on the text of the final channel, else on all text.
    """

    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    n: int = 1
    min_tokens: int = 0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    prompt_logprobs: int | None = None
    structured_outputs: StructuredOutputsParams | None = None

    def __post_init__(self) -> None:
        self._normalise()
        fine = self.max_tokens is None or is_int(self.max_tokens, 1)
        self._check("max_tokens", fine, "an integer from 1, below 2**31")
        self._check("temperature", is_number(self.temperature, 0, 1e6), "a number from 0 to 1e6")
        self._check("top_p", is_number(self.top_p, 0, 1) and self.top_p > 0, "a number above 0, at most 1")
        self._check("top_k", is_int(self.top_k, 0), "an integer from 0, below 2**31")
        self._check("min_p", is_number(self.min_p, 0, 1), "a number from 0 to 1")
        self._check("seed", self.seed is None or is_int(self.seed, 0, 2**64 - 1), "an integer from 0, below 2**64")
        self._check("stop", all(isinstance(s, str) and s for s in self.stop), "strings that are not empty")
        self._check("stop_token_ids", all(is_int(t, 0) for t in self.stop_token_ids), "token ids")
        self._check("ignore_eos", isinstance(self.ignore_eos, bool), "true or false")
        self._check("n", is_int(self.n, 1, 1024), "an integer from 1 to 1024")
        self._check("min_tokens", is_int(self.min_tokens, 0), "an integer from 0, below 2**31")
        fine = self.max_tokens is None or self.min_tokens <= self.max_tokens
        self._check("min_tokens", fine, f"at most max_tokens of {self.max_tokens}")
        fine = is_number(self.repetition_penalty, 0, 1e6) and self.repetition_penalty > 0
        self._check("repetition_penalty", fine, "a number above 0")
        for name in ("presence_penalty", "frequency_penalty"):
            self._check(name, is_number(getattr(self, name), -2, 2), "a number from -2 to 2")
        bias = self.logit_bias or {}
        fine = len(bias) <= 1024 and all(is_int(t, 0) and is_number(b, -1e6, 1e6) for t, b in bias.items())
        self._check("logit_bias", fine, "at most 1024 token ids with a number each")
        fine = self.prompt_logprobs is None or is_int(self.prompt_logprobs, 0, 20)
        self._check("prompt_logprobs", fine, "an integer from 0 to 20")
        self._check("logprobs", self.logprobs is None or is_int(self.logprobs, 0, 20), "an integer from 0 to 20")
        if self.structured_outputs is not None:
            # Only a stop token can follow a complete answer.
            self._check("min_tokens", self.min_tokens == 0, "0 with structured_outputs")
            self._check("ignore_eos", not self.ignore_eos, "false with structured_outputs")

    def _normalise(self) -> None:
        """Convert values as JSON and other libraries write them: null, a single string, keys as text, -1 for all."""
        put = partial(object.__setattr__, self)
        for name in ("stop", "stop_token_ids"):
            value = getattr(self, name)
            value = () if value is None else (value,) if isinstance(value, str) else value
            self._check(name, isinstance(value, Sequence) and not isinstance(value, str), "a list")
            put(name, tuple(value))
        if is_int(self.top_k, -1, -1):
            put("top_k", 0)
        if self.logit_bias is not None:
            self._check("logit_bias", isinstance(self.logit_bias, Mapping), "token ids with a number each")
            bias = self.logit_bias
            keys = [int(k) if isinstance(k, str) and k.isdecimal() and len(k) < 20 else k for k in bias]
            put("logit_bias", dict(zip(keys, bias.values(), strict=True)))
        if isinstance(constraint := self.structured_outputs, Mapping):
            known = {field.name for field in dataclasses.fields(StructuredOutputsParams)}
            for name in constraint:
                if name not in known:
                    raise UsageError(f"expected one of {', '.join(sorted(known))}", f"structured_outputs.{name}")
            put("structured_outputs", StructuredOutputsParams(**constraint))
        fine = self.structured_outputs is None or isinstance(self.structured_outputs, StructuredOutputsParams)
        self._check("structured_outputs", fine, 'an object such as {"regex": "[0-9]+"}')

    @property
    def penalised(self) -> bool:
        """Whether the tokens generated so far change the logits."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    def _check(self, name: str, fine: bool, expected: str) -> None:
        expect(fine, name, expected, getattr(self, name))


def is_int(value: Any, least: int, most: int = 2**31 - 1) -> bool:
    """Whether `value` is an integer, and no boolean, from `least` to `most`."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and least <= int(value) <= most


def is_number(value: Any, least: float, most: float) -> bool:
    """Whether `value` is a real number, and no boolean, from `least` to `most`."""
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return real and bool(least <= value <= most)


@dataclasses.dataclass(frozen=True)
class TokenLogprobs:
    """Log-probabilities at one position, before temperature.

    `logprob` is that of the chosen token, `top` those of the most likely tokens by id.
    """

    token_id: int
    logprob: float
    top: dict[int, float]


@dataclasses.dataclass
class CompletionOutput:
    """One generated sequence.

    `text` is the generated text, or None without a tokenizer; in a chat it is the text of the final answer. `message`
    is the OpenAI-style assistant message of a chat (content, thinking, tool_calls). `malformed` lists the violations
    of the harmony format, one line each.
    """

    index: int
    token_ids: list[int]
    text: str | None
    logprobs: list[TokenLogprobs] | None
    finish_reason: FinishReason | None
    message: dict[str, Any] | None = None
    malformed: Sequence[str] = ()


@dataclasses.dataclass
class RequestOutput:
    """A request's prompt and what was generated for it.

    `prompt_logprobs` has None for the first token. `cached_tokens` is the number of prompt tokens found in the prefix
    cache. `drafted_tokens` counts the tokens that speculative decoding proposed, `accepted_tokens` those it accepted.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    cached_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0


@dataclasses.dataclass(frozen=True)
class ChatScope:
    """The tool calls that a chat's completion may have. The reasoning is free, and an answer is in the final channel.

    Harmony ends a call with `<|call|>`, which is a stop token of the engine, so a completion has at most one call that
    ends so: the last. Calls before it end with `<|end|>`, as other messages do.

    Args:
      calls: "none" allows no call and "auto" any number of calls. With "required" the completion has no final channel
        until it has called a tool, and at most one message in each other channel, so that a model that would rather
        answer does not reason again and again.
      tools: the recipients that can be called, such as `functions.NAME`, `browser.search` or `python`, each with the
        text of a JSON schema that the call's content follows, or None if the content is free. None allows any name.
      parallel: whether another message may follow a call; if not, the first call ends the completion.
    """

    calls: Literal["none", "auto", "required"] = "auto"
    tools: tuple[tuple[str, str | None], ...] | None = None
    parallel: bool = True

    def __post_init__(self) -> None:
        if self.tools is not None:
            # JSON has lists instead of tuples.
            object.__setattr__(self, "tools", tuple((name, schema) for name, schema in self.tools))
        expect(self.calls != "required" or self.tools != (), "tools", "at least one if calls are required", "none")

    @property
    def free(self) -> bool:
        """Whether it allows everything that an unconstrained model can generate."""
        return self.calls == "auto" and self.tools is None and self.parallel


Scope = Literal["text"] | ChatScope
"""What a request's constraint applies to: all of a completion's text, or the messages of a chat."""


def is_constrained(answer: StructuredOutputsParams | None, scope: Scope) -> bool:
    """Whether a completion with this constraint on its answer, and with this scope, needs a `TokenConstraint`."""
    return answer is not None or (isinstance(scope, ChatScope) and not scope.free)


class TokenConstraint(Protocol):
    """Restricts the next token of one sequence."""

    def fill(self, bitmask: np.ndarray) -> None:
        """Set the bits of `bitmask`, uint32 words that are all ones on entry, to the tokens allowed next."""
        ...

    def accept(self, token: int) -> None:
        """Advance by the sampled token."""
        ...


class ConstraintFactory(Protocol):
    """Creates the constraint of a completion. Raises UsageError for a grammar that cannot be used."""

    def __call__(self, params: StructuredOutputsParams | None, scope: Scope) -> TokenConstraint:
        """A new constraint, for a single completion. Without `params` the answer is free, and the scope is a chat's."""
        ...
