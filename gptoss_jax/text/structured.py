"""Structured output: constraints on the next token that make an answer follow a JSON schema, a regex or a grammar.

In a chat the constraint applies to the text of the final channel, and the model may reason freely before it. The
message structure is constrained as well, so that no other answer is possible: headers are those of harmony's assistant
messages, analysis and commentary messages end with `<|end|>` only, and `<|return|>` follows a complete final answer.

The chat's scope adds which tools can be called, and whether one must be called before the final channel. A call needs
an allowed recipient, its content follows the tool's schema if it has one, and it ends with `<|call|>`, or with
`<|end|>` if more calls may follow. Only `max_tokens`, `stop` and `stop_token_ids` can truncate an answer or a call.
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
from gptoss_jax.text.harmony.header import Header
from gptoss_jax.text.harmony.meaning import BARE_NAMESPACES, NON_TOOL_RECIPIENTS
from gptoss_jax.text.harmony.messages import CHANNELS
from gptoss_jax.text.tokenizer import Tokenizer
from gptoss_jax.types import ChatScope, Scope, StructuredOutputsParams, TokenConstraint

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

CACHE_SIZE = 256
"""Number of compiled grammars that are kept; a request may have a hundred tools, with a schema each."""

JSON_DEFAULTS = {"whitespace_pattern": r" |\n[ \t]{0,40}"}
"""Options of JSON schemas, which a schema's own `x-guidance` overrides.

