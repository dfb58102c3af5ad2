"""What is asked of the engine: a model, prompts of random tokens, and when they arrive."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from gptoss_jax.model.gpt_oss import GptOss
    from sharding import ShardingRules


@dataclasses.dataclass(frozen=True)
class Arrival:
    """A request: when it comes, in seconds from the start, and how long its prompt and its output are."""

    arrival_s: float
    prompt_tokens: int
    output_tokens: int


def random_prompt(rng: np.random.Generator, vocab: int, length: int) -> list[int]:
    """Tokens that no other prompt begins with."""
    return rng.integers(0, vocab, length).tolist()


def load(
    model: Path | str | None, mesh: str | None, dtype: str, seed: int, rules: ShardingRules | None = None
) -> GptOss:
    """A checkpoint's model, or random weights of the shape that `shape_file` finds. Raises CheckpointError."""
    from gptoss_jax.checkpoints.loading import EMBEDDED, load_model, random_model
    from gptoss_jax.model.config import ModelConfig
    from gptoss_jax.model.shapes import shape_file

    if model is not None and (shape := shape_file(model)):
        return random_model(ModelConfig.from_file(shape), mesh, dtype, rules=rules, seed=seed)
    return load_model(model or EMBEDDED, mesh, dtype, rules=rules)
