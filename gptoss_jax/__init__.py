"""gpt-oss in JAX: MXFP4 weights from the checkpoint to the matrix multiply, on any mesh of GPUs or TPUs."""

from __future__ import annotations

import importlib
import os
import signal
import sys
from typing import TYPE_CHECKING, Any

# JAX reads it when it initializes a GPU. Its default of 0.75 is too little for gpt-oss-120b on a GPU of 80 GB.
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")

__version__ = "0.1.0"

if sys.argv[:1] == ["-m"] and any(argument.startswith(f"{__name__}.") for argument in sys.orig_argv[1:]):
    # `python -m gptoss_jax.NAME`: until the command handles signals itself, they end the process without a traceback.
    for _number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(_number) != signal.SIG_IGN:
            signal.signal(_number, lambda number, _: os._exit(128 + number))

if TYPE_CHECKING:
    from gptoss_jax.checkpoints.loading import load_model, random_model
    from gptoss_jax.engine.options import EngineOptions
    from gptoss_jax.errors import CheckpointError, EngineError, GptOssError, UsageError
    from gptoss_jax.model.config import ModelConfig
    from gptoss_jax.serving.client import LLM, AsyncLLM
    from gptoss_jax.types import SamplingParams, StructuredOutputsParams

_HOMES = {
    "LLM": "serving.client",
    "AsyncLLM": "serving.client",
    "EngineOptions": "engine.options",
    "SamplingParams": "types",
    "StructuredOutputsParams": "types",
    "ModelConfig": "model.config",
    "load_model": "checkpoints.loading",
    "random_model": "checkpoints.loading",
    "CheckpointError": "errors",
    "EngineError": "errors",
    "GptOssError": "errors",
    "UsageError": "errors",
}

__all__ = [
    "LLM",
    "AsyncLLM",
    "CheckpointError",
    "EngineError",
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
    # Lazy imports: a command's `--help` must not import jax.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"gptoss_jax.{_HOMES[name]}"), name)
