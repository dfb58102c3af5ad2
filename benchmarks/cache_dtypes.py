"""What the cache's dtype does to the shipped model's answers: python -m benchmarks.cache_dtypes

Sums are answered greedily with a cache in each dtype, and compared token by token with those of a float32 cache. Then
prompts and answers are scored with each: how far the distributions of next tokens are from those with a float32 cache,
as KL divergence over the likeliest tokens, and all others together. The model computes in float32.
"""

from __future__ import annotations

import math
import random
import statistics

from gptoss_jax import LLM, SamplingParams
from gptoss_jax.engine.engine import EngineOptions
from gptoss_jax.engine.params import TokenLogprobs

DTYPES = ("float32", "bfloat16", "float8")
SUMS = 24
TOP = 20


def main() -> None:
    """Print a line a dtype."""
    rng = random.Random(0)
    questions = [f"What is {rng.randrange(1000)} + {rng.randrange(1000)}?" for _ in range(SUMS)]
    # Short chunks, so that most keys are read from the cache and not from the chunk itself.
    options = {name: EngineOptions(max_batch=8, prefill_chunk=16, kv_cache_dtype=name) for name in DTYPES}
    models = {name: LLM(dtype="float32", engine=engine) for name, engine in options.items()}
    answers = {name: answered(llm, questions) for name, llm in models.items()}
    exact = answers["float32"]
    scored = {name: scores(llm, [prompt + answer for prompt, answer in exact]) for name, llm in models.items()}
    for name in DTYPES[1:]:
        same = sum(ours == theirs for ours, theirs in zip(answers[name], exact, strict=True))
        kl = [divergence(p, q) for p, q in zip(scored["float32"], scored[name], strict=True)]
        figures = f"mean {statistics.mean(kl):.2g}, median {statistics.median(kl):.1g}, at most {max(kl):.2g}"
        print(f"{name}: {same} of {SUMS} answers the same; KL divergence over {len(kl)} positions: {figures} nats")


def answered(llm: LLM, questions: list[str]) -> list[tuple[list[int], list[int]]]:
    """The tokens of each prompt and of its greedy answer."""
    found = llm.chat(
        [[{"role": "user", "content": question}] for question in questions],
        SamplingParams(max_tokens=200, temperature=0),
        reasoning_effort="medium",
        current_date="2026-01-01",
    )
    return [(list(output.prompt_token_ids), list(output.outputs[0].token_ids)) for output in found]


def scores(llm: LLM, texts: list[list[int]]) -> list[TokenLogprobs]:
    """Of every token but the first of each text, with the likeliest instead of it."""
    params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=TOP)
    found = llm.generate(texts, params)
    return [one for output in found for one in output.prompt_logprobs or [] if one is not None]


def divergence(p: TokenLogprobs, q: TokenLogprobs) -> float:
    """KL divergence, nats, of q from p over the tokens that are among the likeliest of both, and one for all others."""
    common = p.top.keys() & q.top.keys()
    pairs = [(math.exp(p.top[token]), math.exp(q.top[token])) for token in common]
    rest = [max(1e-12, 1 - sum(values)) for values in zip(*pairs, strict=True)]
    return max(0.0, sum(a * math.log(a / b) for a, b in [*pairs, (rest[0], rest[1])] if a > 0))


if __name__ == "__main__":
    main()
