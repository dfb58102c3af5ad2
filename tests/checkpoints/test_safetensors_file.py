"""Safetensors files: invalid headers are rejected with the name of the tensor, for any bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gptoss_jax.checkpoints import safetensors_file
from gptoss_jax.checkpoints.layouts import SINGLE_FILE
from gptoss_jax.checkpoints.reader import Checkpoint
from gptoss_jax.checkpoints.safetensors_file import SafetensorsFile, parse_header
from gptoss_jax.errors import CheckpointError
from tests.checkpoints.files import CONFIG


def header(fields: Any, data: int) -> tuple[bytes, int]:
    text = fields if isinstance(fields, bytes) else json.dumps(fields).encode()
    return text, 8 + len(text) + data


def entry(dtype: Any = "U8", shape: Any = (4,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    ("fields", "data", "expected"),
    [
        (b"[]", 0, "starting with"),
        (b"{", 0, "not valid JSON"),
        (b'{"a": "\xff"}', 0, "not valid JSON"),
        (b'{"a":' * 100_000, 0, "not valid JSON"),
        (b'{"a": ' + b"1" * 10_000 + b"}", 0, "not valid JSON"),
        (b'{"a": {}, "a": {}}', 0, "a: listed twice"),
        ({"__metadata__": {"a": 1}}, 0, "__metadata__"),
        ({"a": 3}, 0, "a: entry: expected an object, found 3"),
        ({"a": {}}, 0, "a: dtype"),
        ({"a": entry(dtype="F3")}, 4, "a: dtype: .* found 'F3'"),
        ({"a": entry(dtype=["U8"])}, 4, "a: dtype"),
        ({"a": entry(shape=[-4])}, 4, "a: shape"),
        ({"a": entry(shape=[4.0])}, 4, "a: shape"),
        ({"a": entry(shape=[True, 4])}, 4, "a: shape"),
        ({"a": entry(shape=[1] * 9)}, 4, "a: shape"),
        ({"a": entry(shape=[1 << 61, 0])}, 4, "a: shape: expected a tensor that can exist"),
        ({"a": entry(offsets=[0])}, 4, "a: data_offsets"),
        ({"a": entry(offsets=[4, 0])}, 4, "a: data_offsets: expected 4 bytes"),
        ({"a": entry(shape=[5])}, 4, "a: data_offsets: expected 5 bytes"),
        ({"a": entry()}, 3, r"at most the 3 bytes that the file holds \(truncated\?\)"),
        ({"a": entry()}, 5, "according to its header, found"),
        ({"a": entry(offsets=[1, 5])}, 5, "a: leaves a hole before it"),
        ({"a": entry(), "b": entry(offsets=[2, 6])}, 6, "b: overlaps"),
        ({"a\n": 3}, 0, r"'a\\n': entry"),
    ],
)
def test_invalid_header_is_rejected(fields: Any, data: int, expected: str) -> None:
    text, size = header(fields, data)
    with pytest.raises(CheckpointError, match=expected) as caught:
        parse_header(Path("x"), text, size)
    assert str(caught.value).isprintable()


def test_header_with_padding_scalars_and_empty_tensors() -> None:
    fields = {"b": entry(offsets=[0, 4]), "a": entry(shape=[0], offsets=[0, 0]), "s": entry("F32", [], [4, 8])}
    text, size = header(json.dumps(fields).encode() + b"   ", 8)
    assert {name: e.nbytes for name, e in parse_header(Path("x"), text, size).items()} == {"a": 0, "b": 4, "s": 4}


@pytest.mark.parametrize("content", [b"", b"1234567", b"\xff" * 20, (1).to_bytes(8, "little") + b"{}"])
def test_files_that_are_not_safetensors(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(CheckpointError):
        SafetensorsFile(tmp_path / "x")


def valid_file() -> bytes:
    arrays = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.arange(5, dtype=np.uint8),
        "block.0.mlp.mlp1_weight.scales": np.zeros((2, 2, 2), np.uint8),
        "model.layers.0.mlp.experts.down_proj": np.zeros((2, 1, 2), ml_dtypes.bfloat16),
    }
    return safetensors.numpy.save(arrays, metadata={"format": "pt"})


@st.composite
def mutations(draw: st.DrawFn) -> bytes:
    content = bytearray(valid_file())
    length = int.from_bytes(content[:8], "little") + 8
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, min(len(content), length)))
        piece = draw(
            st.binary(max_size=3) | st.sampled_from([b"0", b"9", b"-", b"null", b'"', b"}", b",[]", b" "])
        )
        keep = draw(st.integers(0, 3))
        content[at : at + keep] = piece
    if draw(st.booleans()):
        rest = content[8:]
        content[:8] = draw(st.integers(0, len(rest) + 1)).to_bytes(8, "little")
    return bytes(content[: draw(st.integers(0, len(content)) | st.just(len(content)))])


@st.composite
def wrong_fields(draw: st.DrawFn) -> bytes:
    """A valid file with wrong values in its header."""
    content = valid_file()
    length = int.from_bytes(content[:8], "little")
    fields = json.loads(content[8 : 8 + length])
    sizes = st.integers(-1, 24) | st.integers(0, 1 << 70)
    values = st.none() | st.booleans() | sizes | st.floats() | st.text(max_size=3) | st.lists(sizes, max_size=4)
    values |= st.sampled_from(sorted(safetensors_file.DTYPES)) | st.dictionaries(st.text(max_size=3), sizes)
    for _ in range(draw(st.integers(1, 2))):
        name = draw(st.sampled_from(sorted(fields)) | st.text(max_size=3))
        key = draw(st.none() | st.sampled_from(["dtype", "shape", "data_offsets"]))
        if key and isinstance(fields.get(name), dict):
            fields[name][key] = draw(values)
        else:
            fields[name] = draw(values)
    text = json.dumps(fields).encode()
    return len(text).to_bytes(8, "little") + text + content[8 + length :]


@settings(max_examples=400, deadline=None)
@given(content=mutations() | wrong_fields())
@example(content=valid_file())
def test_broken_files_are_rejected_or_read(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    directory = tmp_path_factory.getbasetemp() / "fuzz"
    directory.mkdir(exist_ok=True)
    (directory / SINGLE_FILE).write_bytes(content)
    message = ""
    try:
        with Checkpoint(directory, CONFIG, [directory / SINGLE_FILE]) as checkpoint:
            for name in checkpoint.tensors:
                checkpoint.read(name)
    except CheckpointError as error:
        message = str(error)
    assert message.isprintable()
    assert message or content[8:].startswith(b"{")
