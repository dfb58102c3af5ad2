"""Checkpoints in and out: Hugging Face's and OpenAI's safetensors layouts, straight into the shards of a mesh.

    checkpoint = open_checkpoint(resolve("openai/gpt-oss-20b"))
    checkpoint.validate(specs)                      # every header against the model, before any tensor is read
    create = checkpoint.creator("bfloat16")         # building the model with it is loading it

Whatever the layout, tensors go by the names and shapes that the model declares (weights.py), packed ones as
`<name>_blocks` and `<name>_scales`. Layout differences live in `_stored_tensors` and nowhere else.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import shutil
import sys
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.typing import DTypeLike

from gptoss_jax.config import ModelConfig
from gptoss_jax.errors import CheckpointError
from gptoss_jax.mxfp4 import GROUP, MXFP4Tensor
from gptoss_jax.safetensors_file import (
    DTYPES,
    THREADS,
    Box,
    SafetensorsFile,
    TensorEntry,
    TensorInfo,
    aligned_empty,
    load_json,
    show,
    write_safetensors,
)
from gptoss_jax.weights import Creator, Weight, WeightSpec

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
HUB_PATTERNS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "*.safetensors",
    INDEX_FILE,
)
FLOAT_DTYPES = ("BF16", "F32", "F16")
NAN_SCALE = 255

Sharding = Callable[[WeightSpec], jax.sharding.Sharding | None]

# Buffers that some exports keep and that follow from the config.
_UNUSED = re.compile(r"(model\.)?(layers\.\d+\.self_attn\.)?rotary_emb\.(inv_freq|original_inv_freq)")
_EXPERT_MATRIX = re.compile(r"model\.layers\.\d+\.mlp\.experts\.(gate_up_proj|down_proj)")

# OpenAI's names as openai/gpt-oss `gpt_oss/torch/{model,weights}.py` has them. Its rotary halves the head as
# Hugging Face's does, so q and k rows keep their order.
_OPENAI_NAMES = {
    "embedding.weight": "model.embed_tokens.weight",
    "norm.scale": "model.norm.weight",
    "unembedding.weight": "lm_head.weight",
}
_OPENAI_BLOCK_NAMES = {
    "attn.norm.scale": "input_layernorm.weight",
    "attn.sinks": "self_attn.sinks",
    "attn.out.weight": "self_attn.o_proj.weight",
    "attn.out.bias": "self_attn.o_proj.bias",
    "mlp.norm.scale": "post_attention_layernorm.weight",
    "mlp.gate.weight": "mlp.router.weight",
    "mlp.gate.bias": "mlp.router.bias",
    "mlp.mlp1_weight": "mlp.experts.gate_up_proj",
    "mlp.mlp1_weight.blocks": "mlp.experts.gate_up_proj_blocks",
    "mlp.mlp1_weight.scales": "mlp.experts.gate_up_proj_scales",
    "mlp.mlp1_bias": "mlp.experts.gate_up_proj_bias",
    "mlp.mlp2_weight": "mlp.experts.down_proj",
    "mlp.mlp2_weight.blocks": "mlp.experts.down_proj_blocks",
    "mlp.mlp2_weight.scales": "mlp.experts.down_proj_scales",
    "mlp.mlp2_bias": "mlp.experts.down_proj_bias",
}
_OPENAI_BLOCK = re.compile(r"block\.(\d+)\.(.+)")


def resolve(name: str | Path) -> Path:
    """The local directory of a checkpoint: `name` itself, or a Hub repository's `org/name`, downloaded if need be.

    Progress goes to stderr; without a network the Hub's local cache serves. Raises CheckpointError.
    """
    try:
        path = Path(name).expanduser()
    except RuntimeError:  # ~nobody
        path = Path(name)
    # An empty name would be the current directory.
    if str(name) and path.is_dir():
        return path
    if str(name) and path.exists():
        raise CheckpointError(f"{path}: expected a checkpoint's directory, found a file")
    if not re.fullmatch(r"[A-Za-z0-9_][\w.-]*/[\w.-]+", str(name), re.ASCII):
        raise CheckpointError(f"{show(name)}: no such directory")
    # Imported here because it takes longer than reading a config.
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        # `*` matches slashes as well: folders hold other copies of the same weights.
        return Path(
            huggingface_hub.snapshot_download(
                str(name), allow_patterns=list(HUB_PATTERNS), ignore_patterns=["*/*"]
            )
        )
    except GatedRepoError:
        reason = "the Hub repository is gated: log in with `hf auth login` and ask for access"
    except RepositoryNotFoundError:
        reason = "the Hub has no such repository, or it is private"
    except Exception as error:  # The library lets through whatever its HTTP client of the day raises.
        reason = f"the Hub could not be reached: {_first_cause(error)}"
    raise CheckpointError(f"{name}: not a local directory, and {reason}")


def _first_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).split("\n")
    return lines[0].strip() or type(error).__name__


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor under the model's name and shape, and where it is stored.

    It is the rows from `first_row` of `entry` (the fused q|k|v of OpenAI's layout), and `transposed` if the file
    has the last two dimensions the other way around.
    """

    name: str
    shape: tuple[int, ...]
    file: SafetensorsFile
    entry: TensorEntry
    first_row: int = 0
    transposed: bool = False

    @property
    def nbytes(self) -> int:
        """Size as stored."""
        return math.prod(self.shape) * DTYPES[self.entry.dtype].itemsize

    @property
    def where(self) -> str:
        """File and tensor, for messages."""
        alias = "" if self.name == self.entry.name else f" ({show(self.name)})"
        return f"{self.file.path}: {show(self.entry.name)}{alias}"

    def read_into(self, box: Box, out: np.ndarray, pool: ThreadPoolExecutor) -> None:
        """Fill `out` with a slice of the tensor, converted to `out`'s dtype."""
        if self.transposed:
            box, out = [*box[:-2], box[-1], box[-2]], out.swapaxes(-1, -2)
        if self.first_row:
            (start, stop), *rest = box
            box = [(start + self.first_row, stop + self.first_row), *rest]
        self.file.read_into(self.entry, box, out, pool)


