"""A model from a checkpoint, or with random weights."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp

from gptoss_jax.checkpoint import open_checkpoint, resolve
from gptoss_jax.config import ModelConfig
from gptoss_jax.errors import UsageError
from gptoss_jax.model import GptOss, weight_specs
from gptoss_jax.weights import random_creator

EMBEDDED = Path(__file__).parent / "embedded"
"""The small trained model that ships with the project."""

DTYPES = ("bfloat16", "float32")


def load_model(path: str | Path = EMBEDDED, *, dtype: str = "bfloat16", progress: bool | None = None) -> GptOss:
    """Load a checkpoint: a local directory, or a Hub name that is downloaded first.

    Computation and plain weights are in `dtype`; experts stay in MXFP4 where the checkpoint has them so. Progress
    goes to stderr if `progress`, or if that is a terminal. Raises CheckpointError before anything is computed.
    """
    with open_checkpoint(resolve(path)) as checkpoint:
        checkpoint.validate(weight_specs(checkpoint.config))
        return GptOss(checkpoint.config, checkpoint.creator(check_dtype(dtype), progress=progress))


def random_model(config: ModelConfig, *, seed: int = 0, dtype: str = "bfloat16") -> GptOss:
    """A model of any shape with random weights, for tests and benchmarks; its experts are drawn packed."""
    # The hardware generator: threefry would take minutes for the released sizes on a CPU.
    return GptOss(config, random_creator(jax.random.key(seed, impl="rbg"), check_dtype(dtype)))


def check_dtype(dtype: str) -> jnp.dtype:
    """The dtype of that name. Raises UsageError."""
    if dtype not in DTYPES:
        raise UsageError(f"dtype: expected {' or '.join(DTYPES)}, found {dtype!r}")
    return jnp.dtype(dtype)
