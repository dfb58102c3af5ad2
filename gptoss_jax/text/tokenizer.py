"""A tokenizer that reads a checkpoint's tokenizer.json and encodes with tiktoken."""

import codecs
import functools
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Self

import tiktoken

from gptoss_jax.errors import CheckpointError, UsageError
from gptoss_jax.text.pieces import PieceSplitter, has_long_run
from gptoss_jax.text.tokenizer_json import read_tokenizer_json

_LONG = 2000  # run length, in characters, above which tiktoken's regex engine may overflow its stack
_UNKNOWN = "\ufffd".encode()

# The ids of o200k_harmony (tiktoken_ext/openai_public.py), which identify that vocabulary. Its unnamed ids up to the
# model's 201088 outputs are reserved tokens.
_O200K_ORDINARY = 199_998
_O200K_MARKS = {
    "<|startoftext|>": 199998,
    "<|endoftext|>": 199999,
    "<|return|>": 200002,
    "<|constrain|>": 200003,
    "<|channel|>": 200005,
    "<|start|>": 200006,
    "<|end|>": 200007,
    "<|message|>": 200008,
    "<|call|>": 200012,
}
_O200K_END = 201_088


class Tokenizer:
    """A byte-level BPE tokenizer; immutable and thread-safe.

    Text is never encoded to special tokens: `encode` treats "<|end|>" as any other text. Only `encode_special` returns
    special tokens.
    """

    def __init__(
        self,
        name: str,
        pattern: str,
        vocab: Mapping[bytes, int],
        special_tokens: Mapping[str, int],
        ranks: Mapping[bytes, int] | None = None,
    ) -> None:
        """`vocab` maps token bytes to ids; `ranks` maps them to merge priorities if these differ from the ids."""
        self.name = name
        self._ranks = dict(vocab if ranks is None else ranks)
        self._ids = None if ranks is None else {rank: vocab[token] for token, rank in ranks.items()}
        self._special = dict(special_tokens)
        self._bytes = {token_id: token for token, token_id in vocab.items()}
        self._bytes |= {token_id: text.encode() for text, token_id in special_tokens.items()}
        self._vocab_size = max(self._bytes) + 1
        self._encoding = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=self._ranks, special_tokens={})
        self._splitter = PieceSplitter(pattern)

    @classmethod
    def from_dir(cls, path: str | Path) -> Self:
        """The tokenizer of a checkpoint directory or of a tokenizer.json file.

        Raises CheckpointError naming the file and the field if it is missing, malformed or not byte-level BPE.
        """
        file = Path(path)
        file = file / "tokenizer.json" if os.path.isdir(file) else file
        content = read_tokenizer_json(file)
        special = _with_reserved(content.vocab, content.special_tokens)
        ranks = None if content.ranks is content.vocab else content.ranks
        try:
            return cls(file.parent.name, content.pattern, content.vocab, special, ranks)
        except Exception as error:  # each of the two regex engines raises its own exception types
            reason = " ".join(str(error).split())[:200]
            raise CheckpointError(f"{file}: pre_tokenizer: the pattern cannot be compiled: {reason}") from None

    @classmethod
    def from_name(cls, name: str = "o200k_harmony") -> Self:
        """A tiktoken encoding by name, from tiktoken's cache or its server.

        Raises UsageError if there is no such encoding, or if it is not cached and cannot be downloaded.
        """
        if name not in tiktoken.list_encoding_names():
            raise UsageError(f"expected a directory or a tiktoken encoding, found {name!r}", "tokenizer")
        try:
            encoding = tiktoken.get_encoding(name)
        except (OSError, ValueError, ImportError) as error:
            raise UsageError(
                f"{name} is neither in tiktoken's cache (TIKTOKEN_CACHE_DIR) nor can it be downloaded: "
                f"{type(error).__name__}",
                "tokenizer",
            ) from None
        return cls(name, encoding._pat_str, encoding._mergeable_ranks, encoding._special_tokens)

    @property
    def special_tokens(self) -> dict[str, int]:
        """The ids of all special tokens by their text."""
        return dict(self._special)

    @functools.cached_property
    def ordinary_tokens(self) -> frozenset[int]:
        """The ids of all tokens that are not special."""
        return frozenset(self._bytes.keys() - self._special.values())

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return self._vocab_size

    def encode(self, text: str) -> list[int]:
        """The tokens of `text`, none of them special. Takes time linear in the length.

        A lone surrogate, which UTF-8 cannot encode, is replaced by U+FFFD.
        """
        try:
            text.encode()
        except UnicodeEncodeError:
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        ranks = self._encode_long(text) if has_long_run(text, _LONG) else self._encoding.encode_ordinary(text)
        return ranks if self._ids is None else [self._ids[rank] for rank in ranks]

    def _encode_long(self, text: str) -> list[int]:
        pieces = self._splitter.pieces(text)
        if pieces is None:
            return self._encoding.encode_ordinary(text)
        return [rank for piece in pieces for rank in self._encoding._core_bpe.encode_single_piece(piece.encode())]

    def encode_special(self, name: str) -> int:
        """The id of a special token such as "<|start|>"; raises UsageError if the vocabulary does not have it."""
        if name not in self._special:
            raise UsageError(f"tokenizer {self.name}: has no special token {name}")
        return self._special[name]

    def token_bytes(self, token: int) -> bytes:
        """The bytes of one token; raises UsageError for an id outside the vocabulary."""
        if token not in self._bytes:
            raise UsageError(f"tokenizer {self.name}: expected a token id below {self.vocab_size}, found {token}")
        return self._bytes[token]

    def decode_bytes(self, tokens: Iterable[int]) -> bytes:
        """The concatenated bytes of `tokens`; an id outside the vocabulary decodes to U+FFFD."""
        return b"".join([self._bytes.get(token, _UNKNOWN) for token in tokens])

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of `tokens`; invalid UTF-8 decodes to U+FFFD."""
        return self.decode_bytes(tokens).decode("utf-8", "replace")

    def __contains__(self, token: object) -> bool:
        return token in self._bytes


class StreamDecoder:
    """Decodes tokens incrementally: a character is returned once all of its bytes have arrived."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, tokens: Iterable[int]) -> str:
        """The text completed by these tokens; "" in the middle of a character."""
        return self._decoder.decode(self._tokenizer.decode_bytes(tokens))

    @property
    def pending(self) -> bool:
        """Whether the last character is incomplete."""
        return bool(self._decoder.getstate()[0])

    def finish(self) -> str:
        """U+FFFD for an incomplete character at the end, else "". Resets the decoder."""
        return self._decoder.decode(b"", final=True)


def _with_reserved(vocab: Mapping[bytes, int], special: dict[str, int]) -> dict[str, int]:
    """`special` with the reserved tokens of o200k_harmony, which a checkpoint's tokenizer.json omits."""
    if len(vocab) != _O200K_ORDINARY or not _O200K_MARKS.items() <= special.items():
        return special
    named = {text: token_id for text, token_id in special.items() if token_id < _O200K_END}
    taken = set(_O200K_MARKS.values())
    reserved = {f"<|reserved_{i}|>": i for i in range(_O200K_ORDINARY, _O200K_END) if i not in taken}
    return {**named, "<|endofprompt|>": 200018, **reserved}
