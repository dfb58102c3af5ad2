"""Reads a Hugging Face `tokenizer.json` (byte-level BPE) into tiktoken's format: a pattern and ranked byte strings."""

import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from re import _parser  # type: ignore[attr-defined]
from typing import Any

from gptoss_jax.errors import CheckpointError

O200K_PATTERN = "|".join(
    [
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
"""The pattern of o200k_base and o200k_harmony, as tiktoken publishes it; it matches every text without gaps."""


@dataclass(frozen=True)
class TokenizerFile:
    """The content of a tokenizer.json.

    `vocab` maps the bytes of every ordinary token to its id. `ranks` maps the tokens that merging can produce to their
    priority; it is `vocab` itself if the ids already have that order.
    """

    pattern: str
    vocab: dict[bytes, int]
    ranks: dict[bytes, int]
    special_tokens: dict[str, int]


class _Node:
    """A JSON value with its file and field, which error messages name."""

    def __init__(self, value: Any, file: Path, field: str = "") -> None:
        self.value, self.file, self.field = value, file, field

    def fail(self, expected: str) -> CheckpointError:
        found = json.dumps(self.value, ensure_ascii=False)
        found = found if len(found) <= 60 else found[:60] + "..."
        return CheckpointError(f"{self.file}: {self.field or 'the file'}: expected {expected}, found {found}")

    def get(self, key: str, kind: type, expected: str) -> "_Node":
        if not isinstance(self.value, dict):
            raise self.fail("an object")
        child = _Node(self.value.get(key), self.file, f"{self.field}.{key}" if self.field else key)
        if not isinstance(child.value, kind) or isinstance(child.value, bool):
            raise child.fail(expected)
        return child

    def only(self, key: str, *allowed: Any) -> None:
        """Rejects a setting whose value is not one of `allowed`; an absent key counts as null."""
        if not any(self.value.get(key) is value or self.value.get(key) == value for value in allowed):
            name = f"{self.field}.{key}" if self.field else key
            raise _Node(self.value.get(key), self.file, name).fail(" or ".join(map(json.dumps, allowed)))

    def items(self) -> list["_Node"]:
        return [_Node(value, self.file, f"{self.field}[{index}]") for index, value in enumerate(self.value)]


def read_tokenizer_json(path: Path) -> TokenizerFile:
    """Reads a tokenizer file.

    Raises CheckpointError naming the file and the field for anything that is missing, malformed or that would make the
    tokens differ from those of byte-level BPE: another model type, a normaliser, an unknown pre-tokeniser, duplicate
    ids.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON in UTF-8: {error}") from None
    root = _Node(content, path)
    model = root.get("model", dict, "an object")
    if model.value.get("type", "BPE") != "BPE":
        raise model.get("type", object, "").fail('"BPE"')
    root.only("normalizer", None)
    model.only("dropout", None, 0.0)
    model.only("continuing_subword_prefix", None, "")
    model.only("end_of_word_suffix", None, "")
    model.only("byte_fallback", None, False)
    special = _special_tokens(root)
    vocab = _vocab(model, special)
    return TokenizerFile(
        pattern=_pattern(root.get("pre_tokenizer", dict, "an object")),
        vocab=vocab,
        ranks=_ranks(model, vocab),
        special_tokens=special,
    )


def _pattern(pre_tokenizer: _Node) -> str:
    if pre_tokenizer.value.get("type") != "Sequence":
        raise pre_tokenizer.fail('a "Sequence" of a "Split" and a "ByteLevel" pre-tokeniser')
    steps = pre_tokenizer.get("pretokenizers", list, "a list").items()
    kinds = [step.get("type", str, "a string").value for step in steps]
    if kinds != ["Split", "ByteLevel"]:
        raise pre_tokenizer.fail(f'a "Split" and a "ByteLevel" step (these are {", ".join(kinds) or "none"})')
    split, byte_level = steps
    drops_gaps = split.value.get("behavior") == "Removed"
    split.only("behavior", "Isolated", "Removed")
    split.only("invert", *((True,) if drops_gaps else (None, False)))
    byte_level.only("add_prefix_space", False)
    byte_level.only("use_regex", False)
    regex = split.get("pattern", dict, "an object").get("Regex", str, "a regular expression")
    pattern: str = regex.value
    if _may_be_empty(pattern):
        raise regex.fail("a regular expression that cannot match empty text")
    if drops_gaps or pattern == O200K_PATTERN:
        return pattern
    # tiktoken drops text that the pattern does not match, like an inverted "Removed"; "Isolated" keeps it as pieces.
    return f"{pattern}|(?:(?!{pattern})[\\s\\S])+"


_CLASS = re.compile(r"\\[pP](?:\{[^}]*\}|[A-Z])")


def _may_be_empty(pattern: str) -> bool:
    """Whether a pattern can match empty text, on which tiktoken panics; False for syntax that Python does not know."""
    try:
        with warnings.catch_warnings(action="ignore"):
            least, _ = _parser.parse(_CLASS.sub(r"\\w", pattern)).getwidth()
    except (re.error, OverflowError, RecursionError):
        return False
    return bool(least == 0)


def _special_tokens(root: _Node) -> dict[str, int]:
    special: dict[str, int] = {}
    for token in root.get("added_tokens", list, "a list").items():
        content = token.get("content", str, "a string").value
        token_id = token.get("id", int, "an integer").value
        if token_id < 0 or not content:
            raise token.fail("a non-empty content and an id of 0 or more")
        if content in special or token_id in special.values():
            raise token.fail("a content and an id that no earlier added token has")
        special[content] = token_id
    return special


def _byte_characters() -> dict[int, int]:
    """Maps the characters that represent the 256 bytes in byte-level BPE (GPT-2's `bytes_to_unicode`) to those bytes.

    Bytes that are not printable characters are represented by characters from 256 on; their own code points are unused
    and map to 0xFFFF.
    """
    plain = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = [value for value in range(256) if value not in plain]
    return {256 + index: value for index, value in enumerate(others)} | {value: 0xFFFF for value in others}


_BYTES = _byte_characters()


def _to_bytes(token: str, node: _Node) -> bytes:
    try:
        return token.translate(_BYTES).encode("latin-1")
    except UnicodeEncodeError:
        raise CheckpointError(
            f"{node.file}: {node.field}: expected byte-level characters, found {token!r}"
        ) from None


def _vocab(model: _Node, special: Mapping[str, int]) -> dict[bytes, int]:
    node = model.get("vocab", dict, "an object")
    vocab: dict[bytes, int] = {}
    ids = set(special.values())
    for token, token_id in node.value.items():
        if not isinstance(token_id, int) or isinstance(token_id, bool) or token_id < 0:
            raise CheckpointError(f"{node.file}: model.vocab: expected an id for {token!r}, found {token_id!r}")
        if token in special:
            if special[token] != token_id:
                raise CheckpointError(
                    f"{node.file}: added_tokens: expected id {token_id} (model.vocab) for {token!r}, "
                    f"found {special[token]}"
                )
            continue
        if token_id in ids:
            raise CheckpointError(f"{node.file}: model.vocab: expected each id once, found {token_id} again")
        ids.add(token_id)
        vocab[_to_bytes(token, node)] = token_id
    missing = next((value for value in range(256) if bytes([value]) not in vocab), None)
    if missing is not None:
        raise CheckpointError(f"{node.file}: model.vocab: expected all 256 bytes, found none for 0x{missing:02x}")
    return vocab


def _merge_pairs(node: _Node, vocab: Mapping[bytes, int]) -> dict[tuple[bytes, bytes], int]:
    pairs: dict[tuple[bytes, bytes], int] = {}
    for index, entry in enumerate(node.value):
        parts = entry.split(" ") if isinstance(entry, str) else entry
        if not (
            isinstance(parts, list) and len(parts) == 2 and isinstance(parts[0], str) and isinstance(parts[1], str)
        ):
            raise CheckpointError(f"{node.file}: model.merges[{index}]: expected two tokens, found {entry!r}")
        left, right = _to_bytes(parts[0], node), _to_bytes(parts[1], node)
        if left not in vocab or right not in vocab or left + right not in vocab:
            raise CheckpointError(
                f"{node.file}: model.merges[{index}]: expected tokens of model.vocab that join to one, "
                f"found {entry!r}"
            )
        if (left, right) in pairs:
            raise CheckpointError(
                f"{node.file}: model.merges[{index}]: expected each pair once, found {entry!r} again"
            )
        pairs[left, right] = index
    return pairs


def _ranks(model: _Node, vocab: dict[bytes, int]) -> dict[bytes, int]:
    """Priorities under which merging by the rank of the result equals merging by the order of the merges.

    If merging produces a token from its own bytes, the last pair is the same in any context: until then no merge
    crosses the token's ends, so the merges inside it are the same as those of the token alone. The index of that pair
    is the token's rank. A token that merging does not produce from its own bytes never occurs and has no rank.
    """
    pairs = _merge_pairs(model.get("merges", list, "a list"), vocab)
    if _lists_every_split_in_id_order(pairs, vocab):
        return vocab
    ranks: dict[bytes, int] = {}
    for token in vocab:
        if len(token) > 1:
            last = _last_pair(token, pairs)
            if last is not None:
                ranks[token] = 256 + pairs[last]
            elif model.value.get("ignore_merges"):
                raise CheckpointError(
                    f"{model.file}: model.merges: expected to reach every token (ignore_merges is set), "
                    f"found none for {token!r}"
                )
    order = sorted(ranks, key=ranks.__getitem__)
    if len(ranks) + 256 == len(vocab) and all(vocab[a] < vocab[b] for a, b in pairwise(order)):
        return vocab
    return {bytes([value]): value for value in range(256)} | ranks


def _lists_every_split_in_id_order(pairs: dict[tuple[bytes, bytes], int], vocab: Mapping[bytes, int]) -> bool:
    results = [vocab[left + right] for left, right in pairs]
    if any(a > b for a, b in pairwise(results)):
        return False
    splits = sum(token[:cut] in vocab and token[cut:] in vocab for token in vocab for cut in range(1, len(token)))
    return splits == len(pairs)


def _last_pair(token: bytes, pairs: Mapping[tuple[bytes, bytes], int]) -> tuple[bytes, bytes] | None:
    """The last pair that merges the bytes of `token` to it, or None if merging does not produce the token."""
    parts = [bytes([value]) for value in token]
    while len(parts) > 2:
        found = [(pairs[pair], at) for at, pair in enumerate(pairwise(parts)) if pair in pairs]
        if not found:
            return None
        _, at = min(found)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    pair = (parts[0], parts[1])
    return pair if pair in pairs else None
