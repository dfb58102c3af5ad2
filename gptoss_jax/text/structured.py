"""Structured output: which tokens may come next, so that an answer keeps to a JSON schema, a regex or a grammar.

In a chat the form is that of the final channel's text, and the model is free to reason before it. What it is not
free to do is to answer otherwise: headers are those of harmony's assistant messages, analysis and commentary end with
`<|end|>` alone, a call needs a recipient and tools to call, and `<|return|>` follows a complete final answer. Only
`max_tokens`, `stop` and `stop_token_ids` can cut an answer short.
"""

from __future__ import annotations

import functools
import json
import logging
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from gptoss_jax.errors import UsageError
from gptoss_jax.text.harmony import MessageEnd, MessageStart, StreamParser
from gptoss_jax.text.harmony.meaning import NAMELESS, NOBODY
from gptoss_jax.text.tokenizer import Tokenizer
from gptoss_jax.types import Scope, StructuredOutputsParams, TokenConstraint

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

CACHED = 64
"""Compiled grammars that are kept."""

JSON_DEFAULTS = {"whitespace_pattern": r" |\n[ \t]{0,40}"}
"""A schema's `x-guidance` has precedence. Without a bound on whitespace a model at a loss writes nothing else.

Keywords that llguidance cannot keep to are refused, except a `format` that it does not know: that is no constraint.
"""

# What may follow <|start|>assistant. A call names its recipient before or after the channel, and may say what it is in.
# <|constrain|> of a final answer is left out: openai-harmony reads its type as a recipient.
_HEADER = """
start: {start}header
header: final | other
final: <|channel|> "final" <|message|>
other: {other}
CHANNEL: /analysis|commentary/
TO: / to=([0-9A-Za-z_.\\-]|[^\\x00-\\x7f\\s\\p{{Cc}}])+/ & ~/ to=({no_tool})/
TYPE: /[a-z_]+/
"""

# No tool has these names, and a channel's is read as the channel. Any other name that harmony.tools accepts can be a
# recipient, in whichever script.
_NO_TOOL = [re.escape(name) for name in (*NOBODY, *NAMELESS, "analysis", "commentary", "final")]

_MESSAGE = "<|channel|> CHANNEL <|message|>"
_CALL = '(TO <|channel|> CHANNEL | <|channel|> CHANNEL TO) (" code" | " "? <|constrain|> TYPE)? <|message|>'

_logger = logging.getLogger(__name__)


def check(form: StructuredOutputsParams) -> None:
    """See that a form can be used, without a tokenizer. Raises UsageError, naming the field."""
    _compile(*_source(form), None)


