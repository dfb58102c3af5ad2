"""Structured output: constraints on the next token that make an answer follow a JSON schema, a regex or a grammar.

In a chat the constraint applies to the text of the final channel, and the model may reason freely before it. The
message structure is constrained as well, so that no other answer is possible: headers are those of harmony's assistant
messages, analysis and commentary messages end with `<|end|>` only, a call needs a recipient and available tools, and
`<|return|>` follows a complete final answer. Only `max_tokens`, `stop` and `stop_token_ids` can truncate an answer.
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
from gptoss_jax.text.harmony.meaning import BARE_NAMESPACES, NON_TOOL_RECIPIENTS
from gptoss_jax.text.tokenizer import Tokenizer
from gptoss_jax.types import Scope, StructuredOutputsParams, TokenConstraint

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

CACHE_SIZE = 64
"""Number of compiled grammars that are kept."""

JSON_DEFAULTS = {"whitespace_pattern": r" |\n[ \t]{0,40}"}
"""Options of JSON schemas, which a schema's own `x-guidance` overrides.

The bound on whitespace keeps a model from generating whitespace indefinitely. Keywords that llguidance cannot enforce
are rejected, except an unknown `format`, which does not constrain the string.
"""

# The headers that may follow <|start|>assistant. A call names its recipient before or after the channel, and may give a
# content type. A final answer has no <|constrain|>, because openai-harmony reads its content type as a recipient.
_HEADER = """
start: {start}header
header: final | other
final: <|channel|> "final" <|message|>
other: {other}
CHANNEL: /analysis|commentary/
TO: / to=([0-9A-Za-z_.\\-]|[^\\x00-\\x7f\\s\\p{{Cc}}])+/ & ~/ to=({no_tool})/
TYPE: /[a-z_]+/
"""

# No tool has these names, and the name of a channel is read as the channel. Any other name that harmony.tools accepts
# can be a recipient, in any script.
_NO_TOOL = [
    re.escape(name) for name in (*NON_TOOL_RECIPIENTS, *BARE_NAMESPACES, "analysis", "commentary", "final")
]

_MESSAGE = "<|channel|> CHANNEL <|message|>"
_CALL = '(TO <|channel|> CHANNEL | <|channel|> CHANNEL TO) (" code" | " "? <|constrain|> TYPE)? <|message|>'

_logger = logging.getLogger(__name__)


def check(params: StructuredOutputsParams) -> None:
    """Check that a grammar compiles; no tokenizer is needed. Raises UsageError, naming the field."""
    _compile(*_source(params), None)


class GrammarCompiler:
    """Compiles grammars to constraints over the vocabulary of a tokenizer and a model: a ConstraintFactory.

    `vocab_size` is the model's; its tokens beyond the tokenizer's are never allowed. `eos_token_ids` end an answer. The
    last `CACHE_SIZE` compiled grammars are cached.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Iterable[int]) -> None:
        self._tokenizer, self._vocab_size, self._eos = tokenizer, vocab_size, sorted(eos_token_ids)
        self._matcher = functools.lru_cache(CACHE_SIZE)(self._make_matcher)
        self._answer = functools.lru_cache(CACHE_SIZE)(self._make_answer)
        self.bitmask = functools.cache(self._make_bitmask)

    def __call__(self, params: StructuredOutputsParams, scope: Scope) -> TokenConstraint:
        """A new constraint, for a single completion. Raises UsageError."""
        if not self._eos:
            raise UsageError("the model has no stop token to end a complete answer", "structured_outputs")
        answer = self._answer(*_source(params))
        if scope == "text":
            return _TextConstraint(answer.deep_copy())
        return _FinalChannelConstraint(self, answer, calls=scope == "final or call")

    @functools.cached_property
    def _vocabulary(self) -> LLTokenizer:
        """The tokenizer as llguidance needs it; building it takes a second for 200 000 tokens."""
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
        """A new parser of a completion."""
        return StreamParser(self._tokenizer)

    def header(self, first: bool, calls: bool) -> LLMatcher:
        """A matcher of a message header; the `<|start|>assistant` of the first message is part of the prompt."""
        start, other = "" if first else '<|start|> "assistant" ', f"{_MESSAGE} | {_CALL}" if calls else _MESSAGE
        source = _HEADER.format(start=start, other=other, no_tool="|".join(_NO_TOOL))
        return self._matcher(_llguidance().grammar_from("lark", source)).deep_copy()

    def _make_answer(self, name: str, kind: str, text: str) -> LLMatcher:
        return self._make_matcher(_compile(name, kind, text, self._vocabulary))

    def _make_matcher(self, grammar: str) -> LLMatcher:
        return _llguidance().LLMatcher(self._vocabulary, grammar, log_level=0)

    def _make_bitmask(self, *special: str) -> np.ndarray:
        """A bitmask, in uint32 words, that allows all ordinary tokens and these special ones."""
        allowed = np.zeros(-(-self._vocab_size // 32) * 32, bool)
        allowed[[i for i in range(self._vocab_size) if i in self._tokenizer]] = True
        allowed[list(self._tokenizer.special_tokens.values())] = False
        allowed[[self._tokenizer.encode_special(name) for name in special]] = True
        return np.packbits(allowed, bitorder="little").view(np.uint32)


class _TextConstraint:
    """Constrains the whole completion."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    def fill(self, bitmask: np.ndarray) -> None:
        """See TokenConstraint."""
        _fill(self._matcher, bitmask)

    def accept(self, token: int) -> None:
        """See TokenConstraint."""
        _accept(self._matcher, token)


class _FinalChannelConstraint:
    """Constrains the text of the final channel, and all other messages to harmony's assistant messages."""

    def __init__(self, compiler: GrammarCompiler, answer: LLMatcher, calls: bool) -> None:
        self._compiler, self._answer, self._calls = compiler, answer, calls
        self._parser = compiler.parser()
        self._free: np.ndarray | None = None
        self._matcher = compiler.header(first=True, calls=calls)
        self._in_answer = False

    def fill(self, bitmask: np.ndarray) -> None:
        """See TokenConstraint."""
        if self._free is not None:
            bitmask[:] = self._free
            return
        _fill(self._matcher, bitmask)
        if self._in_answer:
            # The matcher allows every stop token of the engine; a final answer ends with <|return|> only.
            bitmask &= self._compiler.bitmask("<|return|>")

    def accept(self, token: int) -> None:
        """See TokenConstraint."""
        if self._free is None:
            _accept(self._matcher, token)
        for event in self._parser.push(token):
            if isinstance(event, MessageStart):
                self._begin(event.header.channel == "final", event.header.recipient is not None)
            elif isinstance(event, MessageEnd):
                self._free, self._in_answer = None, False
                self._matcher = self._compiler.header(first=False, calls=self._calls)

    def _begin(self, final: bool, to_recipient: bool) -> None:
        if final:
            self._in_answer, self._matcher = True, self._answer.deep_copy()
            return
        self._free = self._compiler.bitmask("<|end|>", *(["<|call|>"] if self._calls and to_recipient else []))


def _fill(matcher: LLMatcher, bitmask: np.ndarray) -> None:
    matcher.unsafe_compute_mask_ptr(bitmask.ctypes.data, bitmask.nbytes)


def _accept(matcher: LLMatcher, token: int) -> None:
    failed = matcher.is_error()
    if not matcher.consume_token(token) and not failed:
        # For example, the grammar's state has become too complex: from here on only a stop token is allowed.
        _logger.warning("structured_outputs: the answer is truncated: %s", _one_line(matcher.get_error()))


def _compile(name: str, kind: str, text: str, vocabulary: LLTokenizer | None) -> str:
    """The grammar of `_source` in llguidance's own notation, validated. Raises UsageError."""
    llguidance = _llguidance()
    try:
        if kind == "json_schema":
            grammar = llguidance.LLMatcher.grammar_from_json_schema(text, defaults=JSON_DEFAULTS)
        else:
            grammar = llguidance.grammar_from(kind, text)
    except ValueError as error:
        raise UsageError(f"{_one_line(str(error))}", f"structured_outputs.{name}") from None
    failed, messages = llguidance.LLMatcher.validate_grammar_with_warnings(grammar, vocabulary)
    if failed:
        raise UsageError(f"{_one_line(messages[0])}", f"structured_outputs.{name}")
    return str(grammar)


def _source(params: StructuredOutputsParams) -> tuple[str, str, str]:
    """The name of the field that is set, llguidance's name for its kind of grammar, and its text."""
    if params.json is not None:
        return "json", "json_schema", _schema(params.json)
    if params.regex is not None:
        return "regex", "regex", params.regex
    if params.choice is not None:
        return "choice", "choice", json.dumps(list(params.choice))
    if params.grammar is not None:
        return "grammar", "grammar", params.grammar
    return "json_object", "json_schema", json.dumps({"type": "object"})


def _schema(schema: str | Mapping[str, Any]) -> str:
    try:
        value = json.loads(schema) if isinstance(schema, str) else schema
        text = json.dumps(_without_unknown_formats(value), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(f"not valid JSON: {_one_line(str(error))}", "structured_outputs.json") from None
    if not isinstance(value, Mapping):
        raise UsageError(f"expected a JSON schema object, found {type(value).__name__}", "structured_outputs.json")
    return text


_SCHEMAS_BY_NAME = ("properties", "patternProperties", "dependentSchemas", "dependencies", "$defs", "definitions")


def _without_unknown_formats(schema: Any) -> Any:
    """A schema without the formats that llguidance does not know, which JSON Schema treats as annotations.

    llguidance rejects them by default, and in its lenient mode ignores every other keyword that it cannot enforce as
    well. References can point anywhere in a schema, so all of it is searched except the values of `const` and `enum`.
    """
    if isinstance(schema, list | tuple):
        return [_without_unknown_formats(item) for item in schema]
    if not isinstance(schema, Mapping):
        return schema
    kept: dict[Any, Any] = {}
    for key, value in schema.items():
        if key == "const" or (key == "enum" and not isinstance(value, Mapping)):
            kept[key] = value
        elif key in _SCHEMAS_BY_NAME and isinstance(value, Mapping):
            kept[key] = {name: _without_unknown_formats(item) for name, item in value.items()}
        elif not (key == "format" and isinstance(value, str) and not _knows_format(value)):
            kept[key] = _without_unknown_formats(value)
    return kept


@functools.lru_cache(1024)
def _knows_format(name: str) -> bool:
    """Whether the installed version of llguidance can constrain a string to a format."""
    llguidance = _llguidance()
    grammar = llguidance.LLMatcher.grammar_from_json_schema(json.dumps({"type": "string", "format": name}))
    failed, _ = llguidance.LLMatcher.validate_grammar_with_warnings(grammar, None)
    return not failed


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError:
        raise UsageError(
            "llguidance is missing: pip install 'gptoss-jax[structured]'", "structured_outputs"
        ) from None
    return llguidance


def _one_line(text: str) -> str:
    return " ".join(text.split())[:300]
