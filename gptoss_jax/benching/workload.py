"""Inputs of a benchmark: the model, random prompts, and the requests' arrival times."""

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
    """A request: its arrival in seconds from the start, and its numbers of prompt and output tokens."""

    arrival_s: float
    prompt_tokens: int
    output_tokens: int


def random_prompt(rng: np.random.Generator, vocab: int, length: int) -> list[int]:
    """Uniformly random tokens, so that no two prompts share a prefix."""
    return rng.integers(0, vocab, length).tolist()


def load(
    model: Path | str | None, mesh: str | None, dtype: str, seed: int, rules: ShardingRules | None = None
) -> GptOss:
    """Load a checkpoint, or a model with random weights where `shape_file` finds a shape. Raises CheckpointError."""
    from gptoss_jax.checkpoints.loading import EMBEDDED, load_model, random_model
    from gptoss_jax.model.config import ModelConfig
    from gptoss_jax.model.shapes import shape_file

    if model is not None and (shape := shape_file(model)):
        return random_model(ModelConfig.from_file(shape), mesh, dtype, rules=rules, seed=seed)
    return load_model(model or EMBEDDED, mesh, dtype, rules=rules)
