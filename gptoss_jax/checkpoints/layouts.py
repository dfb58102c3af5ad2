"""Maps the tensor names and shapes of Hugging Face's and OpenAI's layouts to those that the model declares.

All differences between the layouts are handled in this module.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import numpy as np

from gptoss_jax.checkpoints.safetensors_file import (
    DTYPES,
    Box,
    TensorEntry,
    show,
)
from gptoss_jax.errors import CheckpointError
from gptoss_jax.model.config import ModelConfig

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
FLOAT_DTYPES = ("BF16", "F32", "F16")

# Buffers that some exporters write and that can be computed from the config.
_UNUSED = re.compile(r"(model\.)?(layers\.\d+\.self_attn\.)?rotary_emb\.(inv_freq|original_inv_freq)")
_EXPERT_MATRIX = re.compile(r"model\.layers\.\d+\.mlp\.experts\.(gate_up_proj|down_proj)")

# OpenAI's names as in openai/gpt-oss `gpt_oss/torch/{model,weights}.py`. Its rotary embedding splits the head in halves
# as Hugging Face's does, so the rows of q and k keep their order.
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


class TensorFile(Protocol):
    """A container of tensors whose headers have been checked: a safetensors file or an Orbax directory."""

    path: Path
    tensors: dict[str, TensorEntry]

    def read_into(self, entry: TensorEntry, box: Box, out: np.ndarray, pool: Executor | None = None) -> None:
        """Read the slice `box` of a tensor into `out`, any view of the same shape, converted to `out`'s dtype."""

    def close(self) -> None:
        """Close the container; reading is an error afterwards."""


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor by the model's name and shape, and its location in a file.

    The tensor consists of the rows of `entry` from `first_row` on (OpenAI's layout fuses q, k and v). `transposed`
    means that the file stores the last two dimensions swapped.
    """

    name: str
    shape: tuple[int, ...]
    file: TensorFile
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
        """Read the slice `box` of the tensor into `out`, converted to `out`'s dtype."""
        if self.transposed:
            box, out = [*box[:-2], box[-1], box[-2]], out.swapaxes(-1, -2)
        if self.first_row:
            (start, stop), *rest = box
            box = [(start + self.first_row, stop + self.first_row), *rest]
        self.file.read_into(self.entry, box, out, pool)


def is_openai(name: str) -> bool:
    """Whether a name is that of a block's tensor in OpenAI's layout."""
    return _OPENAI_BLOCK.fullmatch(name) is not None


def is_unused(name: str) -> bool:
    """Whether a tensor is a buffer that can be computed from the config."""
    return _UNUSED.fullmatch(name) is not None


def tensors_of(file: TensorFile, config: ModelConfig) -> Iterator[StoredTensor]:
    """A file's tensors by the model's names and shapes; tensors unknown to both layouts keep their names."""
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
            # Hugging Face's layout stores unquantised experts with the contracting dimension first.
            experts, inputs, outputs = entry.shape
            yield StoredTensor(entry.name, (experts, outputs, inputs), file, entry, transposed=True)
        else:
            yield StoredTensor(entry.name, entry.shape, file, entry)


def _split_qkv(
    file: TensorFile, entry: TensorEntry, config: ModelConfig, layer: str, kind: str
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


def stored_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape in which Hugging Face's layout stores a tensor of the model."""
    return (*shape[:-2], shape[-1], shape[-2]) if is_stored_transposed(name) else shape


def is_stored_transposed(name: str) -> bool:
    """Whether Hugging Face's layout stores a tensor with the last two dimensions swapped."""
    return _EXPERT_MATRIX.fullmatch(name) is not None
