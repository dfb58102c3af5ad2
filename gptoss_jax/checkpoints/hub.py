"""Resolves the name of a checkpoint: a local directory, or a repository on the Hub."""

from __future__ import annotations

import re
from pathlib import Path

from gptoss_jax.checkpoints.layouts import INDEX_FILE
from gptoss_jax.checkpoints.safetensors_file import show
from gptoss_jax.errors import CheckpointError, expect

HUB_PATTERNS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "*.safetensors",
    INDEX_FILE,
)


def expand_home(name: str | Path) -> Path:
    """The path, with ~ and ~user expanded where possible."""
    try:
        return Path(name).expanduser()
    except (RuntimeError, ValueError):  # ~nobody, or a null byte
        return Path(name)


def resolve(name: str | Path) -> Path:
    """The local directory of a checkpoint: `name` itself, or the download of the Hub repository `org/name`.

    Files in the Hub's local cache are not downloaded again, and without a network only the cache is used. Progress goes
    to stderr. Raises CheckpointError, or UsageError if `name` is neither text nor a path.
    """
    expect(isinstance(name, str | Path), "path", "a checkpoint's directory or a Hub name", name)
    path = expand_home(name)
    try:
        # Path("") is the current directory.
        if str(name) and path.is_dir():
            return path
        if str(name) and path.exists():
            raise CheckpointError(f"{path}: expected a checkpoint's directory, found a file")
    except OSError as error:
        raise CheckpointError(f"{show(name)}: {error.strerror}") from None
    if not re.fullmatch(r"[A-Za-z0-9_][\w.-]*/[\w.-]+", str(name), re.ASCII):
        raise CheckpointError(f"{show(name)}: no such directory")
    # Imported here because the import takes longer than reading a config.
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        # `*` also matches slashes, and subfolders hold other copies of the same weights.
        return Path(
            huggingface_hub.snapshot_download(
                str(name), allow_patterns=list(HUB_PATTERNS), ignore_patterns=["*/*"]
            )
        )
    except GatedRepoError:
        reason = "the Hub repository is gated: log in with `hf auth login` and ask for access"
    except RepositoryNotFoundError:
        reason = "the Hub has no such repository, or it is private"
    except Exception as error:  # The library does not wrap the exceptions of its HTTP client, which varies.
        reason = f"the Hub could not be reached: {_first_cause(error)}"
    raise CheckpointError(f"{name}: not a local directory, and {reason}")


def _first_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).split("\n")
    return lines[0].strip() or type(error).__name__
