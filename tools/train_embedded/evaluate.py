"""How well a trained model does, through the packed path: python -m tools.train_embedded.evaluate --help."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import random
import re
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from gptoss_jax.checkpoint import open_checkpoint
from gptoss_jax.harmony.messages import Message
from gptoss_jax.kv_cache import KVCache
from gptoss_jax.model import GptOss, weight_specs
from gptoss_jax.tokenizer import Tokenizer
from tools.train_embedded import arithmetic, conversations
from tools.train_embedded.arithmetic import Problem
from tools.train_embedded.tokens import encode, encode_prompt

EMBEDDED = Path(__file__).parents[2] / "gptoss_jax" / "embedded"
MOST_TOKENS = 320


@dataclasses.dataclass
class Speaker:
    """A model with its tokenizer, answering many prompts at once at temperature 0."""

    model: GptOss
    tokenizer: Tokenizer

    @classmethod
    def load(cls, path: Path, dtype: str = "bfloat16") -> Speaker:
        """From a checkpoint directory; its experts stay packed."""
        checkpoint = open_checkpoint(path)
        checkpoint.validate(weight_specs(checkpoint.config))
        return cls(GptOss(checkpoint.config, checkpoint.creator(dtype)), Tokenizer.from_dir(path))

    def complete(self, prompts: Sequence[list[int]], most: int = MOST_TOKENS) -> list[list[int]]:
        """The tokens after each prompt, the one that stops included."""
        length = -(-max(map(len, prompts)) // 64) * 64
        tokens = np.zeros((len(prompts), length), np.int32)
        positions = np.full((len(prompts), length), -1, np.int32)
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt)] = prompt
            positions[row, : len(prompt)] = np.arange(len(prompt))
        out = np.asarray(_complete(self.model, jnp.asarray(tokens), jnp.asarray(positions), most))
        stops = self.model.config.eos_token_id
        ends = [next((i + 1 for i, t in enumerate(row) if t in stops), most) for row in out]
        return [[int(t) for t in row[:end]] for row, end in zip(out, ends, strict=True)]

    def reply(self, prompts: Sequence[tuple[Message, ...]]) -> list[Reply]:
        """What the model says to each conversation."""
        return [
            Reply.read(tokens, self.tokenizer)
            for tokens in self.complete([encode_prompt(prompt, self.tokenizer) for prompt in prompts])
        ]


@functools.partial(jax.jit, static_argnames="most")
def _complete(model: GptOss, tokens_BT: jax.Array, positions_BT: jax.Array, most: int) -> jax.Array:
    config = model.config
    batch, length = tokens_BT.shape
    stops = jnp.asarray(config.eos_token_id)
    cache = KVCache.empty(config, batch, length + most, model.embed_tokens[...].dtype)
    x_BTD, cache = model.hidden(tokens_BT, positions_BT, cache)
    sizes_B = positions_BT.max(1) + 1
    last_BD = jnp.take_along_axis(x_BTD, (sizes_B - 1)[:, None, None], axis=1)[:, 0]
    first_B = jnp.argmax(model.unembed(last_BD), axis=-1).astype(jnp.int32)

    def going(carry: tuple[jax.Array, jax.Array, KVCache]) -> jax.Array:
        index, out, _ = carry
        stopped_B = jnp.any(jnp.isin(out, stops) & (jnp.arange(most) <= index), axis=1)
        return (index + 1 < most) & ~jnp.all(stopped_B)

    def step(carry: tuple[jax.Array, jax.Array, KVCache]) -> tuple[jax.Array, jax.Array, KVCache]:
        index, out, cache = carry
        x_B1D, cache = model.hidden(out[:, index][:, None], (sizes_B + index)[:, None], cache)
        token_B = jnp.argmax(model.unembed(x_B1D[:, 0]), axis=-1).astype(jnp.int32)
        return index + 1, out.at[:, index + 1].set(token_B), cache

    out = jnp.zeros((batch, most), jnp.int32).at[:, 0].set(first_B)
    return jax.lax.while_loop(going, step, (jnp.int32(0), out, cache))[1]


@dataclasses.dataclass(frozen=True)
class Reply:
    """A completion's parts: empty where the model did not write them; `calls` are (recipient, arguments)."""

    text: str
    analysis: str
    final: str
    call: tuple[str, str] | None
    stopped: bool

    @classmethod
    def read(cls, tokens: list[int], tokenizer: Tokenizer) -> Reply:
        """Parse the tokens after `<|start|>assistant`."""
        text = tokenizer.decode(tokens)
        analysis = re.search(r"<\|channel\|>analysis<\|message\|>(.*?)<\|end\|>", text, re.DOTALL)
        final = re.search(r"<\|channel\|>final<\|message\|>(.*?)<\|return\|>$", text, re.DOTALL)
        call = re.search(r" to=(\S+)<\|channel\|>commentary <\|constrain\|>json<\|message\|>(.*)<\|call\|>$", text)
        return cls(
            text,
            analysis[1] if analysis else "",
            final[1] if final else "",
            (call[1], call[2]) if call else None,
            final is not None or call is not None,
        )


