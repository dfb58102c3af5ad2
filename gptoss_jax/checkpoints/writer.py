"""Writes checkpoints in Hugging Face's layout."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.typing import DTypeLike
from safetensors import SafetensorError
from safetensors.numpy import save_file

from gptoss_jax.checkpoints.layouts import (
    FLOAT_DTYPES,
    INDEX_FILE,
    SINGLE_FILE,
    is_stored_transposed,
    stored_shape,
)
from gptoss_jax.checkpoints.new_directory import new_directory
from gptoss_jax.checkpoints.safetensors_file import DTYPES, TensorInfo
from gptoss_jax.model.config import ModelConfig
from gptoss_jax.model.mxfp4 import GROUP, MXFP4Tensor
from gptoss_jax.model.weights import Creator, WeightSpec


def stored_tensors(specs: Iterable[WeightSpec], dtype: DTypeLike = "bfloat16") -> list[TensorInfo]:
    """The tensors in which Hugging Face's layout stores a model's weights, for `save_safetensors`.

    Plain weights are stored in `dtype`.
    """
    float_names = [name for name in FLOAT_DTYPES if DTYPES[name] == np.dtype(dtype)]
    if not float_names:
        raise ValueError(f"dtype: expected one of {', '.join(FLOAT_DTYPES)}, found {np.dtype(dtype)}")
    table = []
    for spec in specs:
        if spec.packed:
            table.append(TensorInfo(f"{spec.name}_blocks", "U8", (*spec.groups_shape, GROUP // 2)))
            table.append(TensorInfo(f"{spec.name}_scales", "U8", spec.groups_shape))
        else:
            table.append(TensorInfo(spec.name, float_names[0], stored_shape(spec.name, spec.shape)))
    return table


def save_weights(
    directory: str | Path,
    config: ModelConfig,
    specs: Sequence[WeightSpec],
    weights: Creator,
    dtype: DTypeLike = "bfloat16",
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write a checkpoint of weights that a creator returns one at a time; see `save_safetensors`."""

    def arrays() -> Iterator[tuple[str, np.ndarray]]:
        for spec in specs:
            weight = weights(spec)
            if isinstance(weight, MXFP4Tensor):
                yield f"{spec.name}_blocks", np.asarray(weight.blocks)
                yield f"{spec.name}_scales", np.asarray(weight.scales)
                continue
            array = np.asarray(weight).astype(dtype, copy=False)
            yield spec.name, array.swapaxes(-1, -2) if is_stored_transposed(spec.name) else array

    save_safetensors(directory, config, stored_tensors(specs, dtype), arrays(), max_shard_bytes)


def save_safetensors(
    directory: str | Path,
    config: ModelConfig | Mapping[str, Any],
    tensors: Sequence[TensorInfo],
    arrays: Iterable[tuple[str, np.ndarray]],
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write Hugging Face's layout: config.json and one model.safetensors, or shards with an index.

    `tensors` declares the arrays that `arrays` yields, in any order; see `write_safetensors` for the memory needed.
    `directory` must not exist or must be empty, and appears only once it is complete. Raises CheckpointError if it
    cannot be written, ValueError if `arrays` does not match `tensors`.
    """
    with new_directory(directory) as partial:
        write_hugging_face(partial, tensors, arrays, max_shard_bytes)
        write_json(partial / "config.json", config.to_dict() if isinstance(config, ModelConfig) else dict(config))


def write_hugging_face(
    directory: Path, tensors: Sequence[TensorInfo], arrays: Iterable[tuple[str, np.ndarray]], max_shard_bytes: int
) -> None:
    """Write only the tensors of `save_safetensors`, into an existing directory. Raises OSError."""
    shards = _shards(tensors, max_shard_bytes)
    write_safetensors({directory / name: shard for name, shard in shards.items()}, arrays)
    if len(shards) > 1:
        total = sum(info.nbytes for info in tensors)
        weight_map = {info.name: name for name, shard in shards.items() for info in shard}
        write_json(directory / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _shards(tensors: Sequence[TensorInfo], max_bytes: int) -> dict[str, list[TensorInfo]]:
    shards: list[list[TensorInfo]] = [[]]
    size = 0
    for info in tensors:
        if shards[-1] and size + info.nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(info)
        size += info.nbytes
    if len(shards) == 1:
        return {SINGLE_FILE: shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, 1)}


def write_safetensors(
    shards: Mapping[Path, Sequence[TensorInfo]], arrays: Iterable[tuple[str, np.ndarray]]
) -> None:
    """Write files with the declared tensors from `arrays`, which yields them in any order.

    A file is written when the last of its tensors has arrived; until then its arrays are kept in memory. If the arrays
    arrive file by file, this takes as much memory as the largest file. Raises ValueError if an array is not declared or
    is missing, OSError if a file cannot be written.
    """
    missing: dict[str, tuple[Path, TensorInfo]] = {}
    for path, tensors in shards.items():
        for info in tensors:
            if info.name in missing:
                raise ValueError(f"{info.name}: declared twice")
            missing[info.name] = path, info
    held: dict[Path, dict[str, np.ndarray]] = {path: {} for path in shards}
    for name, array in arrays:
        if name not in missing:
            raise ValueError(f"{name}: not declared, or already written")
        path, info = missing.pop(name)
        if array.shape != info.shape or array.dtype != DTYPES[info.dtype]:
            raise ValueError(f"{name}: expected {info.dtype} {info.shape}, found {array.dtype} {array.shape}")
        held[path][name] = np.asarray(array, order="C")
        # Releases the array before the generator creates the next one.
        del array
        if len(held[path]) == len(shards[path]):
            _write_file(path, held.pop(path))
    if missing:
        raise ValueError(f"{next(iter(missing))}: declared, but not written")


def _write_file(path: Path, tensors: dict[str, np.ndarray]) -> None:
    try:
        # transformers requires this metadata.
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise _os_error(error) from None
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _os_error(error: SafetensorError) -> OSError:
    """The OSError whose number is in the message of the library's error, if any."""
    number = re.search(r"\(os error (\d+)\)", str(error))
    return OSError(int(number[1]), os.strerror(int(number[1]))) if number else OSError(str(error))


def write_json(path: Path, fields: Mapping[str, Any]) -> None:
    """Write an indented JSON file."""
    path.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
