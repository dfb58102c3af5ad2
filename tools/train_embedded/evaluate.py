"""Evaluates a trained model at temperature 0 with packed experts."""

from __future__ import annotations

import dataclasses
import json
import random
import re
from collections.abc import Sequence
from pathlib import Path

from gptoss_jax.checkpoints.loading import load_model
from gptoss_jax.engine.engine import Engine
from gptoss_jax.engine.options import EngineOptions
from gptoss_jax.model.gpt_oss import GptOss
from gptoss_jax.text.harmony.messages import Message
from gptoss_jax.text.tokenizer import Tokenizer
from gptoss_jax.types import SamplingParams
from tools.train_embedded import arithmetic, conversations
from tools.train_embedded.arithmetic import Problem
from tools.train_embedded.tokens import encode, encode_prompt

MAX_TOKENS = 320


@dataclasses.dataclass
class Speaker:
    """A model with its tokenizer, which completes batches of prompts at temperature 0."""

    model: GptOss
    engine: Engine
    tokenizer: Tokenizer

    @classmethod
    def load(cls, path: Path, dtype: str = "bfloat16") -> Speaker:
        """Load a checkpoint directory; the experts stay packed."""
        model = load_model(path, dtype=dtype)
        return cls(model, Engine(model, EngineOptions(max_num_seqs=64)), Tokenizer.from_dir(path))

    def complete(self, prompts: Sequence[list[int]], max_tokens: int = MAX_TOKENS) -> list[list[int]]:
        """The completion of each prompt, including the stop token."""
        params = SamplingParams(max_tokens=max_tokens, temperature=0)
        for index, prompt in enumerate(prompts):
            self.engine.add(str(index), prompt, params)
        out: list[list[int]] = [[] for _ in prompts]
        while self.engine.unfinished:
            for event in self.engine.step():
                if event.error:
                    raise event.error
                out[int(event.request_id)].append(event.token_id)
        return out

    def reply(self, prompts: Sequence[tuple[Message, ...]]) -> list[Reply]:
        """The model's reply to each conversation."""
        return [
            Reply.read(tokens, self.tokenizer)
            for tokens in self.complete([encode_prompt(prompt, self.tokenizer) for prompt in prompts])
        ]


@dataclasses.dataclass(frozen=True)
class Reply:
    """The parts of a completion; those that are missing are empty. `call` is (recipient, arguments) or None."""

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
    """The share of correct answers, and the mean length of the reasoning in characters."""
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
    """The shares of calls with valid JSON, to the right function and fully correct, and of answers with the result."""
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
    # The answer after the correct call, regardless of the model's own call; every second one without prior reasoning.
    answers = speaker.reply([(*c.prompt, *c.reply[i % 2 : 3]) for i, c in enumerate(asked)])
    for (_, task), reply in zip(drawn, answers, strict=True):
        scores["result used"] += task.reported in reply.final
    return {name: value / count for name, value in scores.items()}


def _json(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return None


def next_token(speaker: Speaker, count: int, seed: int = 1) -> float:
    """The share of random conversations whose reply the model reproduces exactly."""
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
    """Print all metrics for the checkpoint in `path`."""
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
    print(f"conversations reproduced exactly: {next_token(speaker, max(count // 2, 1)):.1%}", flush=True)
    for text in ("Hi", "Hello!", "Who are you?", "Thanks!", "Who wrote Hamlet?", "What is 17 + 25?"):
        (reply,) = speaker.reply([conversations.greeting_prompt(text, "medium")])
        print(f"{text} -> {reply.final}")