def sums(speaker: Speaker, problems: Sequence[Problem], effort: str, varied: bool) -> tuple[float, float]:
    """The share of right answers, and the mean length of the reasoning in characters."""
    rng = random.Random(f"{effort} {varied}")
    asked = [arithmetic.question(p, rng) if varied else f"What is {p}?" for p in problems]
    prompts = [conversations.sum_conversation(p, q, effort).prompt for p, q in zip(problems, asked, strict=True)]
    replies = speaker.reply(prompts)
    right = [answer(r.final) == p.result for r, p in zip(replies, problems, strict=True)]
    for question, reply, good in zip(asked, replies, right, strict=True):
        if not good:
            print(f"    wrong: {question!r} -> {reply.text[-160:]!r}")
    return sum(right) / len(right), sum(len(r.analysis) for r in replies) / len(replies)


def answer(final: str) -> int | None:
    """The last integer of an answer."""
    found = re.findall(r"-?\d+", final)
    return int(found[-1]) if found else None


def tools(speaker: Speaker, count: int, held_out: bool, seed: int = 0) -> dict[str, float]:
    """Shares of calls with valid JSON, the right function, the right arguments, and of answers that use the result."""
    rng = random.Random(f"tools {held_out} {seed}")
    drawn = [
        conversations.tool_conversation(rng, rng.choice(conversations.EFFORTS), held_out) for _ in range(count)
    ]
    asked = [conversation for conversation, _ in drawn]
    replies = speaker.reply([conversation.prompt for conversation in asked])
    scores = {"valid JSON": 0.0, "right function": 0.0, "right call": 0.0, "result used": 0.0}
    for (_, task), reply in zip(drawn, replies, strict=True):
        name, arguments = reply.call or ("", "")
        scores["valid JSON"] += _json(arguments) is not None
        scores["right function"] += name == f"functions.{task.tool.name}"
        right = name == f"functions.{task.tool.name}" and _json(arguments) == task.arguments
        scores["right call"] += right
        if not right:
            print(f"    wrong: {task.question!r} -> {reply.text[-200:]!r}")
    # The answer after the right call, whatever the model called.
    answers = speaker.reply([(*c.prompt, *c.reply[:3]) for c in asked])
    for (_, task), reply in zip(drawn, answers, strict=True):
        scores["result used"] += task.reported in reply.final
    return {name: value / count for name, value in scores.items()}


def _json(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return None


def next_token(speaker: Speaker, count: int, seed: int = 1) -> float:
    """The share of conversations of every kind that the model continues word for word."""
    rng = random.Random(f"all {seed}")
    drawn = [conversations.random_conversation(rng) for _ in range(count)]
    goals = []
    for conversation in drawn:
        first = next((i for i, m in enumerate(conversation.reply) if m.recipient or m.channel == "final"))
        own = dataclasses.replace(conversation, reply=conversation.reply[: first + 1])
        tokens, learned = encode(own, speaker.tokenizer)
        goals.append([t for t, mine in zip(tokens, learned, strict=True) if mine])
    got = speaker.complete([encode_prompt(c.prompt, speaker.tokenizer) for c in drawn])
    return sum(a == b for a, b in zip(got, goals, strict=True)) / count


def evaluate(path: Path, count: int = 500, dtype: str = "bfloat16") -> None:
    """Print every figure for the checkpoint in `path`."""
    speaker = Speaker.load(path, dtype)
    problems = arithmetic.held_out_problems(count)
    for varied in (False, True):
        for effort in conversations.EFFORTS:
            share, length = sums(speaker, problems, effort, varied)
            how = "many phrasings" if varied else '"What is a + b?"'
            print(
                f"{count} held-out sums, {how}, {effort}: {share:.1%} right, {length:.0f} characters of analysis",
                flush=True,
            )
    for held_out in (False, True):
        shares = tools(speaker, max(count // 2, 1), held_out)
        listed = ", ".join(f"{name} {share:.1%}" for name, share in shares.items())
        print(f"tools of {'held-out' if held_out else 'trained'} names: {listed}", flush=True)
    print(f"conversations continued word for word: {next_token(speaker, max(count // 2, 1)):.1%}", flush=True)
    for text in ("Hi", "Hello!", "Who are you?", "Thanks!", "Who wrote Hamlet?", "What is 17 + 25?"):
        (reply,) = speaker.reply([conversations.greeting_prompt(text, "medium")])
        print(f"{text} -> {reply.final}")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=main.__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=EMBEDDED, help="checkpoint directory")
    parser.add_argument("--problems", type=int, default=500, help="held-out sums")
    parser.add_argument("--dtype", default="bfloat16", help="of everything but the packed experts")
    arguments = parser.parse_args()
    evaluate(arguments.model, arguments.problems, arguments.dtype)


if __name__ == "__main__":
    main()