class Grammars:
    """Makes constraints for the vocabulary of a tokenizer and a model; the engine's `constrain`.

    `vocab_size` is the model's, whose tokens beyond the tokenizer's are never allowed, and `eos_token_ids` end an
    answer. Grammars are compiled once, and no more than `CACHED` of them are kept.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Iterable[int]) -> None:
        self._tokenizer, self._vocab_size, self._eos = tokenizer, vocab_size, sorted(eos_token_ids)
        self._matcher = functools.lru_cache(CACHED)(self._make_matcher)
        self._answer = functools.lru_cache(CACHED)(self._make_answer)
        self.words = functools.cache(self._make_words)

    def __call__(self, form: StructuredOutputsParams, scope: Scope) -> TokenConstraint:
        """A constraint for one completion. Raises UsageError."""
        if not self._eos:
            raise UsageError("structured_outputs: the model has no stop token, which would end a complete answer")
        answer = self._answer(*_source(form))
        if scope == "text":
            return _Text(answer.deep_copy())
        return _Final(self, answer, calls=scope == "final or call")

    @functools.cached_property
    def _vocabulary(self) -> LLTokenizer:
        """llguidance's view of the tokenizer, which takes a second to make for 200 000 tokens."""
        llguidance, tokenizer = _llguidance(), self._tokenizer

        class Wrapped:
            def __init__(self, eos: int, vocab_size: int) -> None:
                self.eos_token_id, self.bos_token_id = eos, None
                self.tokens = [tokenizer.token_bytes(i) if i in tokenizer else b"" for i in range(vocab_size)]
                self.special_token_ids = sorted(tokenizer.special_tokens.values())

            def __call__(self, text: bytes) -> list[int]:
                return tokenizer.encode(text.decode("utf-8", "replace"))

        wrapped = llguidance.TokenizerWrapper(Wrapped(self._eos[0], self._vocab_size))
        return llguidance.LLTokenizer(wrapped, n_vocab=self._vocab_size, eos_token=self._eos)

    def parser(self) -> StreamParser:
        """Reads a completion."""
        return StreamParser(self._tokenizer)

    def header(self, first: bool, calls: bool) -> LLMatcher:
        """What a message begins with; the prompt has the `<|start|>assistant` of the first one."""
        start, other = "" if first else '<|start|> "assistant" ', f"{_MESSAGE} | {_CALL}" if calls else _MESSAGE
        source = _HEADER.format(start=start, other=other, no_tool="|".join(_NO_TOOL))
        return self._matcher(_llguidance().grammar_from("lark", source)).deep_copy()

    def _make_answer(self, name: str, kind: str, text: str) -> LLMatcher:
        return self._make_matcher(_compile(name, kind, text, self._vocabulary))

    def _make_matcher(self, grammar: str) -> LLMatcher:
        return _llguidance().LLMatcher(self._vocabulary, grammar, log_level=0)

    def _make_words(self, *special: str) -> np.ndarray:
        """uint32 words with the bits of all ordinary tokens set, and of these special ones."""
        allowed = np.zeros(-(-self._vocab_size // 32) * 32, bool)
        allowed[[i for i in range(self._vocab_size) if i in self._tokenizer]] = True
        allowed[list(self._tokenizer.special_tokens.values())] = False
        allowed[[self._tokenizer.encode_special(name) for name in special]] = True
        return np.packbits(allowed, bitorder="little").view(np.uint32)


class _Text:
    """The whole completion has the form."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    def fill(self, words: np.ndarray) -> None:
        """See TokenConstraint."""
        _fill(self._matcher, words)

    def accept(self, token: int) -> None:
        """See TokenConstraint."""
        _accept(self._matcher, token)


class _Final:
    """The final channel's text has the form; everything else is harmony as an assistant writes it."""

    def __init__(self, grammars: Grammars, answer: LLMatcher, calls: bool) -> None:
        self._grammars, self._answer, self._calls = grammars, answer, calls
        self._parser = grammars.parser()
        self._free: np.ndarray | None = None
        self._matcher = grammars.header(first=True, calls=calls)
        self._in_answer = False

    def fill(self, words: np.ndarray) -> None:
        """See TokenConstraint."""
        if self._free is not None:
            words[:] = self._free
            return
        _fill(self._matcher, words)
        if self._in_answer:
            # Of what stops the engine, an answer ends with <|return|>.
            words &= self._grammars.words("<|return|>")

    def accept(self, token: int) -> None:
        """See TokenConstraint."""
        if self._free is None:
            _accept(self._matcher, token)
        for event in self._parser.push(token):
            if isinstance(event, MessageStart):
                self._begin(event.header.channel == "final", event.header.recipient is not None)
            elif isinstance(event, MessageEnd):
                self._free, self._in_answer = None, False
                self._matcher = self._grammars.header(first=False, calls=self._calls)

    def _begin(self, final: bool, to_recipient: bool) -> None:
        if final:
            self._in_answer, self._matcher = True, self._answer.deep_copy()
            return
        self._free = self._grammars.words("<|end|>", *(["<|call|>"] if self._calls and to_recipient else []))


def _fill(matcher: LLMatcher, words: np.ndarray) -> None:
    matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)


def _accept(matcher: LLMatcher, token: int) -> None:
    failed = matcher.is_error()
    if not matcher.consume_token(token) and not failed:
        # Such as a grammar that has become too complex: what follows can only be a stop token.
        _logger.warning("structured_outputs: the answer is cut short: %s", _one_line(matcher.get_error()))


def _compile(name: str, kind: str, text: str, vocabulary: LLTokenizer | None) -> str:
    """What `_source` gives in llguidance's own notation, checked. Raises UsageError."""
    llguidance = _llguidance()
    try:
        if kind == "json_schema":
            grammar = llguidance.LLMatcher.grammar_from_json_schema(text, defaults=JSON_DEFAULTS)
        else:
            grammar = llguidance.grammar_from(kind, text)
    except ValueError as error:
        raise UsageError(f"structured_outputs.{name}: {_one_line(str(error))}") from None
    failed, messages = llguidance.LLMatcher.validate_grammar_with_warnings(grammar, vocabulary)
    if failed:
        raise UsageError(f"structured_outputs.{name}: {_one_line(messages[0])}")
    return str(grammar)


def _source(form: StructuredOutputsParams) -> tuple[str, str, str]:
    """The field that is given, llguidance's name for what it is, and its text."""
    if form.json is not None:
        return "json", "json_schema", _schema(form.json)
    if form.regex is not None:
        return "regex", "regex", form.regex
    if form.choice is not None:
        return "choice", "choice", json.dumps(list(form.choice))
    if form.grammar is not None:
        return "grammar", "grammar", form.grammar
    return "json_object", "json_schema", json.dumps({"type": "object"})


def _schema(schema: str | Mapping[str, Any]) -> str:
    try:
        value = json.loads(schema) if isinstance(schema, str) else schema
        text = json.dumps(_without_unknown_formats(value))
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(f"structured_outputs.json: not valid JSON: {_one_line(str(error))}") from None
    if not isinstance(value, Mapping):
        raise UsageError(f"structured_outputs.json: expected a JSON schema object, found {type(value).__name__}")
    return text


_BY_NAME = ("properties", "patternProperties", "dependentSchemas", "dependencies", "$defs", "definitions")


def _without_unknown_formats(schema: Any) -> Any:
    """A schema without the formats that llguidance does not know, which JSON Schema makes annotations.

    llguidance would refuse them, or in its lenient mode take any other keyword that it cannot keep to as well. A
    reference may lead anywhere in a schema, so all of it is searched except the values of `const` and `enum`.
    """
    if isinstance(schema, list | tuple):
        return [_without_unknown_formats(item) for item in schema]
    if not isinstance(schema, Mapping):
        return schema
    kept: dict[Any, Any] = {}
    for key, value in schema.items():
        if key == "const" or (key == "enum" and not isinstance(value, Mapping)):
            kept[key] = value
        elif key in _BY_NAME and isinstance(value, Mapping):
            kept[key] = {name: _without_unknown_formats(item) for name, item in value.items()}
        elif not (key == "format" and isinstance(value, str) and not _knows_format(value)):
            kept[key] = _without_unknown_formats(value)
    return kept


@functools.lru_cache(1024)
def _knows_format(name: str) -> bool:
    """Whether llguidance constrains a string to a format. Versions differ, so it is asked."""
    llguidance = _llguidance()
    grammar = llguidance.LLMatcher.grammar_from_json_schema(json.dumps({"type": "string", "format": name}))
    failed, _ = llguidance.LLMatcher.validate_grammar_with_warnings(grammar, None)
    return not failed


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError:
        raise UsageError(
            "structured_outputs: llguidance is missing: pip install 'gptoss-jax[structured]'"
        ) from None
    return llguidance


def _one_line(text: str) -> str:
    return " ".join(text.split())[:300]