The bound on whitespace keeps a model from generating whitespace indefinitely. Keywords that llguidance cannot enforce
are rejected, except an unknown `format`, which does not constrain the string.
"""

# The headers that may follow <|start|>assistant. A call names its recipient before or after the channel, and may give a
# content type, which for a function whose arguments follow a schema is json. A final answer has no <|constrain|>,
# because openai-harmony reads its content type as a recipient.
_HEADER = """
start: {start}header
header: {kinds}
CHANNEL: /analysis|commentary/
TYPE: /[a-z_]+/
"""
_MESSAGE = """
message: <|channel|> /{channels}/ <|message|>
"""
_CALL = """
{name}: ({to} <|channel|> CHANNEL | <|channel|> CHANNEL {to}) {type} <|message|>
{to}: {recipient}
"""
_ANY_TYPE = '(" code" | " "? <|constrain|> TYPE)?'
_JSON_TYPE = '" "? <|constrain|> "json"'
_CHANNELS = frozenset(CHANNELS)

# No tool has these names, and the name of a channel is read as the channel. Any other name that harmony.tools accepts
# can be a recipient, in any script.
_NO_TOOL = [
    re.escape(name) for name in (*NON_TOOL_RECIPIENTS, *BARE_NAMESPACES, "analysis", "commentary", "final")
]

_ANY_RECIPIENT = r"/ to=([0-9A-Za-z_.\-]|[^\x00-\x7f\s\p{Cc}])+/ & ~/ to=(" + "|".join(_NO_TOOL) + ")/"

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
        self._header = functools.lru_cache(CACHE_SIZE)(self._make_header)
        self._answer = functools.lru_cache(CACHE_SIZE)(self._make_answer)
        self.arguments = functools.lru_cache(CACHE_SIZE)(self._make_arguments)
        self.bitmask = functools.cache(self._make_bitmask)

    def __call__(self, params: StructuredOutputsParams | None, scope: Scope) -> TokenConstraint:
        """A new constraint, for a single completion. Raises UsageError."""
        _llguidance("tool_choice" if params is None else "structured_outputs")
        if not self._eos:
            raise UsageError("the model has no stop token to end a complete answer", "structured_outputs")
        answer = None if params is None else self._answer(*_source(params))
        if isinstance(scope, ChatScope):
            return _ChatConstraint(self, answer, scope)
        assert answer is not None
        return _TextConstraint(answer.deep_copy())

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

    def header(self, first: bool, scope: ChatScope, channels: frozenset[str]) -> LLMatcher:
        """A matcher of a message header; the `<|start|>assistant` of the first message is part of the prompt.

        `channels` are those of messages that are not calls.
        """
        return self._header(first, scope, channels).deep_copy()

    def _make_arguments(self, recipient: str, schema: str) -> LLMatcher:
        """The matcher of a tool's arguments, to be copied. Raises UsageError, naming the tool."""
        try:
            return self._answer("tools", "json_schema", _schema(schema, "tools"))
        except UsageError as error:
            raise UsageError(f"{recipient}: {error.message}", error.field) from None

    def _make_header(self, first: bool, scope: ChatScope, channels: frozenset[str]) -> LLMatcher:
        return self._make_matcher(_llguidance().grammar_from("lark", _header_grammar(first, scope, channels)))

    def _make_answer(self, field: str, kind: str, text: str) -> LLMatcher:
        return self._make_matcher(_compile(field, kind, text, self._vocabulary))

    def _make_matcher(self, grammar: str) -> LLMatcher:
        return _llguidance().LLMatcher(self._vocabulary, grammar, log_level=0)

    def allows_stop(self, bitmask: np.ndarray) -> bool:
        """Whether a matcher's bitmask allows the engine's stop tokens: the content can end here."""
        return bool(bitmask[self._eos[0] // 32] >> (self._eos[0] % 32) & 1)

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


class _ChatConstraint:
    """Constrains messages to harmony's assistant messages, and their content to the answer's or a tool's grammar."""

    def __init__(self, compiler: GrammarCompiler, answer: LLMatcher | None, scope: ChatScope) -> None:
        self._compiler, self._answer, self._scope = compiler, answer, scope
        self._arguments = {
            recipient: compiler.arguments(recipient, schema)
            for recipient, schema in scope.tools or ()
            if schema is not None and scope.calls != "none"
        }
        self._parser = compiler.parser()
        self._calls_first = scope.calls == "required"
        self._channels = _CHANNELS - {"final"} if self._calls_first else _CHANNELS
        self._ends: tuple[str, ...] = ()
        self._matcher: LLMatcher | None = compiler.header(True, scope, self._channels)

    def fill(self, bitmask: np.ndarray) -> None:
        """See TokenConstraint."""
        if self._matcher is None:
            bitmask[:] = self._compiler.bitmask(*self._ends)
            return
        _fill(self._matcher, bitmask)
        if self._ends:
            # Once the content is complete, the matcher allows every stop token of the engine; a message has its own.
            complete, ordinary = self._compiler.allows_stop(bitmask), self._compiler.bitmask()
            bitmask &= ordinary
            if complete:
                bitmask |= self._compiler.bitmask(*self._ends) & ~ordinary

    def accept(self, token: int) -> None:
        """See TokenConstraint."""
        events = self._parser.push(token)
        if self._matcher is not None and not any(isinstance(event, MessageEnd) for event in events):
            _accept(self._matcher, token)
        for event in events:
            if isinstance(event, MessageStart):
                self._begin(event.header)
            elif isinstance(event, MessageEnd) and event.message.stop == "<|end|>":
                self._ends, self._matcher = (), self._compiler.header(False, self._scope, self._channels)

    def _begin(self, header: Header) -> None:
        """Constrain the content of a message with this header."""
        content = self._answer if header.channel == "final" else self._arguments.get(header.recipient or "")
        self._matcher = None if content is None else content.deep_copy()
        if header.channel == "final":
            self._ends = ("<|return|>",)
        elif header.recipient is None:
            self._ends = ("<|end|>",)
            if self._calls_first:
                self._channels -= {header.channel}
        else:
            self._calls_first, self._channels = False, _CHANNELS
            self._ends = ("<|end|>", "<|call|>") if self._scope.parallel else ("<|call|>",)


def _header_grammar(first: bool, scope: ChatScope, channels: frozenset[str]) -> str:
    """The Lark grammar of a header; `channels` are those of messages that are not calls."""
    start = "" if first else '<|start|> "assistant" '
    rules = [("message", _MESSAGE.format(channels="|".join(sorted(channels))))] if channels else []
    rules += [] if scope.calls == "none" else _call_rules(scope.tools)
    return _HEADER.format(start=start, kinds=" | ".join(name for name, _ in rules)) + "".join(r for _, r in rules)


def _call_rules(tools: tuple[tuple[str, str | None], ...] | None) -> list[tuple[str, str]]:
    """The names and the texts of the grammar's rules of calls."""
    if tools is None:
        return [("call", _CALL.format(name="call", to="TO", type=_ANY_TYPE, recipient=_ANY_RECIPIENT))]
    typed = {name for name, schema in tools if schema is not None and name.startswith("functions.")}
    rules = []
    for rule, to, content, names in (
        ("call", "TO", _ANY_TYPE, [name for name, _ in tools if name not in typed]),
        ("json_call", "JSON_TO", _JSON_TYPE, sorted(typed)),
    ):
        if names:
            recipient = " | ".join(json.dumps(f" to={name}", ensure_ascii=False) for name in names)
            rules.append((rule, _CALL.format(name=rule, to=to, type=content, recipient=recipient)))
    return rules


def _fill(matcher: LLMatcher, bitmask: np.ndarray) -> None:
    matcher.unsafe_compute_mask_ptr(bitmask.ctypes.data, bitmask.nbytes)


def _accept(matcher: LLMatcher, token: int) -> None:
    failed = matcher.is_error()
    if not matcher.consume_token(token) and not failed:
        # For example, the grammar's state has become too complex: from here on only a stop token is allowed.
        _logger.warning("structured_outputs: the answer or call is truncated: %s", _one_line(matcher.get_error()))


def _compile(field: str, kind: str, text: str, vocabulary: LLTokenizer | None) -> str:
    """The grammar of `_source` in llguidance's own notation, validated. Raises UsageError."""
    llguidance = _llguidance()
    try:
        if kind == "json_schema":
            grammar = llguidance.LLMatcher.grammar_from_json_schema(text, defaults=JSON_DEFAULTS)
        else:
            grammar = llguidance.grammar_from(kind, text)
    except ValueError as error:
        raise UsageError(f"{_one_line(str(error))}", field) from None
    failed, messages = llguidance.LLMatcher.validate_grammar_with_warnings(grammar, vocabulary)
    if failed:
        raise UsageError(f"{_one_line(messages[0])}", field)
    return str(grammar)


def _source(params: StructuredOutputsParams) -> tuple[str, str, str]:
    """The field that is set, llguidance's name for its kind of grammar, and its text."""
    if params.json is not None:
        field = "structured_outputs.json"
        return field, "json_schema", _schema(params.json, field)
    if params.regex is not None:
        return "structured_outputs.regex", "regex", params.regex
    if params.choice is not None:
        return "structured_outputs.choice", "choice", json.dumps(list(params.choice))
    if params.grammar is not None:
        return "structured_outputs.grammar", "grammar", params.grammar
    return "structured_outputs.json_object", "json_schema", json.dumps({"type": "object"})


def _schema(schema: str | Mapping[str, Any], field: str) -> str:
    try:
        value = json.loads(schema) if isinstance(schema, str) else schema
        text = json.dumps(_without_unknown_formats(value), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(f"not valid JSON: {_one_line(str(error))}", field) from None
    if not isinstance(value, Mapping):
        raise UsageError(f"expected a JSON schema object, found {type(value).__name__}", field)
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


def _llguidance(field: str = "structured_outputs") -> Any:
    try:
        import llguidance
    except ImportError:
        raise UsageError("llguidance is missing: pip install 'gptoss-jax[structured]'", field) from None
    return llguidance


def _one_line(text: str) -> str:
    return " ".join(text.split())[:300]
