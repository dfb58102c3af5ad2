"""What the commands' `--plot` needs of matplotlib."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from gptoss_jax.errors import UsageError


def check_writable(path: Path) -> None:
    """Before the work that a picture is of: raises UsageError where the picture could not be written."""
    directory = path.absolute().parent
    if not os.access(directory, os.W_OK):
        raise UsageError(f"--plot: {directory}: expected a directory that can be written")


def pyplot() -> Any:
    """matplotlib.pyplot, for files. Raises UsageError where it is missing."""
    try:
        import matplotlib

        matplotlib.use("agg")
        import matplotlib.pyplot as plt
    except ImportError:
        raise UsageError("--plot: matplotlib is missing: pip install 'gptoss-jax[plot]'") from None
    return plt


def save(figure: Any, path: Path) -> None:
    """Write a figure as a PNG file and close it. Raises UsageError."""
    figure.tight_layout()
    try:
        figure.savefig(path, format="png", dpi=130)
    except OSError as error:
        raise UsageError(f"--plot: {path}: {error.strerror}") from None
    finally:
        pyplot().close(figure)
