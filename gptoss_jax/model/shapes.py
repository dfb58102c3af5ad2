"""Model shapes without weights: a config.json, or a released model's name."""

from __future__ import annotations

from pathlib import Path

RELEASED = {"gpt-oss-20b": "gpt_oss_20b.json", "gpt-oss-120b": "gpt_oss_120b.json"}

_INSTALLED = Path(__file__).parents[1] / "configs"
_CONFIGS = _INSTALLED if _INSTALLED.is_dir() else Path(__file__).parents[2] / "configs"


def shape_file(model: str | Path) -> Path | None:
    """The config.json for `model`, if it is a .json path or a released model's name; None for a checkpoint."""
    if str(model).endswith(".json"):
        return Path(model)
    released = RELEASED.get(str(model))
    return None if released is None or Path(model).exists() else _CONFIGS / released
