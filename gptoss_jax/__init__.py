"""gpt-oss in JAX: MXFP4 from the file to the multiply, on any mesh of GPUs or TPUs."""

from __future__ import annotations

import importlib
import os
import signal
import sys
from typing import TYPE_CHECKING, Any

# Read when jax first meets a GPU, of which it would take three quarters: too little for 120b on one of 80 GB.
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")

__version__ = "0.1.0"

if sys.argv[:1] == ["-m"] and any(argument.startswith(f"{__name__}.") for argument in sys.orig_argv[1:]):
    # `python -m gptoss_jax.NAME`: until the command answers signals itself, they end the process without a traceback.
    for _number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(_number) != signal.SIG_IGN:
            signal.signal(_number, lambda number, _: os._exit(128 + number))

if TYPE_CHECKING:
    from gptoss_jax.checkpoints.loading import load_model, random_model
    from gptoss_jax.engine.engine import EngineOptions
    from gptoss_jax.errors import CheckpointError, GptOssError, UsageError
    from gptoss_jax.model.config import ModelConfig
    from gptoss_jax.serving.client import LLM
    from gptoss_jax.types import SamplingParams, StructuredOutputsParams

_HOMES = {
    "LLM": "serving.client",
    "EngineOptions": "engine.engine",
    "SamplingParams": "types",
    "StructuredOutputsParams": "types",
    "ModelConfig": "model.config",
    "load_model": "checkpoints.loading",
    "random_model": "checkpoints.loading",
    "CheckpointError": "errors",
    "GptOssError": "errors",
    "UsageError": "errors",
}

__all__ = [
    "LLM",
    "CheckpointError",
    "EngineOptions",
    "GptOssError",
    "ModelConfig",
    "SamplingParams",
    "StructuredOutputsParams",
    "UsageError",
    "__version__",
    "load_model",
    "random_model",
]


def __getattr__(name: str) -> Any:
    # Imported when asked for: `--help` of a command must not wait for jax.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"gptoss_jax.{_HOMES[name]}"), name)
