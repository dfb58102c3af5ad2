"""Reads checkpoints in the layouts of Hugging Face, OpenAI and Orbax, directly into the shards of a mesh.

    checkpoint = open_checkpoint(resolve("openai/gpt-oss-20b"))
    checkpoint.validate(specs)                      # every header against the model, before any tensor is read
    create = checkpoint.creator("bfloat16")         # the model's constructor loads its weights with it

Tensors of every layout have the names and shapes that the model declares (model/weights.py); packed ones are
`<name>_blocks` and `<name>_scales`. layouts.py handles the differences between layouts.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
import sys
import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.typing import DTypeLike

from gptoss_jax.checkpoints import safetensors_file
from gptoss_jax.checkpoints.layouts import (
    FLOAT_DTYPES,
    INDEX_FILE,
    SINGLE_FILE,
    StoredTensor,
    TensorFile,
    is_openai,
    is_unused,
    tensors_of,
)
from gptoss_jax.checkpoints.safetensors_file import (
    DTYPES,
    THREADS,
    Box,
    SafetensorsFile,
    aligned_empty,
    load_json,
    show,
)
from gptoss_jax.errors import CheckpointError
from gptoss_jax.model.config import ModelConfig
from gptoss_jax.model.mxfp4 import GROUP, MXFP4Tensor
from gptoss_jax.model.weights import Creator, Sharding, Weight, WeightSpec

NAN_SCALE = 255


class Checkpoint:
    """An open checkpoint: its `config`, and `tensors` by the model's names. Opening reads only the headers.

    `bytes_read` counts the bytes that this process has read from the files, including headers.
    """

    def __init__(self, path: Path, config: ModelConfig, files: Sequence[Path]) -> None:
        """Open the given files of `path`, which `open_checkpoint` finds. Raises CheckpointError."""
        self.path = path
        self.bytes_read = 0
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="checkpoint")
        self.files = [self._open(file) for file in files]
        self.config = config
        self.tensors: dict[str, StoredTensor] = {}
        for file in self.files:
            for tensor in tensors_of(file, config):
                if tensor.name in self.tensors:
                    other = self.tensors[tensor.name]
                    raise CheckpointError(f"{tensor.where}: found twice, also in {other.file.path.name}")
                self.tensors[tensor.name] = tensor
        if any(is_openai(t.entry.name) for t in self.tensors.values()):
            # OpenAI's config.json does not record the quantization.
            packed = any(name.endswith("_blocks") for name in self.tensors)
            self.config = dataclasses.replace(config, quantization="mxfp4" if packed else None)

    def _open(self, file: Path) -> TensorFile:
        if not is_orbax(file):
            return SafetensorsFile(file, self._count)
        # Imported here because orbax-checkpoint is an optional dependency.
        from gptoss_jax.checkpoints.orbax_reader import OrbaxDirectory

        return OrbaxDirectory(file, self._count)

    def _count(self, size: int) -> None:
        with self._lock:
            self.bytes_read += size

    def close(self) -> None:
        """Close the files; arrays that were read remain valid."""
        self._pool.shutdown()
        for file in self.files:
            file.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def validate(self, specs: Iterable[WeightSpec]) -> None:
        """Check the names, dtypes and shapes of all tensors against the weights of a model.

        Raises CheckpointError for a tensor that is missing, wrong, or unknown to the model.
        """
        known = {part.name for spec in specs for part in self._parts(spec)}
        unknown = [tensor for name, tensor in self.tensors.items() if name not in known and not is_unused(name)]
        if unknown:
            more = f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else ""
            raise CheckpointError(f"{unknown[0].where}: unknown tensor, not part of this model{more}")

    def _parts(self, spec: WeightSpec) -> list[StoredTensor]:
        """The tensors that make up a weight, after checking them."""
        self._check_quantization(spec)
        stored = spec.stored
        if not spec.packed:
            return [self._part(spec.name, stored.shape, FLOAT_DTYPES)]
        blocks_shape = (*stored.groups_shape, GROUP // 2)
        return [
            self._part(f"{spec.name}_blocks", blocks_shape, ("U8",)),
            self._part(f"{spec.name}_scales", stored.groups_shape, ("U8",)),
        ]

    def _check_quantization(self, spec: WeightSpec) -> None:
        plain, packed = spec.name in self.tensors, f"{spec.name}_blocks" in self.tensors
        if plain and packed:
            raise CheckpointError(
                f"{self.tensors[spec.name].where}: found both MXFP4 (_blocks) and plain, expected one"
            )
        if spec.packed and plain:
            raise CheckpointError(
                f"{self.tensors[spec.name].where}: expected MXFP4 (_blocks and _scales) according to "
                f"config.json's quantization_config, found plain {self.tensors[spec.name].entry.dtype}"
            )
        if not spec.packed and packed:
            raise CheckpointError(
                f"{self.tensors[f'{spec.name}_blocks'].where}: expected a plain {spec.name}, because config.json has "
                "no quantization_config, found MXFP4"
            )

    def _part(self, name: str, shape: tuple[int, ...], dtypes: tuple[str, ...]) -> StoredTensor:
        tensor = self.tensors.get(name)
        if tensor is None:
            raise CheckpointError(f"{self.path}: {name}: missing tensor, expected shape {list(shape)}")
        if tensor.entry.dtype not in dtypes:
            raise CheckpointError(
                f"{tensor.where}: expected dtype {' or '.join(dtypes)}, found {tensor.entry.dtype}"
            )
        if tensor.shape != shape:
            expected, found = list(shape), list(tensor.shape)
            if tensor.transposed:
                expected[-2:], found[-2:] = expected[:-3:-1], found[:-3:-1]
            raise CheckpointError(f"{tensor.where}: expected shape {expected}, found {found}")
        return tensor

    def read(
        self,
        name: str,
        index: tuple[slice, ...] | None = None,
        dtype: DTypeLike | None = None,
        shape: tuple[int, ...] | None = None,
    ) -> np.ndarray:
        """A tensor by the model's name, or its slice `index` (steps of 1), in `dtype` or as stored.

        Only the bytes of the slice are read. A `shape` larger than the stored one pads the end of each dimension with
        zeros. Raises CheckpointError, also for scales of 255, which is NaN in MXFP4.
        """
        tensor = self._named(name)
        box = _box(shape or tensor.shape, index or ())
        out_dtype = DTYPES[tensor.entry.dtype] if dtype is None else np.dtype(dtype)
        out = aligned_empty([stop - start for start, stop in box], out_dtype)
        within = [
            (min(start, size), min(stop, size)) for (start, stop), size in zip(box, tensor.shape, strict=True)
        ]
        if within == box:
            self.read_into(name, box, out)
        else:
            out.view(np.uint8).fill(0)
            self.read_into(name, within, out[tuple(slice(0, stop - start) for start, stop in within)])
        return out

    def read_into(self, name: str, box: Box, out: np.ndarray) -> None:
        """Read the slice `box` of a tensor into `out`, any view of the same shape; see `read`."""
        tensor = self._named(name)
        tensor.read_into(box, out, self._pool)
        if name.endswith("_scales"):
            _refuse_nan_scales(tensor, box, out)

    def _named(self, name: str) -> StoredTensor:
        if name not in self.tensors:
            raise CheckpointError(f"{self.path}: {name}: missing tensor")
        return self.tensors[name]

    def creator(
        self,
        dtype: DTypeLike = "bfloat16",
        sharding: Sharding | None = None,
        progress: bool | None = None,
    ) -> Creator:
        """A function from which a model's constructor gets its weights; each call reads one weight.

        Plain weights are converted to `dtype`, packed ones stay as stored. `sharding` returns the sharding of a weight
        (for packed weights, that of both blocks and scales); None is the default device. Each process reads only its
        own shards. Host memory holds one tensor at a time, and one chunk per thread. Elements of a spec's shape beyond
        its `stored_shape` are zero. `progress` shows a progress bar on stderr; None shows it if stderr is a terminal.
        The function raises CheckpointError for a weight that `validate` would reject.
        """
        bar = self._progress_bar(progress)

        def create(spec: WeightSpec) -> Weight:
            parts = self._parts(spec)
            place = sharding(spec) if sharding else None
            if spec.packed:
                blocks = self._array(parts[0], (*spec.groups_shape, GROUP // 2), place, None)
                weight: Weight = MXFP4Tensor(blocks, self._array(parts[1], spec.groups_shape, place, None))
            else:
                weight = self._array(parts[0], spec.shape, place, dtype)
            # Queued transfers would keep their host copies alive.
            jax.block_until_ready(weight)
            if bar is not None:
                bar.update(sum(part.nbytes for part in parts))
                if bar.n >= bar.total:
                    bar.close()
            return weight

        return create

    def _array(
        self,
        tensor: StoredTensor,
        shape: tuple[int, ...],
        place: jax.sharding.Sharding | None,
        dtype: DTypeLike | None,
    ) -> jax.Array:
        if place is None:
            return jax.device_put(self.read(tensor.name, None, dtype, shape))
        boxes = {
            tuple(_box(shape, index or ())) for index in place.addressable_devices_indices_map(shape).values()
        }
        # Devices with the same shard share one read.
        reads: dict[_Bounds, np.ndarray] = {}

        def shard(index: tuple[slice, ...] | None) -> np.ndarray:
            box = tuple(_box(shape, index or ()))
            read = _joined(box, boxes, tensor)
            if read not in reads:
                reads[read] = self.read(tensor.name, tuple(slice(*bounds) for bounds in read), dtype, shape)
            return reads[read][
                tuple(slice(a - first, b - first) for (a, b), (first, _) in zip(box, read, strict=True))
            ]

        return jax.make_array_from_callback(shape, place, shard)

    def _progress_bar(self, progress: bool | None) -> Any:
        if progress is None:
            progress = sys.stderr.isatty() and jax.process_index() == 0
        if not progress:
            return None
        import tqdm

        total = sum(tensor.nbytes for name, tensor in self.tensors.items() if not is_unused(name))
        return tqdm.tqdm(
            total=total, unit="B", unit_scale=True, desc="Loading weights", file=sys.stderr, disable=False
        )


_Bounds = tuple[tuple[int, int], ...]


def _joined(box: _Bounds, boxes: Iterable[_Bounds], tensor: StoredTensor) -> _Bounds:
    """The slice to read for `box`, extended to other `boxes` in the gaps that reading it covers anyway."""
    joined = list(box)
    for axis in range(1, len(box)):
        row = math.prod(tensor.shape[axis:]) * DTYPES[tensor.entry.dtype].itemsize
        if row <= safetensors_file.MAX_GAP_BYTES:
            beside = [other[axis] for other in boxes if other[:axis] == box[:axis]]
            joined[axis] = (min(start for start, _ in beside), max(stop for _, stop in beside))
    return tuple(joined)


def _box(shape: tuple[int, ...], index: tuple[slice, ...]) -> list[tuple[int, int]]:
    if len(index) > len(shape) or any(part.step not in (None, 1) for part in index):
        raise ValueError(f"expected slices of step 1 for shape {shape}, found {index}")
    bounds = [part.indices(size)[:2] for part, size in zip(index, shape, strict=False)]
    bounds = [(start, max(start, stop)) for start, stop in bounds]
    return bounds + [(0, size) for size in shape[len(index) :]]


def _refuse_nan_scales(tensor: StoredTensor, box: Box, scales: np.ndarray) -> None:
    if scales.size and scales.max() == NAN_SCALE:
        local = np.unravel_index(int(scales.argmax()), scales.shape)
        position = [int(i) + start for i, (start, _) in zip(local, box, strict=True)]
        raise CheckpointError(f"{tensor.where}: expected scale bytes up to 254, found 255 (NaN) at {position}")


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a local checkpoint directory and check all of its headers; see `Checkpoint`.

    The directory holds config.json and one `model.safetensors`, shards with `model.safetensors.index.json`, any
    *.safetensors without an index, or an Orbax checkpoint. Raises CheckpointError naming the file or tensor.
    """
    path = Path(path)
    # Unlike Path's methods, those of os.path are false for names that are too long.
    if not os.path.isdir(path):
        raise CheckpointError(f"{show(path)}: no such directory")
    config = ModelConfig.from_file(path).with_generation_file(path)
    index = path / INDEX_FILE
    if is_orbax(path):
        if next(path.glob("*.safetensors"), None):
            raise CheckpointError(f"{path}: found both *.safetensors and an Orbax checkpoint, expected one")
        return Checkpoint(path, config, [path])
    if not os.path.exists(index):
        single = path / SINGLE_FILE
        files = [single] if os.path.exists(single) else sorted(path.glob("*.safetensors"))
        if not files:
            raise CheckpointError(
                f"{path}: expected {SINGLE_FILE}, {INDEX_FILE} or an Orbax checkpoint, found none of them"
            )
        return Checkpoint(path, config, files)
    weight_map = _read_weight_map(index)
    names = sorted(set(weight_map.values()))
    if SINGLE_FILE not in names and os.path.exists(path / SINGLE_FILE):
        raise CheckpointError(f"{path}: found both {SINGLE_FILE} and {INDEX_FILE} without it, expected one")
    checkpoint = Checkpoint(path, config, [path / name for name in names])
    _check_weight_map(index, weight_map, checkpoint.files)
    return checkpoint


