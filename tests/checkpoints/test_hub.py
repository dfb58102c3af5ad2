"""Resolving the name of a checkpoint to a local directory or the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gptoss_jax.checkpoints.hub import resolve
from gptoss_jax.checkpoints.layouts import INDEX_FILE
from gptoss_jax.errors import CheckpointError


def test_resolve_local(tmp_path: Path) -> None:
    assert resolve(tmp_path) == tmp_path
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="found a file"):
        resolve(tmp_path / "file")


@pytest.mark.parametrize(
    "name", ["", "./x", "/x/y", "~/nowhere", "~nobody-here/x", "a/b/c", "gpt2", "a/b c", "a/\n", "a\0b", "~a\0b"]
)
def test_resolve_invalid_hub_name(name: str) -> None:
    with pytest.raises(CheckpointError, match="no such directory") as caught:
        resolve(name)
    assert str(caught.value).isprintable()


def test_resolve_hub_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def download(name: str, **options: Any) -> str:
        from huggingface_hub.utils import filter_repo_objects

        files = ["config.json", "a.safetensors", INDEX_FILE, "original/a.safetensors", "metal/model.bin", "x.py"]
        kept = list(filter_repo_objects(files, **options))
        assert kept == ["config.json", "a.safetensors", INDEX_FILE]
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve("openai/gpt-oss-20b") == tmp_path


def test_resolve_without_network(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def download(name: str, **options: Any) -> str:
        raise huggingface_hub.errors.LocalEntryNotFoundError("nothing here\nand more") from OSError("no route")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(CheckpointError) as caught:
        resolve("a/b")
    assert str(caught.value) == "a/b: not a local directory, and the Hub could not be reached: no route"
