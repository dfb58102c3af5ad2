"""What is asked of the engine: a model, prompts of random tokens, and when they arrive."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gptoss_jax.commands import cli
from gptoss_jax.errors import UsageError

if TYPE_CHECKING:
    from gptoss_jax.model.gpt_oss import GptOss
    from sharding import ShardingRules


@dataclasses.dataclass(frozen=True)
class Arrival:
    """A request: when it comes, in seconds from the start, and how long its prompt and its output are."""

    arrival_s: float
    prompt_tokens: int
    output_tokens: int


def read_trace(path: Path) -> list[Arrival]:
    """A JSON line a request, in the order of their arrival. Raises UsageError, naming the line."""
    arrivals = []
    for number, text in enumerate(cli.read_text(path, "--trace").splitlines(), 1):
        if text.strip():
            where = f"--trace: {path}: line {number}"
            arrivals.append(_arrival(cli.parse_json(text, where, dict), where))
    if not arrivals:
        raise UsageError(f"--trace: {path}: expected a request a line, found none")
    return sorted(arrivals, key=lambda arrival: arrival.arrival_s)


def _arrival(line: dict[str, Any], where: str) -> Arrival:
    names = [field.name for field in dataclasses.fields(Arrival)]
    if sorted(line) != sorted(names):
        raise UsageError(f"{where}: expected {', '.join(names)}, found {', '.join(sorted(line)) or 'nothing'}")
    seconds = line["arrival_s"]
    if not isinstance(seconds, int | float) or isinstance(seconds, bool) or not 0 <= seconds < 1e9:
        raise UsageError(f"{where}: arrival_s: expected seconds from 0, found {seconds!r:.60}")
    for name in names[1:]:
        if type(line[name]) is not int or line[name] < 1:
            raise UsageError(f"{where}: {name}: expected an integer from 1, found {line[name]!r:.60}")
    return Arrival(**line)


def random_prompt(rng: np.random.Generator, vocab: int, length: int) -> list[int]:
    """Tokens that no other prompt begins with."""
    return rng.integers(0, vocab, length).tolist()


def load(
    model: Path | str | None, mesh: str | None, dtype: str, seed: int, rules: ShardingRules | None = None
) -> GptOss:
    """A checkpoint's model, or one of a config.json's shape with random weights. Raises CheckpointError."""
    from gptoss_jax.checkpoints.loading import EMBEDDED, load_model, random_model
    from gptoss_jax.model.config import ModelConfig

    if model is not None and str(model).endswith(".json"):
        return random_model(ModelConfig.from_file(Path(model)), mesh, dtype, rules=rules, seed=seed)
    return load_model(model or EMBEDDED, mesh, dtype, rules=rules)