def is_orbax(path: Path) -> bool:
    """Whether a directory holds an Orbax checkpoint, which may be incomplete."""
    return any(os.path.isfile(path / name) for name in ("_METADATA", "_CHECKPOINT_METADATA", "manifest.ocdbt"))


def _read_weight_map(index: Path) -> dict[str, str]:
    try:
        fields = load_json(index, index.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{index}: cannot be read: {error.strerror}") from None
    weight_map = fields.get("weight_map") if isinstance(fields, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: weight_map: expected an object of tensor names and files")
    for name, file in weight_map.items():
        # A name read from a file must not refer to files elsewhere. The entry may be a link, as in the Hub's cache.
        if not isinstance(file, str) or not re.fullmatch(r"[\w-][\w.-]*\.safetensors", file, re.ASCII):
            raise CheckpointError(
                f"{index}: {show(name)}: expected a plain *.safetensors name, found {show(file)}"
            )
    return weight_map


def _check_weight_map(index: Path, weight_map: Mapping[str, str], files: Sequence[TensorFile]) -> None:
    by_name = {file.path.name: file for file in files}
    for name, file_name in weight_map.items():
        if name not in by_name[file_name].tensors:
            raise CheckpointError(f"{index}: {show(name)}: expected in {file_name}, which does not hold it")
    for file in files:
        for name in file.tensors:
            if name not in weight_map:
                raise CheckpointError(f"{file.path}: {show(name)}: unknown tensor, not listed in {index.name}")
