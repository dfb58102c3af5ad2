"""Reads Orbax checkpoints with one array per tensor, by the names, shapes and dtypes of Hugging Face's layout.

The arrays are read with TensorStore, on which Orbax is built. This gives the same interface to slices as the other
layouts, with the same conversion, padding and checks, and without the barriers of a collective restore.
`orbax_writer` writes such checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import numpy as np

from gptoss_jax.checkpoints.safetensors_file import CHUNK_BYTES, DTYPES, Box, TensorEntry, load_json, show
from gptoss_jax.errors import CheckpointError

try:
    import tensorstore as ts
except ImportError as error:
    raise CheckpointError(f"Orbax checkpoints need the package orbax-checkpoint: {error}") from None

METADATA_FILE = "_METADATA"

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class OrbaxDirectory:
    """The arrays of an Orbax checkpoint, in OCDBT or with one directory each.

    `tensors` maps each name to its entry; in nested trees the name is the keys joined by dots. `on_read`, if given, is
    called from any thread with the size of each slice read. The constructor raises CheckpointError naming the directory
    and the array.
    """

    def __init__(self, path: Path, on_read: Callable[[int], None] | None = None) -> None:
        self.path = path
        self.on_read = on_read
        metadata = _metadata(path)
        self._spec: dict[str, Any] = {
            "driver": "zarr3" if metadata.get("use_zarr3") else "zarr",
            # By default, an array whose data is missing reads as zeros.
            "fill_missing_data_reads": not metadata.get("store_array_data_equal_to_fill_value", False),
        }
        self._ocdbt = (path / "manifest.ocdbt").exists() or metadata.get("use_ocdbt") is True
        self._context = ts.Context({"cache_pool": {"total_bytes_limit": 0}})
        opened = {name: self._open(name) for name in _names(path, metadata)}
        self._stores: dict[str, ts.TensorStore] = {}
        for name, store in opened.items():
            try:
                self._stores[name] = store.result()
            except Exception as error:  # TensorStore has no error class of its own.
                raise CheckpointError(f"{path}: {show(name)}: cannot be read: {_line(error)}") from None
        self.tensors = {name: _entry(path, name, store) for name, store in self._stores.items()}

    def close(self) -> None:
        """Close the arrays; reading is an error afterwards."""
        self._stores.clear()
        self.tensors = {}

    def _open(self, name: str) -> ts.Future:
        place: dict[str, Any] = {"driver": "file", "path": f"{self.path.absolute() / name}/"}
        if self._ocdbt:
            place = {"driver": "ocdbt", "base": f"file://{self.path.absolute()}/", "path": f"{name}/"}
        return ts.open(self._spec | {"kvstore": place}, open=True, read=True, context=self._context)

    def read_into(self, entry: TensorEntry, box: Box, out: np.ndarray, pool: Executor | None = None) -> None:
        """Read the slice `box` of a tensor into `out`, converted to `out`'s dtype.

        `out` is any view of the same shape. Chunks that the slice intersects are read whole.
        """
        if not out.size:
            return

        def read(piece: tuple[slice, ...]) -> None:
            wanted = tuple(
                slice(start + part.start, start + part.stop) for (start, _), part in zip(box, piece, strict=True)
            )
            source = self._stores[entry.name][wanted]
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
    """Slices along the first dimension, of about `CHUNK_BYTES` each."""
    if not out.shape:
        yield ()
        return
    rows = max(1, CHUNK_BYTES * out.shape[0] // out.nbytes)
    rest = tuple(slice(0, size) for size in out.shape[1:])
    for first in range(0, out.shape[0], rows):
        yield (slice(first, min(first + rows, out.shape[0])), *rest)


def _metadata(path: Path) -> dict[str, Any]:
    file = path / METADATA_FILE
    try:
        fields = load_json(file, file.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{file}: no such file, so the Orbax checkpoint of arrays is incomplete") from None
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from None
    if not isinstance(fields, dict) or not isinstance(fields.get("tree_metadata"), dict):
        raise CheckpointError(f"{file}: tree_metadata: expected an object of arrays")
    return fields


def _names(path: Path, metadata: Mapping[str, Any]) -> Iterator[str]:
    """The names of the arrays as Orbax stores them: the keys of the tree joined by dots."""
    for key, leaf in metadata["tree_metadata"].items():
        try:
            name = ".".join(str(part["key"]) for part in leaf["key_metadata"])
            kind = leaf["value_metadata"]["value_type"]
        except (TypeError, KeyError):
            raise CheckpointError(
                f"{path / METADATA_FILE}: {show(key)}: expected key_metadata and value_metadata"
            ) from None
        if kind not in ("jax.Array", "np.ndarray"):
            raise CheckpointError(f"{path}: {show(name)}: expected an array, found {show(kind)}")
        # A name read from a file must not refer to files elsewhere.
        if not name or "/" in name or ".." in name:
            raise CheckpointError(f"{path}: expected an array's name, found {show(name)}")
        yield name


def _entry(path: Path, name: str, store: ts.TensorStore) -> TensorEntry:
    dtype = store.dtype.numpy_dtype
    if dtype not in _NAMES:
        raise CheckpointError(
            f"{path}: {show(name)}: expected dtype {' or '.join(_NAMES.values())}, found {dtype}"
        )
    return TensorEntry(name, _NAMES[dtype], tuple(store.shape), 0)


def _line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return show(lines[0]) if lines else type(error).__name__