class Checkpoint:
    """An opened checkpoint: `config`, and `tensors` by the model's names; nothing but headers has been read yet.

    `bytes_read` counts what this process has read of the files, headers included.
    """

    def __init__(self, path: Path, config: ModelConfig, files: Sequence[Path]) -> None:
        """Open the given files of `path`; use `open_checkpoint` unless you know them. Raises CheckpointError."""
        self.path = path
        self.bytes_read = 0
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="checkpoint")
        self.files = [SafetensorsFile(file, self._count) for file in files]
        self.config = config
        self.tensors: dict[str, StoredTensor] = {}
        for file in self.files:
            for tensor in _stored_tensors(file, config):
                if tensor.name in self.tensors:
                    other = self.tensors[tensor.name]
                    raise CheckpointError(f"{tensor.where}: found twice, also in {other.file.path.name}")
                self.tensors[tensor.name] = tensor
        if any(_OPENAI_BLOCK.fullmatch(t.entry.name) for t in self.tensors.values()):
            # OpenAI's config.json does not tell.
            packed = any(name.endswith("_blocks") for name in self.tensors)
            self.config = dataclasses.replace(config, quantization="mxfp4" if packed else None)

    def _count(self, size: int) -> None:
        with self._lock:
            self.bytes_read += size

    def close(self) -> None:
        """Close the files; arrays that were read stay."""
        self._pool.shutdown()
        for file in self.files:
            file.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def validate(self, specs: Iterable[WeightSpec]) -> None:
        """Check every header against all of a model's weights: names, dtypes, shapes.

        Raises CheckpointError for a tensor that is missing, wrong, or unknown to the model.
        """
        known = {part.name for spec in specs for part in self._parts(spec)}
        unknown = [tensor for name, tensor in self.tensors.items() if name not in known and not _unused(name)]
        if unknown:
            more = f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else ""
            raise CheckpointError(f"{unknown[0].where}: unknown tensor, not part of this model{more}")

    def _parts(self, spec: WeightSpec) -> list[StoredTensor]:
        """The tensors that make up a weight, checked."""
        self._check_quantization(spec)
        if not spec.packed:
            return [self._part(spec.name, spec.shape, FLOAT_DTYPES)]
        blocks_shape = (*spec.groups_shape, GROUP // 2)
        return [
            self._part(f"{spec.name}_blocks", blocks_shape, ("U8",)),
            self._part(f"{spec.name}_scales", spec.groups_shape, ("U8",)),
        ]

    def _check_quantization(self, spec: WeightSpec) -> None:
        plain, packed = spec.name in self.tensors, f"{spec.name}_blocks" in self.tensors
        if plain and packed:
            raise CheckpointError(
                f"{self.tensors[spec.name].where}: found both MXFP4 (_blocks) and plain, expected one"
            )
        if spec.packed and plain:
            raise CheckpointError(
                f"{self.tensors[spec.name].where}: expected MXFP4 (_blocks and _scales) as config.json's "
                f"quantization_config tells, found plain {self.tensors[spec.name].entry.dtype}"
            )
        if not spec.packed and packed:
            raise CheckpointError(
                f"{self.tensors[f'{spec.name}_blocks'].where}: expected a plain {spec.name} as config.json has no "
                "quantization_config, found MXFP4"
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
        self, name: str, index: tuple[slice, ...] | None = None, dtype: DTypeLike | None = None
    ) -> np.ndarray:
        """A tensor, or the slice `index` of it (steps of 1), in `dtype` or as stored.

        `name` is the model's; only the bytes of the slice are read. Raises CheckpointError, also where scales
        hold 255, MXFP4's NaN.
        """
        tensor = self.tensors.get(name)
        if tensor is None:
            raise CheckpointError(f"{self.path}: {name}: missing tensor")
        box = _box(tensor.shape, index or ())
        out_dtype = DTYPES[tensor.entry.dtype] if dtype is None else np.dtype(dtype)
        out = aligned_empty([stop - start for start, stop in box], out_dtype)
        tensor.read_into(box, out, self._pool)
        if name.endswith("_scales"):
            _refuse_nan_scales(tensor, box, out)
        return out

    def creator(
        self,
        dtype: DTypeLike = "bfloat16",
        sharding: Sharding | None = None,
        progress: bool | None = None,
    ) -> Creator:
        """What a model's constructor asks for its weights: reads each as it is asked for.

        Plain weights come in `dtype`, packed ones as they are. `sharding` tells where a weight goes (of packed
        ones, blocks and scales alike), and each process reads its own shards only; None is the default device.
        Host memory holds one tensor at a time, and a chunk a thread. A progress bar goes to stderr if `progress`,
        or if that is a terminal. The creator raises CheckpointError for a weight that `validate` would refuse.
        """
        bar = self._progress_bar(progress)

        def create(spec: WeightSpec) -> Weight:
            parts = self._parts(spec)
            place = sharding(spec) if sharding else None
            if spec.packed:
                blocks, scales = (self._array(part, place, None) for part in parts)
                weight: Weight = MXFP4Tensor(blocks, scales)
            else:
                weight = self._array(parts[0], place, dtype)
            # Otherwise transfers queue up and hold the host's copies.
            jax.block_until_ready(weight)
            if bar is not None:
                bar.update(sum(part.nbytes for part in parts))
                if bar.n >= bar.total:
                    bar.close()
            return weight

        return create

    def _array(
        self, tensor: StoredTensor, place: jax.sharding.Sharding | None, dtype: DTypeLike | None
    ) -> jax.Array:
        if place is None:
            return jax.device_put(self.read(tensor.name, dtype=dtype))
        # Devices that hold the same shard share one read.
        shards: dict[tuple[tuple[int, int], ...], np.ndarray] = {}

        def shard(index: tuple[slice, ...] | None) -> np.ndarray:
            key = tuple(_box(tensor.shape, index or ()))
            if key not in shards:
                shards[key] = self.read(tensor.name, index, dtype)
            return shards[key]

        return jax.make_array_from_callback(tensor.shape, place, shard)

    def _progress_bar(self, progress: bool | None) -> Any:
        if progress is None:
            progress = sys.stderr.isatty() and jax.process_index() == 0
        if not progress:
            return None
        import tqdm

        total = sum(tensor.nbytes for name, tensor in self.tensors.items() if not _unused(name))
        return tqdm.tqdm(
            total=total, unit="B", unit_scale=True, desc="Loading weights", file=sys.stderr, disable=False
        )


def _unused(name: str) -> bool:
    return _UNUSED.fullmatch(name) is not None


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

    The directory holds config.json and one `model.safetensors`, shards with `model.safetensors.index.json`, or
    any *.safetensors without an index. Raises CheckpointError naming the file or tensor.
    """
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such directory")
    config = ModelConfig.from_file(path / "config.json")
    index = path / INDEX_FILE
    if not index.exists():
        single = path / SINGLE_FILE
        files = [single] if single.exists() else sorted(path.glob("*.safetensors"))
        if not files:
            raise CheckpointError(f"{path}: expected {SINGLE_FILE} or {INDEX_FILE}, found neither")
        return Checkpoint(path, config, files)
    weight_map = _read_weight_map(index)
    names = sorted(set(weight_map.values()))
    if SINGLE_FILE not in names and (path / SINGLE_FILE).exists():
        raise CheckpointError(f"{path}: found both {SINGLE_FILE} and {INDEX_FILE} without it, expected one")
    checkpoint = Checkpoint(path, config, [path / name for name in names])
    _check_weight_map(index, weight_map, checkpoint.files)
    return checkpoint


def _read_weight_map(index: Path) -> dict[str, str]:
    try:
        fields = load_json(index, index.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{index}: cannot be read: {error.strerror}") from None
    weight_map = fields.get("weight_map") if isinstance(fields, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: weight_map: expected an object of tensor names and files")
    for name, file in weight_map.items():
        # What comes from a file must not name files elsewhere. (The entry may be a link: the Hub's cache does so.)
        if not isinstance(file, str) or not re.fullmatch(r"[\w-][\w.-]*\.safetensors", file, re.ASCII):
            raise CheckpointError(
                f"{index}: {show(name)}: expected a plain *.safetensors name, found {show(file)}"
            )
    return weight_map


def _check_weight_map(index: Path, weight_map: Mapping[str, str], files: Sequence[SafetensorsFile]) -> None:
    by_name = {file.path.name: file for file in files}
    for name, file_name in weight_map.items():
        if name not in by_name[file_name].tensors:
            raise CheckpointError(f"{index}: {show(name)}: expected in {file_name}, which does not hold it")
    for file in files:
        for name in file.tensors:
            if name not in weight_map:
                raise CheckpointError(f"{file.path}: {show(name)}: unknown tensor, not listed in {index.name}")


def _stored_tensors(file: SafetensorsFile, config: ModelConfig) -> Iterator[StoredTensor]:
    """A file's tensors under the model's names and shapes; what neither layout knows keeps its name."""
    for entry in file.tensors.values():
        block = _OPENAI_BLOCK.fullmatch(entry.name)
        if block and block[2] in ("attn.qkv.weight", "attn.qkv.bias"):
            yield from _split_qkv(file, entry, config, block[1], block[2].rpartition(".")[2])
        elif block and block[2] in _OPENAI_BLOCK_NAMES:
            name = f"model.layers.{block[1]}.{_OPENAI_BLOCK_NAMES[block[2]]}"
            yield StoredTensor(name, entry.shape, file, entry)
        elif entry.name in _OPENAI_NAMES:
            yield StoredTensor(_OPENAI_NAMES[entry.name], entry.shape, file, entry)
        elif _EXPERT_MATRIX.fullmatch(entry.name) and len(entry.shape) == 3:
            # Unquantised, Hugging Face stores experts with the contracting dimension first.
            experts, inputs, outputs = entry.shape
            yield StoredTensor(entry.name, (experts, outputs, inputs), file, entry, transposed=True)
        else:
            yield StoredTensor(entry.name, entry.shape, file, entry)


def _split_qkv(
    file: SafetensorsFile, entry: TensorEntry, config: ModelConfig, layer: str, kind: str
) -> Iterator[StoredTensor]:
    queries, keys = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
    rows = queries + 2 * keys
    if not entry.shape or entry.shape[0] != rows:
        raise CheckpointError(
            f"{file.path}: {show(entry.name)}: expected {rows} rows of q, k and v, found shape {list(entry.shape)}"
        )
    for part, first, count in (("q", 0, queries), ("k", queries, keys), ("v", queries + keys, keys)):
        name = f"model.layers.{layer}.self_attn.{part}_proj.{kind}"
        yield StoredTensor(name, (count, *entry.shape[1:]), file, entry, first_row=first)


def stored_tensors(specs: Iterable[WeightSpec], dtype: DTypeLike = "bfloat16") -> list[TensorInfo]:
    """How Hugging Face's layout stores a model's weights, plain ones in `dtype`: what `save_safetensors` takes."""
    float_names = [name for name in FLOAT_DTYPES if DTYPES[name] == np.dtype(dtype)]
    if not float_names:
        raise ValueError(f"dtype: expected one of {', '.join(FLOAT_DTYPES)}, found {np.dtype(dtype)}")
    table = []
    for spec in specs:
        if spec.packed:
            table.append(TensorInfo(f"{spec.name}_blocks", "U8", (*spec.groups_shape, GROUP // 2)))
            table.append(TensorInfo(f"{spec.name}_scales", "U8", spec.groups_shape))
        else:
            shape = spec.shape
            if _EXPERT_MATRIX.fullmatch(spec.name):
                shape = (*shape[:-2], shape[-1], shape[-2])
            table.append(TensorInfo(spec.name, float_names[0], shape))
    return table


def save_weights(
    directory: str | Path,
    config: ModelConfig,
    specs: Sequence[WeightSpec],
    weights: Creator,
    dtype: DTypeLike = "bfloat16",
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write a checkpoint of the weights that a creator makes, one at a time; see `save_safetensors`."""

    def arrays() -> Iterator[tuple[str, np.ndarray]]:
        for spec in specs:
            weight = weights(spec)
            if isinstance(weight, MXFP4Tensor):
                yield f"{spec.name}_blocks", np.asarray(weight.blocks)
                yield f"{spec.name}_scales", np.asarray(weight.scales)
                continue
            array = np.asarray(weight).astype(dtype, copy=False)
            yield spec.name, array.swapaxes(-1, -2) if _EXPERT_MATRIX.fullmatch(spec.name) else array

    save_safetensors(directory, config, stored_tensors(specs, dtype), arrays(), max_shard_bytes)


def save_safetensors(
    directory: str | Path,
    config: ModelConfig | Mapping[str, Any],
    tensors: Sequence[TensorInfo],
    arrays: Iterable[tuple[str, np.ndarray]],
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write Hugging Face's layout: config.json and one model.safetensors, or shards with an index.

    `tensors` tells ahead what `arrays` then yields, in any order; one array is in memory at a time. `directory`
    must not exist or be empty, and appears only when all of it is written. Raises CheckpointError if it cannot,
    ValueError if `arrays` yields something else than announced.
    """
    directory = Path(directory).absolute()
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise CheckpointError(f"{directory}: expected a new or empty directory, found it in use")
    partial = directory.parent / f".{directory.name}.partial-{uuid.uuid4().hex[:8]}"
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
        shards = _shards(tensors, max_shard_bytes)
        write_safetensors({partial / name: shard for name, shard in shards.items()}, arrays)
        if len(shards) > 1:
            total = sum(info.nbytes for info in tensors)
            weight_map = {info.name: name for name, shard in shards.items() for info in shard}
            _write_json(partial / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})
        _write_json(partial / "config.json", config.to_dict() if isinstance(config, ModelConfig) else dict(config))
        os.replace(partial, directory)
    except OSError as error:
        raise CheckpointError(f"{directory}: cannot be written: {error.strerror}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


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


def _write_json(path: Path, fields: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
