"""Converts checkpoints between layouts, with one tensor in memory at a time."""

from __future__ import annotations

import contextlib
import math
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np

from gptoss_jax.checkpoints.layouts import is_stored_transposed, stored_shape
from gptoss_jax.checkpoints.new_directory import new_directory
from gptoss_jax.checkpoints.reader import Checkpoint, open_checkpoint
from gptoss_jax.checkpoints.safetensors_file import CHUNK_BYTES, DTYPES, TensorInfo, aligned_empty, show
from gptoss_jax.checkpoints.writer import write_hugging_face, write_json
from gptoss_jax.errors import CheckpointError
from gptoss_jax.model.gpt_oss import weight_specs

Layout = Literal["hf", "orbax"]

COPIED_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "README.md",
    "LICENSE",
    "USAGE_POLICY",
)
"""Files beside the weights that are copied if the source has them."""

Advance = Callable[[int], object]


def convert(
    source: str | Path,
    target: str | Path,
    to: Layout,
    *,
    verify: bool = False,
    max_shard_bytes: int = 5_000_000_000,
    progress: bool | None = None,
) -> int:
    """Write the checkpoint `source`, of any layout, to a new directory `target`; returns its size in bytes.

    Tensors keep their bytes and dtypes. `target` appears once it is complete and, with `verify`, has been read back and
    compared. `progress` shows a progress bar on stderr; None shows it if stderr is a terminal. Raises CheckpointError.
    """
    with open_checkpoint(source) as checkpoint:
        checkpoint.validate(weight_specs(checkpoint.config))
        tensors = [tensor_info(checkpoint, name) for name in checkpoint.tensors]
        total = sum(info.nbytes for info in tensors)
        with new_directory(target) as partial:
            _check_space(partial, target, total)
            with _bar("Converting", total, progress) as advance:
                written = _write(checkpoint, tensors, partial, to, max_shard_bytes, advance)
            _copy_files(checkpoint, written)
            if verify:
                compare(checkpoint, written, progress=progress, shown_as=target)
            if written != partial:
                for path in written.iterdir():
                    path.rename(partial / path.name)
                written.rmdir()
    return total


def tensor_info(checkpoint: Checkpoint, name: str) -> TensorInfo:
    """A checkpoint's tensor as it is stored in Hugging Face's layout and in our Orbax layout."""
    tensor = checkpoint.tensors[name]
    shape = stored_shape(name, tensor.shape) if len(tensor.shape) == 3 else tensor.shape
    return TensorInfo(name, tensor.entry.dtype, shape)


def _write(
    checkpoint: Checkpoint,
    tensors: list[TensorInfo],
    directory: Path,
    to: Layout,
    max_shard_bytes: int,
    advance: Advance,
) -> Path:
    """Write the tensors into `directory` or a directory below it, which is returned."""
    infos = {info.name: info for info in tensors}

    def read(name: str) -> np.ndarray:
        info = infos[name]
        array = aligned_empty(info.shape, DTYPES[info.dtype])
        view = array.swapaxes(-1, -2) if is_stored_transposed(name) else array
        checkpoint.read_into(name, [(0, size) for size in view.shape], view)
        advance(info.nbytes)
        return array

    if to == "hf":
        write_hugging_face(directory, tensors, ((info.name, read(info.name)) for info in tensors), max_shard_bytes)
        return directory
    from gptoss_jax.checkpoints.orbax_writer import write_orbax

    # Orbax creates the directory itself.
    write_orbax(directory / "orbax", tensors, read)
    return directory / "orbax"


def _copy_files(checkpoint: Checkpoint, directory: Path) -> None:
    if any(tensor.entry.name.startswith("block.") for tensor in checkpoint.tensors.values()):
        write_json(directory / "config.json", checkpoint.config.to_dict())
    else:
        shutil.copyfile(checkpoint.path / "config.json", directory / "config.json")
    for name in COPIED_FILES:
        if (checkpoint.path / name).is_file():
            shutil.copyfile(checkpoint.path / name, directory / name)


def _check_space(partial: Path, target: str | Path, needed: int) -> None:
    free = shutil.disk_usage(partial).free
    if free < needed:
        raise CheckpointError(f"{target}: cannot be written: {needed} bytes are needed, the disk has {free} left")


def compare(
    source: Checkpoint, target: str | Path, *, progress: bool | None = None, shown_as: str | Path | None = None
) -> int:
    """Compare every tensor of two checkpoints of any layout byte for byte; returns their size in bytes.

    Raises CheckpointError naming the first tensor that differs. Messages call the target `shown_as`, if given.
    """
    try:
        with open_checkpoint(target) as other:
            other.validate(weight_specs(source.config))
            missing = sorted(source.tensors.keys() ^ other.tensors.keys())
            if missing:
                raise CheckpointError(f"{target}: {show(missing[0])}: found in one of the checkpoints only")
            total = sum(tensor.nbytes for tensor in source.tensors.values())
            with _bar("Verifying", total, progress) as advance:
                for name in source.tensors:
                    _compare_tensor(source, other, name, advance)
        return total
    except CheckpointError as error:
        if shown_as is None:
            raise
        raise CheckpointError(str(error).replace(str(target), str(shown_as))) from None


def _compare_tensor(source: Checkpoint, target: Checkpoint, name: str, advance: Advance) -> None:
    ours, theirs = source.tensors[name], target.tensors[name]
    if (ours.entry.dtype, ours.shape) != (theirs.entry.dtype, theirs.shape):
        raise CheckpointError(
            f"{theirs.where}: expected {ours.entry.dtype} {list(ours.shape)} as in {source.path}, "
            f"found {theirs.entry.dtype} {list(theirs.shape)}"
        )
    rows = ours.shape[0] if ours.shape else 1
    step = max(1, 4 * CHUNK_BYTES * rows // max(ours.nbytes, 1))
    for first in range(0, rows, step):
        index = (slice(first, first + step),) if ours.shape else ()
        expected, found = (c.read(name, index).reshape(-1).view(np.uint8) for c in (source, target))
        if not np.array_equal(expected, found):
            at = int((expected != found).argmax()) + first * (ours.nbytes // rows)
            raise CheckpointError(f"{theirs.where}: differs from {source.path} at byte {at}")
        advance(expected.size)


@contextlib.contextmanager
def _bar(title: str, total: int, progress: bool | None) -> Iterator[Advance]:
    if not (sys.stderr.isatty() if progress is None else progress):
        yield lambda _: None
        return
    import tqdm

    with tqdm.tqdm(total=total, unit="B", unit_scale=True, desc=title, file=sys.stderr) as bar:
        yield bar.update


def parse_size(text: str) -> int:
    """The number of bytes in a size such as 500MB or 5GB. Raises ValueError."""
    units = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
    number = text.strip().upper().rstrip("BKMGT")
    unit = text.strip().upper()[len(number) :]
    try:
        size = float(number) * units[unit]
    except (KeyError, ValueError):
        size = math.nan
    if not 1 <= size < 2**63:
        raise ValueError(f"not a size: {text}")
    return int(size)
