"""Orbax checkpoints: one array a tensor, under the names, shapes and dtypes of Hugging Face's layout.

orbax-checkpoint writes them and tells what is in them, so its own `PyTreeRestore` reads them as well. Slices are
read through TensorStore, on which it stands: without the barriers of a collective restore, and converted, padded
and checked as those of any other layout.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gptoss_jax.errors import CheckpointError
from gptoss_jax.safetensors_file import CHUNK_BYTES, DTYPES, Box, TensorEntry, TensorInfo, load_json, show

try:
    import orbax.checkpoint as ocp
    import tensorstore as ts
except ImportError as error:
    raise CheckpointError(f"Orbax checkpoints need the package orbax-checkpoint: {error}") from None

METADATA_FILE = "_METADATA"

WRITE_CHUNK_BYTES = 2 << 20
"""What one read takes at least: small next to an expert, so that tensor parallelism reads little in vain."""

DATA_FILE_BYTES = 256 << 20
"""Orbax holds a data file in memory until it is full."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_OS_ERROR = re.compile(r"\[OS error (\d+)")


class OrbaxDirectory:
    """The arrays of an Orbax checkpoint; nested trees go by their keys joined with dots.

    `tensors` maps each name to its entry. `on_read`, if given, is called with the size of every slice (from any
    thread). Opening raises CheckpointError naming the directory and the array that is wrong.
    """

    def __init__(self, path: Path, on_read: Callable[[int], None] | None = None) -> None:
        self.path = path
        self.on_read = on_read
        flags = _flags(path)
        try:
            tree = ocp.PyTreeCheckpointHandler().metadata(_path(path)).tree
        except Exception as error:  # Orbax lets through whatever its parts raise.
            raise CheckpointError(f"{path}: not a whole Orbax checkpoint: {_line(error)}") from None
        self.tensors = {name: _entry(path, name, leaf) for name, leaf in _leaves(tree)}
        self._spec: dict[str, Any] = {
            "driver": "zarr3" if flags.get("use_zarr3") else "zarr",
            # Otherwise an array that is gone reads as zeros.
            "fill_missing_data_reads": not flags.get("store_array_data_equal_to_fill_value", False),
        }
        self._ocdbt = flags.get("use_ocdbt", True) and ocp.type_handlers.is_ocdbt_checkpoint(_path(path))
        self._context = ts.Context({"cache_pool": {"total_bytes_limit": 0}})
        self._stores: dict[str, ts.TensorStore] = {}

    def close(self) -> None:
        """Forget the arrays; they can no longer be read."""
        self._stores.clear()
        self.tensors = {}

    def _store(self, name: str) -> ts.TensorStore:
        if name not in self._stores:
            if self._ocdbt:
                place = {"driver": "ocdbt", "base": f"file://{self.path.absolute()}/", "path": f"{name}/"}
            else:
                place = {"driver": "file", "path": f"{self.path.absolute() / name}/"}
            self._stores[name] = ts.open(
                self._spec | {"kvstore": place}, open=True, read=True, context=self._context
            ).result()
        return self._stores[name]

    def read_into(self, entry: TensorEntry, box: Box, out: np.ndarray, pool: Executor | None = None) -> None:
        """Fill `out`, of the shape of `box`, with that slice of a tensor, converted to `out`'s dtype.

        `out` may be any view. Chunks that the slice touches are read whole.
        """
        if not out.size:
            return

        def read(piece: tuple[slice, ...]) -> None:
            wanted = tuple(
                slice(start + part.start, start + part.stop) for (start, _), part in zip(box, piece, strict=True)
            )
            source = self._store(entry.name)[wanted]
            if out.dtype != source.dtype.numpy_dtype:
                source = ts.cast(source, out.dtype)
            ts.array(out[piece]).write(source).result()

        try:
            list(map(read, _pieces(out)) if pool is None else pool.map(read, _pieces(out)))
        except Exception as error:
            raise CheckpointError(f"{self.path}: {show(entry.name)}: cannot be read: {_line(error)}") from None
        if self.on_read is not None:
            self.on_read(out.size * DTYPES[entry.dtype].itemsize)


def _pieces(out: np.ndarray) -> Iterator[tuple[slice, ...]]:
    """Slices along the first dimension, of about a chunk."""
    if not out.shape:
        yield ()
        return
    rows = max(1, CHUNK_BYTES * out.shape[0] // out.nbytes)
    rest = tuple(slice(0, size) for size in out.shape[1:])
    for first in range(0, out.shape[0], rows):
        yield (slice(first, min(first + rows, out.shape[0])), *rest)


def _flags(path: Path) -> Mapping[str, Any]:
    file = path / METADATA_FILE
    try:
        flags = load_json(file, file.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{file}: no such file, so this is no whole Orbax checkpoint of arrays") from None
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from None
    if not isinstance(flags, dict):
        raise CheckpointError(f"{file}: expected a JSON object, found {type(flags).__name__}")
    return flags


def _path(path: Path) -> Any:
    from etils import epath

    return epath.Path(path.absolute())


def _leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, Mapping | list | tuple):
        for key, branch in tree.items() if isinstance(tree, Mapping) else enumerate(tree):
            yield from _leaves(branch, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, tree


def _entry(path: Path, name: str, leaf: Any) -> TensorEntry:
    shape, dtype = getattr(leaf, "shape", None), getattr(leaf, "dtype", None)
    if shape is None or dtype is None or np.dtype(dtype) not in _NAMES:
        found = type(leaf).__name__ if shape is None or dtype is None else str(dtype)
        raise CheckpointError(f"{path}: {show(name)}: expected an array of a known dtype, found {show(found)}")
    return TensorEntry(name, _NAMES[np.dtype(dtype)], tuple(shape), 0)


def _line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return show(lines[0]) if lines else type(error).__name__


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Orbax logs what it raises as well."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)


class _Lazy:
    """An array that is made when it is written."""

    def __init__(self, info: TensorInfo, make: Callable[[str], np.ndarray]) -> None:
        self.shape, self.dtype, self.nbytes = info.shape, DTYPES[info.dtype], info.nbytes
        self.size = int(np.prod(info.shape, dtype=np.int64))
        self.make = lambda: make(info.name)


class _LazyHandler(ocp.type_handlers.NumpyHandler):
    """Makes and writes one array after the other, where Orbax would hold all of them."""

    def __init__(self) -> None:
        super().__init__(deepcopy_host_arrays=False)

    async def serialize(
        self, values: Sequence[Any], infos: Sequence[Any], args: Sequence[Any] | None = None
    ) -> Sequence[Any]:
        """Write the values and wait for them."""
        for value, info, arg in zip(values, infos, args or [ocp.SaveArgs()] * len(values), strict=True):
            for written in await super().serialize([value.make()], [info], [arg]):
                written.result()
        return []


def write_orbax(directory: Path, tensors: Sequence[TensorInfo], make: Callable[[str], np.ndarray]) -> None:
    """Write a new directory of arrays, each made by its name when its turn comes, one at a time in memory.

    Raises OSError if it cannot be written, and whatever `make` raises.
    """
    failures: list[BaseException] = []

    def recorded(name: str) -> np.ndarray:
        try:
            return make(name)
        except BaseException as error:
            failures.append(error)
            raise

    registry = ocp.type_handlers.create_type_handler_registry(
        (_Lazy, _LazyHandler()), (jax.Array, ocp.type_handlers.ArrayHandler())
    )
    tree = {info.name: _Lazy(info, recorded) for info in tensors}
    save_args = {
        info.name: ocp.SaveArgs(
            chunk_byte_size=WRITE_CHUNK_BYTES,
            # Whole experts, where there are any, or parts of one.
            shard_axes=(0,) if len(info.shape) > 2 else (),
        )
        for info in tensors
    }
    handler = ocp.PyTreeCheckpointHandler(use_compression=False, type_handler_registry=registry)
    args = ocp.args.PyTreeSave(tree, save_args=save_args, ocdbt_target_data_file_size=DATA_FILE_BYTES)
    try:
        with _quiet(), ocp.Checkpointer(handler) as checkpointer:
            checkpointer.save(directory.absolute(), args=args)
    except Exception as error:
        if failures:
            raise failures[0] from None
        found = _OS_ERROR.search(str(error))
        if found:
            raise OSError(int(found[1]), os.strerror(int(found[1]))) from None
        if isinstance(error, OSError):
            raise
        raise OSError(_line(error)) from None
