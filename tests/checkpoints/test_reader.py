"""Reading checkpoints: all layouts give the same tensors, only requested bytes are read, and errors name the fault.

Run as a script, this file is the processes that some tests start.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh

from gptoss_jax.checkpoints import safetensors_file
from gptoss_jax.checkpoints.conversion import convert
from gptoss_jax.checkpoints.layouts import INDEX_FILE, SINGLE_FILE
from gptoss_jax.checkpoints.reader import open_checkpoint
from gptoss_jax.checkpoints.safetensors_file import TensorInfo
from gptoss_jax.checkpoints.writer import save_safetensors, save_weights, stored_tensors
from gptoss_jax.errors import CheckpointError
from gptoss_jax.model.config import ModelConfig
from gptoss_jax.model.gpt_oss import GptOss, weight_specs
from gptoss_jax.model.mxfp4 import MXFP4Tensor, dequantize
from gptoss_jax.model.weights import WeightSpec, random_creator
from tests.checkpoints.files import CONFIG, PLAIN_CONFIG, assert_padded, padded, sharding_of, write_openai
from tests.quick import QUICK

GOLDEN = Path(__file__).parents[1] / "golden" / "P1"
LAYOUTS = ("single", "sharded", "plain", "openai", "openai_plain")


def write(directory: Path, layout: str) -> Path:
    """Write a checkpoint of CONFIG with random weights in one of LAYOUTS."""
    config = PLAIN_CONFIG if layout.endswith("plain") else CONFIG
    create = random_creator(jax.random.key(0))
    max_shard_bytes = 100_000 if layout == "sharded" else 1 << 30
    hugging_face = directory.with_name(directory.name + "-hf") if layout.startswith("openai") else directory
    save_weights(hugging_face, config, weight_specs(config), create, max_shard_bytes=max_shard_bytes)
    if hugging_face != directory:
        write_openai(hugging_face, directory, np.float32)
    return directory


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    return {layout: write(root / layout, layout) for layout in LAYOUTS}


@pytest.fixture
def copy(checkpoints: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    """Copies a checkpoint, for tests that damage it."""
    return lambda layout: Path(shutil.copytree(checkpoints[layout], tmp_path / layout))


def rewrite(directory: Path, change: Callable[[dict[str, np.ndarray]], None]) -> None:
    file = directory / SINGLE_FILE
    tensors = safetensors.numpy.load_file(file)
    change(tensors)
    safetensors.numpy.save_file(tensors, file)


def refused(directory: Path, config: ModelConfig = CONFIG, match: str | None = None) -> str:
    """The one-line error of opening and validating a checkpoint, which may read only headers."""
    with pytest.raises(CheckpointError, match=match) as caught:
        open_checkpoint(directory).validate(weight_specs(config))
    message = str(caught.value)
    assert message.isprintable()
    return message


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_read_back_what_was_written(checkpoints: dict[str, Path], layout: str) -> None:
    config = PLAIN_CONFIG if layout.endswith("plain") else CONFIG
    checkpoint = open_checkpoint(checkpoints[layout])
    assert checkpoint.config.quantization == config.quantization
    assert checkpoint.config.num_local_experts == config.num_local_experts
    specs = weight_specs(config)
    checkpoint.validate(specs)
    create, expected_of = checkpoint.creator("bfloat16"), random_creator(jax.random.key(0))
    for spec in specs:
        weight, expected = create(spec), expected_of(spec)
        assert jax.tree.structure(weight) == jax.tree.structure(expected)
        for found, wanted in zip(jax.tree.leaves(weight), jax.tree.leaves(expected), strict=True):
            assert found.dtype == wanted.dtype
            np.testing.assert_array_equal(np.asarray(found), np.asarray(wanted), err_msg=spec.name)


def test_float32_is_an_exact_upcast(checkpoints: dict[str, Path]) -> None:
    checkpoint = open_checkpoint(checkpoints["plain"])
    create = checkpoint.creator(jnp.float32)
    for spec in weight_specs(PLAIN_CONFIG):
        weight = create(spec)
        assert isinstance(weight, jax.Array)
        assert weight.dtype == jnp.float32
        np.testing.assert_array_equal(np.asarray(weight), checkpoint.read(spec.name).astype(np.float32))


def test_golden_checkpoint_reads_as_the_safetensors_library_does() -> None:
    checkpoint = open_checkpoint(GOLDEN)
    checkpoint.validate(weight_specs(checkpoint.config))
    expected = safetensors.numpy.load_file(GOLDEN / "model-00001-of-00001.safetensors")
    assert expected.keys() == checkpoint.tensors.keys()
    for name, array in expected.items():
        found = checkpoint.read(name)
        assert found.dtype == array.dtype
        np.testing.assert_array_equal(found, array)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("gap", [0, 100, 1 << 16])
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_slices_are_slices_of_the_whole(
    checkpoints: dict[str, Path], layout: str, gap: int, data: st.DataObject
) -> None:
    with pytest.MonkeyPatch.context() as patch, open_checkpoint(checkpoints[layout]) as checkpoint:
        patch.setattr(safetensors_file, "MAX_GAP_BYTES", gap)
        patch.setattr(safetensors_file, "CHUNK_BYTES", 1000)
        name = data.draw(st.sampled_from(sorted(checkpoint.tensors)))
        shape = checkpoint.tensors[name].shape
        bound = [st.none() | st.integers(-size, size) for size in shape]
        index = tuple(slice(data.draw(b), data.draw(b)) for b in bound)
        index = index[: data.draw(st.integers(0, len(index)))]
        np.testing.assert_array_equal(checkpoint.read(name, index), checkpoint.read(name)[index])


@pytest.mark.parametrize(
    ("layout", "name", "index"),
    [
        ("single", "model.layers.0.mlp.experts.gate_up_proj_blocks", (slice(1, 2),)),
        ("single", "model.layers.1.mlp.experts.gate_up_proj_blocks", (slice(2, 4), slice(50, 100))),
        ("single", "model.layers.1.mlp.experts.down_proj_blocks", (slice(0, 4), slice(0, 64), slice(1, 2))),
        ("plain", "model.layers.1.mlp.experts.gate_up_proj", (slice(0, 2), slice(5, 9))),
        ("openai", "model.layers.1.self_attn.k_proj.weight", (slice(3, 9),)),
    ],
)
def test_only_the_bytes_of_a_slice_are_read(
    checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch, layout: str, name: str, index: tuple[slice]
) -> None:
    monkeypatch.setattr(safetensors_file, "MAX_GAP_BYTES", 0)
    checkpoint = open_checkpoint(checkpoints[layout])
    before = checkpoint.bytes_read
    found = checkpoint.read(name, index)
    assert checkpoint.bytes_read - before == found.nbytes


def test_small_gaps_are_read_through_in_one_call(
    checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(checkpoints["single"])
    calls: list[int] = []
    monkeypatch.setattr(checkpoint.files[0], "on_read", calls.append)
    name = "model.layers.1.mlp.experts.down_proj_blocks"
    checkpoint.read(name, (slice(1, 3), slice(None), slice(1, 2)))
    assert calls == [checkpoint.tensors[name].nbytes // 2]


def test_opening_reads_headers_only(checkpoints: dict[str, Path]) -> None:
    checkpoint = open_checkpoint(checkpoints["sharded"])
    checkpoint.validate(weight_specs(CONFIG))
    assert len(checkpoint.files) == 3
    headers = [int.from_bytes(f.path.read_bytes()[:8], "little") + 8 for f in checkpoint.files]
    assert checkpoint.bytes_read == sum(headers)


def test_creator_reads_every_byte_once(checkpoints: dict[str, Path], capsys: pytest.CaptureFixture) -> None:
    checkpoint = open_checkpoint(checkpoints["sharded"])
    create = checkpoint.creator(progress=True)
    for spec in weight_specs(CONFIG):
        create(spec)
    assert checkpoint.bytes_read == sum(f.path.stat().st_size for f in checkpoint.files)
    shown = capsys.readouterr()
    assert "100%" in shown.err
    assert not shown.out


def test_large_tensors_are_read_in_parallel_into_one_buffer(tmp_path: Path) -> None:
    size = 3 * safetensors_file.CHUNK_BYTES + 12345
    array = np.arange(size, dtype=np.uint32).astype(np.uint8)
    info = TensorInfo("x", "U8", array.shape)
    save_safetensors(tmp_path / "large", CONFIG, [info], iter([("x", array)]))
    checkpoint = open_checkpoint(tmp_path / "large")
    calls: list[int] = []
    checkpoint.files[0].on_read = calls.append
    found = checkpoint.read("x")
    assert sorted(calls) == [12345] + [safetensors_file.CHUNK_BYTES] * 3
    assert found.ctypes.data % 64 == 0
    np.testing.assert_array_equal(found, array)


def test_host_memory_holds_one_tensor(tmp_path: Path) -> None:
    shape = (8192, 1024)
    specs = [WeightSpec(f"layer.{i}", shape, (None, None)) for i in range(6)]
    zeros = jnp.zeros(shape, jnp.bfloat16)
    save_weights(tmp_path / "out", PLAIN_CONFIG, specs, lambda spec: zeros)
    checkpoint = open_checkpoint(tmp_path / "out")
    create = checkpoint.creator("bfloat16")
    tracemalloc.start()
    try:
        for spec in specs:
            jax.tree.leaves(create(spec))[0].delete()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # On the CPU, JAX frees a deleted array's memory only when the next one is created, hence two.
    assert zeros.nbytes <= peak < 2.1 * zeros.nbytes


def test_golden_model_loads() -> None:
    checkpoint = open_checkpoint(GOLDEN)
    model = GptOss(checkpoint.config, checkpoint.creator("float32"))
    experts = model.layers[0].mlp.gate_up_proj[...]
    assert isinstance(experts, MXFP4Tensor)
    assert dequantize(experts).shape == (8, 128, 64)


# Errors.

EXPERTS = "model.layers.1.mlp.experts."


def test_missing_tensor(copy: Callable[[str], Path]) -> None:
    directory = copy("single")
    rewrite(directory, lambda tensors: tensors.pop("model.layers.1.self_attn.sinks"))
    assert "model.layers.1.self_attn.sinks: missing tensor" in refused(directory)


def test_unknown_tensor(copy: Callable[[str], Path]) -> None:
    directory = copy("single")
    rewrite(directory, lambda tensors: tensors.update({"model.layers.2.norm": np.zeros(3)}))
    assert "model.layers.2.norm: unknown tensor" in refused(directory)


def test_rotary_buffers_of_other_exporters_are_ignored(copy: Callable[[str], Path]) -> None:
    directory = copy("single")
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    rewrite(directory, lambda tensors: tensors.update({name: np.zeros(16, np.float32)}))
    open_checkpoint(directory).validate(weight_specs(CONFIG))


@pytest.mark.parametrize(
    ("layout", "name", "array", "expected"),
    [
        ("single", "model.norm.weight", np.zeros(65, ml_dtypes.bfloat16), r"shape \[64\], found \[65\]"),
        ("single", "model.norm.weight", np.zeros(64, np.int32), "dtype BF16 or F32 or F16, found I32"),
        ("single", EXPERTS + "down_proj_scales", np.zeros((4, 64, 3), np.int8), "dtype U8, found I8"),
        ("single", EXPERTS + "down_proj_blocks", np.zeros((4, 64, 3, 32), np.uint8), r"found \[4, 64, 3, 32\]"),
        (
            "plain",
            EXPERTS + "gate_up_proj",
            np.zeros((4, 192, 64), ml_dtypes.bfloat16),
            r"shape \[4, 64, 192\], found \[4, 192, 64\]",
        ),
        ("openai", "block.1.attn.qkv.weight", np.zeros((255, 64), ml_dtypes.bfloat16), "256 rows"),
        ("openai", "block.1.attn.qkv.bias", np.zeros((256, 1), ml_dtypes.bfloat16), r"found \[128, 1\]"),
    ],
)
def test_wrong_tensor(
    copy: Callable[[str], Path], layout: str, name: str, array: np.ndarray, expected: str
) -> None:
    directory = copy(layout)
    rewrite(directory, lambda tensors: tensors.update({name: array}))
    message = refused(directory, PLAIN_CONFIG if layout == "plain" else CONFIG, expected)
    assert name in message
    assert SINGLE_FILE in message


@pytest.mark.parametrize("layout", ["single", "openai"])
def test_nan_scale_is_refused_when_read(copy: Callable[[str], Path], layout: str) -> None:
    directory = copy(layout)
    name = "model.layers.1.mlp.experts.gate_up_proj_scales"
    stored = name if layout == "single" else "block.1.mlp.mlp1_weight.scales"
    rewrite(directory, lambda tensors: tensors[stored].__setitem__((2, 7, 1), 255))
    checkpoint = open_checkpoint(directory)
    create = checkpoint.creator()
    (spec,) = (spec for spec in weight_specs(CONFIG) if spec.name == name.removesuffix("_scales"))
    with pytest.raises(CheckpointError, match=r"255 \(NaN\) at \[2, 7, 1\]") as caught:
        create(spec)
    assert stored in str(caught.value)
    with pytest.raises(CheckpointError, match=r"at \[2, 7, 1\]"):
        checkpoint.read(name, (slice(1, 3), slice(7, 8)))
    checkpoint.read(name, (slice(0, 2),))


def test_quantization_that_contradicts_the_config(copy: Callable[[str], Path]) -> None:
    packed, plain = copy("single"), copy("plain")
    message = (
        "expected a plain model.layers.0.mlp.experts.gate_up_proj, because config.json has no quantization_config"
    )
    assert message in refused(packed, PLAIN_CONFIG)
    assert "expected MXFP4 (_blocks and _scales) according to config.json's" in refused(plain, CONFIG)


def test_tensor_twice_over_shards_without_index(copy: Callable[[str], Path]) -> None:
    directory = copy("single")
    (directory / SINGLE_FILE).rename(directory / "a.safetensors")
    open_checkpoint(directory).validate(weight_specs(CONFIG))
    extra = {"model.norm.weight": np.zeros(64, ml_dtypes.bfloat16)}
    safetensors.numpy.save_file(extra, directory / "b.safetensors")
    assert "model.norm.weight: found twice, also in a.safetensors" in refused(directory)


def edit_index(directory: Path, change: Callable[[dict[str, str]], None]) -> None:
    index = directory / INDEX_FILE
    fields = json.loads(index.read_text())
    change(fields["weight_map"])
    index.write_text(json.dumps(fields))


def test_index_that_disagrees_with_its_shards(copy: Callable[[str], Path]) -> None:
    directory = copy("sharded")
    norm = "model.norm.weight"
    first = min(file.name for file in directory.glob("*.safetensors"))
    edit_index(directory, lambda weight_map: weight_map.update({norm: first}))
    assert f"{norm}: expected in {first}, which does not hold it" in refused(directory)
    edit_index(directory, lambda weight_map: weight_map.pop(norm))
    assert f"{norm}: unknown tensor, not listed in {INDEX_FILE}" in refused(directory)


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/x.safetensors", "a/x.safetensors", "x\n.safetensors", ".safetensors", 3]
)
def test_index_cannot_name_files_elsewhere(copy: Callable[[str], Path], name: Any) -> None:
    directory = copy("sharded")
    edit_index(directory, lambda weight_map: weight_map.update({"model.norm.weight": name}))
    assert "model.norm.weight: expected a plain *.safetensors name" in refused(directory)


def test_names_that_are_too_long_are_one_line(copy: Callable[[str], Path]) -> None:
    directory = copy("sharded")
    name = "x" * 300 + ".safetensors"
    edit_index(directory, lambda weight_map: weight_map.update({"model.norm.weight": name}))
    assert f"{name}: cannot be read: File name too long" in refused(directory)
    assert "no such directory" in refused(directory / ("x" * 300))
    assert "no such directory" in refused(directory / "x\0")


def test_files_may_be_links_as_in_the_hubs_cache(copy: Callable[[str], Path], tmp_path: Path) -> None:
    directory = copy("sharded")
    (tmp_path / "blobs").mkdir()
    for i, file in enumerate(directory.glob("*.safetensors")):
        file.rename(tmp_path / "blobs" / str(i))
        file.symlink_to(Path("..") / "blobs" / str(i))
    open_checkpoint(directory).validate(weight_specs(CONFIG))


def test_missing_files(copy: Callable[[str], Path], tmp_path: Path) -> None:
    directory = copy("sharded")
    next(directory.glob("*.safetensors")).unlink()
    refused(directory, match="no such file")
    refused(tmp_path / "nowhere", match="no such directory")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", match=r"config\.json: no such file")
    shutil.copy(directory / "config.json", tmp_path / "empty")
    refused(tmp_path / "empty", match=f"expected {SINGLE_FILE}, {INDEX_FILE} or an Orbax checkpoint, found none")
    os.mkfifo(tmp_path / "empty" / SINGLE_FILE)
    refused(tmp_path / "empty", match="not a regular file")


def test_single_file_beside_an_index(copy: Callable[[str], Path]) -> None:
    directory = copy("sharded")
    shutil.copy(next(directory.glob("*.safetensors")), directory / SINGLE_FILE)
    refused(directory, match="found both")


def test_file_truncated_after_it_was_opened(copy: Callable[[str], Path]) -> None:
    directory = copy("single")
    checkpoint = open_checkpoint(directory)
    os.truncate(directory / SINGLE_FILE, 10_000)
    last = max(checkpoint.tensors.values(), key=lambda tensor: tensor.entry.offset)
    with pytest.raises(CheckpointError, match="truncated while it was read"):
        checkpoint.read(last.name)


@settings(max_examples=100, deadline=None)
@given(content=st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
@example(content=b'{"weight_map": {"a": "b.safetensors"}, "weight_map": {}}')
@example(content=b'{"weight_map": []}')
def test_broken_index_is_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    directory = tmp_path_factory.getbasetemp() / "fuzz-index"
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(CONFIG.to_dict()))
    (directory / INDEX_FILE).write_bytes(content)
    assert INDEX_FILE in refused(directory)


def test_byte_order_mark_of_a_config_is_ignored(tmp_path: Path) -> None:
    config = ModelConfig.from_file(GOLDEN)
    (tmp_path / "config.json").write_text((GOLDEN / "config.json").read_text(), encoding="utf-8-sig")
    assert ModelConfig.from_file(tmp_path) == config


# Writing.


@pytest.mark.parametrize("layout", ["single", "sharded", "plain"])
def test_the_library_reads_written_files(checkpoints: dict[str, Path], layout: str) -> None:
    checkpoint = open_checkpoint(checkpoints[layout])
    found: dict[str, np.ndarray] = {}
    for file in checkpoint.files:
        found |= safetensors.numpy.load_file(file.path)
    assert found.keys() == checkpoint.tensors.keys()
    for name, array in found.items():
        stored = array.swapaxes(1, 2) if checkpoint.tensors[name].transposed else array
        np.testing.assert_array_equal(checkpoint.read(name), stored)
    for tensor in checkpoint.tensors.values():
        assert tensor.entry.offset % safetensors_file.DTYPES[tensor.entry.dtype].itemsize == 0
    if layout == "sharded":
        assert all(file.path.stat().st_size < 110_000 for file in checkpoint.files)
        metadata = json.loads((checkpoints[layout] / INDEX_FILE).read_text())["metadata"]
        assert metadata["total_size"] == sum(tensor.nbytes for tensor in checkpoint.tensors.values())


def test_target_appears_only_when_complete(tmp_path: Path) -> None:
    table = [TensorInfo("a", "U8", (2,)), TensorInfo("b", "F32", (1,))]
    a, b = ("a", np.zeros(2, np.uint8)), ("b", np.zeros(1, np.float32))

    def fails() -> Iterator[tuple[str, np.ndarray]]:
        yield a
        raise KeyboardInterrupt

    target = tmp_path / "out"
    for arrays, error in (
        (fails(), KeyboardInterrupt),
        ([a], ValueError),
        ([a, a, b], ValueError),
        ([a, ("b", np.zeros(1))], ValueError),
        ([a, b, ("c", np.zeros(1))], ValueError),
    ):
        with pytest.raises(error):
            save_safetensors(target, CONFIG, table, arrays)
        assert list(tmp_path.iterdir()) == []
    target.mkdir()
    save_safetensors(target, CONFIG, table, [b, a])
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with pytest.raises(CheckpointError, match="found it in use"):
        save_safetensors(target, CONFIG, table, [b, a])


def test_stored_tensors_follow_the_layout() -> None:
    expected = safetensors.numpy.load_file(GOLDEN / "model-00001-of-00001.safetensors")
    table = stored_tensors(weight_specs(ModelConfig.from_file(GOLDEN)))
    assert {info.name: info.shape for info in table} == {name: a.shape for name, a in expected.items()}


# Padding.


@pytest.mark.parametrize("layout", ["single", "plain", "openai", "openai_plain", "orbax"])
def test_padding_reads_as_zeros(checkpoints: dict[str, Path], tmp_path: Path, layout: str) -> None:
    directory = checkpoints["single" if layout == "orbax" else layout]
    if layout == "orbax":
        convert(directory, tmp_path / "orbax", "orbax")
        directory = tmp_path / "orbax"
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("expert", "tensor"))
    with open_checkpoint(directory) as checkpoint:
        specs = weight_specs(checkpoint.config)
        checkpoint.validate([padded(spec) for spec in specs])
        whole = checkpoint.creator("float32")
        for create in (whole, checkpoint.creator("float32", sharding_of(mesh))):
            for spec in specs:
                found, expected = create(padded(spec)), whole(spec)
                assert_padded(found, expected)
                if spec.packed:
                    assert found.blocks.shape == (*padded(spec).groups_shape, 16)
                    values = np.array(dequantize(found))
                    assert np.isfinite(values).all()
                    assert_padded(values, dequantize(expected))
        name = specs[-1].name
        with pytest.raises(CheckpointError, match="expected shape"):
            checkpoint.validate(
                [*specs[:-1], dataclasses.replace(specs[-1], shape=(256, 64), stored_shape=(200, 64))]
            )
        padded_slice = checkpoint.read(name, (slice(100, 140), slice(60, 70)), shape=(150, 80))
        assert_padded(padded_slice, checkpoint.read(name)[100:, 60:])
        assert not checkpoint.read(name, (slice(140, 150),), shape=(150, 80)).any()


# Shards.


def one_process(address: str, process: int, directory: str) -> None:
    """One of two processes with two devices each, which load a checkpoint sharded over experts and rows."""
    safetensors_file.MAX_GAP_BYTES = 0
    jax.distributed.initialize(address, num_processes=2, process_id=process)
    checkpoint = open_checkpoint(directory)
    mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("expert", "tensor"))
    create = checkpoint.creator("bfloat16", sharding_of(mesh))
    for spec in weight_specs(checkpoint.config):
        before = checkpoint.bytes_read
        weight = create(spec)
        read = checkpoint.bytes_read - before
        names = [f"{spec.name}_blocks", f"{spec.name}_scales"] if spec.packed else [spec.name]
        for name, array in zip(names, jax.tree.leaves(weight), strict=True):
            for shard in array.addressable_shards:
                np.testing.assert_array_equal(np.asarray(shard.data), checkpoint.read(name)[shard.index])
        for name, array in zip(names, jax.tree.leaves(weight), strict=True):
            # Devices with the same shard share one read.
            own = {str(shard.index): shard.data.size for shard in array.addressable_shards}
            read -= sum(own.values()) * safetensors_file.DTYPES[checkpoint.tensors[name].entry.dtype].itemsize
        assert read == 0, spec.name
        if spec.name.endswith("_proj"):
            assert sum(own.values()) == array.size // 2, spec.name
    print("loaded")


@pytest.mark.parametrize(
    "layout", ["plain", *(pytest.param(layout, marks=pytest.mark.slow) for layout in ("single", "openai"))]
)
def test_each_process_reads_its_own_shards(checkpoints: dict[str, Path], layout: str) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count=2 {QUICK}", "JAX_PLATFORMS": "cpu"}
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, address, str(i), str(checkpoints[layout])],
            env=os.environ | flags,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(2)
    ]
    for process in processes:
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0, output
        assert re.search("^loaded", output, re.MULTILINE), output


if __name__ == "__main__":
    one_process(sys.argv[1], int(sys.argv[2]), sys.argv[3])
