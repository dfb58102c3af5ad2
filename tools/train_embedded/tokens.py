"""Trains the tokenizer, renders conversations with harmony and packs them into sequences."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gptoss_jax.text.harmony.messages import Message
from gptoss_jax.text.harmony.render import render_conversation
from gptoss_jax.text.tokenizer import Tokenizer
from gptoss_jax.text.tokenizer_json import O200K_PATTERN
from tools.train_embedded.conversations import Conversation, random_conversation

SPECIAL_TOKENS = (
    "<|startoftext|>",
    "<|endoftext|>",
    "<|return|>",
    "<|constrain|>",
    "<|channel|>",
    "<|start|>",
    "<|end|>",
    "<|message|>",
    "<|call|>",
)
FURTHEST = 4000
"""Largest offset added to the positions of a conversation, in tokens."""

# gpt-oss groups up to three digits. Here each digit is one token, the same in every place.
PATTERN = O200K_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")


class Batch(NamedTuple):
    """Sequences [B, T] for a training step; `segments` numbers a row's conversations from 1, 0 is padding.

    Positions start at 0 in each conversation, and `learned` marks the tokens that the model generates.
    """

    tokens: np.ndarray
    positions: np.ndarray
    segments: np.ndarray
    learned: np.ndarray


def train_tokenizer(path: Path, vocab_size: int, conversations: int, seed: int) -> None:
    """Write a tokenizer.json of byte-level BPE trained on generated conversations, in the released format."""
    from tokenizers import Regex, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Trainee

    trainee = Trainee(models.BPE())
    trainee.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    trainee.train_from_iterator(_texts(conversations, seed), trainer)
    fields = json.loads(trainee.to_str())
    ordinary = len(fields["model"]["vocab"])
    fields["added_tokens"] = [
        {
            "id": ordinary + index,
            "content": content,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for index, content in enumerate(SPECIAL_TOKENS)
    ]
    path.write_text(json.dumps(fields, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def _texts(conversations: int, seed: int) -> Iterator[str]:
    """The text between special tokens, from a tokenizer whose tokens are bytes."""
    marks = {name: 256 + index for index, name in enumerate(SPECIAL_TOKENS)}
    plain = Tokenizer("bytes", PATTERN, {bytes([value]): value for value in range(256)}, marks)
    rng = random.Random(seed)
    for _ in range(conversations):
        tokens, _ = encode(random_conversation(rng), plain)
        text = bytearray()
        for token in tokens:
            if token < 256:
                text.append(token)
            elif text:
                yield text.decode()
                text.clear()


def encode(conversation: Conversation, tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    """The tokens of a whole conversation, and a mask of those that the model generates."""
    tokens = encode_prompt(conversation.prompt, tokenizer)
    learned = [False] * len(tokens)
    header = len(tokens) - len(render_conversation(conversation.prompt, tokenizer, next_role=None))
    given = header
    for message in conversation.reply:
        own = render_conversation((message,), tokenizer, next_role=None, auto_drop_analysis=False)
        if message.role == "tool":
            learned += [False] * (len(own) - given)
            tokens += own[given:]
            tokens += own[:1] + tokenizer.encode("assistant")
            learned += [False] * header
            given = header
            continue
        if message.channel == "final":
            own[-1] = tokenizer.encode_special("<|return|>")
        tokens += own[given:]
        learned += [True] * (len(own) - given)
        given = 0
    return tokens, learned


def encode_prompt(prompt: tuple[Message, ...], tokenizer: Tokenizer) -> list[int]:
    """The tokens of a prompt, after which the model replies."""
    return render_conversation(prompt, tokenizer, auto_drop_analysis=False)


def make_batch(tokenizer: Tokenizer, seed: tuple[int, ...], rows: int, length: int) -> Batch:
    """`rows` sequences of `length` tokens filled with conversations, reproducible by the seed."""
    rng = random.Random(repr(seed))
    shape = (rows, length)
    batch = Batch(
        np.zeros(shape, np.int32), np.zeros(shape, np.int32), np.zeros(shape, np.int32), np.zeros(shape, bool)
    )
    used, count = [0] * rows, [0] * rows
    misses = 0
    while misses < 16:
        tokens, learned = encode(random_conversation(rng), tokenizer)
        row = _best_row(used, len(tokens), length)
        if row is None:
            misses += 1
            continue
        count[row] += 1
        place = (row, slice(used[row], used[row] + len(tokens)))
        batch.tokens[place], batch.learned[place] = tokens, learned
        batch.positions[place], batch.segments[place] = _positions(learned, rng), count[row]
        used[row] += len(tokens)
    return batch


def _positions(learned: list[bool], rng: random.Random) -> np.ndarray:
    """Positions from 0; one conversation in four has a gap in the prompt, as if it were longer."""
    positions = np.arange(len(learned))
    if rng.random() < 0.25:
        positions[rng.randrange(1, learned.index(True)) :] += int(FURTHEST ** rng.random())
    return positions


def _best_row(used: Iterable[int], size: int, length: int) -> int | None:
    """The fullest row with enough room, which keeps the padding small."""
    fitting = [(taken, row) for row, taken in enumerate(used) if taken + size <= length]
    return max(fitting)[1] if fitting else None


_worker_tokenizer: Tokenizer | None = None


def use_tokenizer(directory: Path) -> None:
    """Load the tokenizer for `make_worker_batch` in this process."""
    global _worker_tokenizer
    _worker_tokenizer = Tokenizer.from_dir(directory)


def make_worker_batch(seed: tuple[int, ...], rows: int, length: int) -> Batch:
    """`make_batch` in a worker process, after `use_tokenizer`."""
    assert _worker_tokenizer is not None
    return make_batch(_worker_tokenizer, seed, rows, length)
