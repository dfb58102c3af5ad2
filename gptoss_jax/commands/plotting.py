"""Checks and writes the figures of `--plot`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from gptoss_jax.commands.files import check_writable
from gptoss_jax.errors import UsageError, expect

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = (".png", ".svg", ".pdf")


def check(path: Path) -> None:
    """Raise UsageError if a figure could not be drawn or written, before the work that it shows."""
    expect(
        path.suffix.lower() in FORMATS, f"--plot: {path}", f"a name that ends in {', '.join(FORMATS)}", path.suffix
    )
    check_writable(path, "--plot")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UsageError("matplotlib is missing: pip install 'gptoss-jax[plot]'", "--plot") from None


def save(figure: Figure, path: Path) -> None:
    """Write a figure in the format of the file's extension. Raises UsageError."""
    figure.tight_layout()
    try:
        figure.savefig(path, format=path.suffix[1:].lower(), dpi=130)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}", "--plot") from None
