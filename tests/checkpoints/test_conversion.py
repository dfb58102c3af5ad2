"""Conversion: every route preserves all bytes, and a target appears once it is complete or not at all.

Run as a script, this file is one process of `test_processes_restore_their_own_shards`.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors import SafetensorError

from gptoss_jax.checkpoints import writer
from gptoss_jax.checkpoints.conversion import compare, convert, parse_size
from gptoss_jax.checkpoints.layouts import SINGLE_FILE
from gptoss_jax.checkpoints.loading import load_model
from gptoss_jax.checkpoints.reader import open_checkpoint
from gptoss_jax.checkpoints.writer import save_weights
from gptoss_jax.commands.running import run_command
from gptoss_jax.convert import main
from gptoss_jax.errors import CheckpointError
from gptoss_jax.model.config import ModelConfig
from gptoss_jax.model.gpt_oss import weight_specs
from gptoss_jax.model.weights import WeightSpec, random_creator
from tests.checkpoints.files import CONFIG, PLAIN_CONFIG, write_openai
from tests.quick import QUICK


def write(directory: Path, config: ModelConfig) -> Path:
    """Write random weights, bfloat16 with one float32 and one float16 tensor, and the files beside them."""
    save_weights(directory, config, weight_specs(config), random_creator(jax.random.key(0)))
    tensors = load(directory)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.float32)
    tensors["model.layers.0.self_attn.sinks"] = tensors["model.layers.0.self_attn.sinks"].astype(np.float16)
    safetensors.numpy.save_file(tensors, directory / SINGLE_FILE)
    (directory / "tokenizer.json").write_text('{"a": "token"}')
    (directory / "generation_config.json").write_text("{}")
    return directory


def load(directory: Path) -> dict[str, np.ndarray]:
    """All tensors of a safetensors checkpoint, read by the safetensors library."""
    tensors: dict[str, np.ndarray] = {}
    for file in directory.glob("*.safetensors"):
        tensors |= safetensors.numpy.load_file(file)
    return tensors


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape), name
        assert found[name].tobytes() == array.tobytes(), name


@pytest.fixture(scope="module", params=["mxfp4", "plain"])
def formats(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same weights in every layout."""
    root = tmp_path_factory.mktemp(request.param)
    paths = {"hf": write(root / "hf", CONFIG if request.param == "mxfp4" else PLAIN_CONFIG)}
    paths["openai"] = write_openai(paths["hf"], root / "openai")
    paths["orbax"] = root / "orbax"
    convert(paths["hf"], paths["orbax"], "orbax", verify=True)
    return paths


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("packed")
    paths = {"hf": write(root / "hf", CONFIG), "orbax": root / "orbax"}
    convert(paths["hf"], paths["orbax"], "orbax")
    return paths


def command(*arguments: object, setup: str = "") -> subprocess.CompletedProcess[str]:
    script = f"import runpy, sys\n{setup}\nrunpy.run_module('tools.convert', run_name='__main__', alter_sys=True)"
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True, check=False
    )


# Routes.


@pytest.mark.parametrize("source", ["hf", "openai", "orbax"])
@pytest.mark.parametrize("to", ["hf", "orbax"])
def test_every_byte_is_preserved(formats: dict[str, Path], tmp_path: Path, source: str, to: Any) -> None:
    convert(formats[source], tmp_path / "out", to, verify=True, max_shard_bytes=60_000)
    back = tmp_path / "out"
    if to == "orbax":
        back = tmp_path / "back"
        convert(tmp_path / "out", back, "hf")
    elif source != "openai":
        assert len(list(back.glob("*.safetensors"))) > 1
    assert_same(load(back), load(formats["hf"]))
    assert (back / "tokenizer.json").read_bytes() == (formats["hf"] / "tokenizer.json").read_bytes()
    if source == "openai":
        assert ModelConfig.from_file(back) == open_checkpoint(formats["openai"]).config
    else:
        assert (back / "config.json").read_bytes() == (formats["hf"] / "config.json").read_bytes()
        assert (back / "generation_config.json").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_every_format_loads_as_the_same_model(formats: dict[str, Path]) -> None:
    tokens = jnp.arange(6)[None]
    expected = load_model(formats["hf"], dtype="float32")(tokens)
    for layout in ("openai", "orbax"):
        np.testing.assert_array_equal(load_model(formats[layout], dtype="float32")(tokens), expected)


def test_orbax_itself_restores_into_shardings(packed: dict[str, Path]) -> None:
    import orbax.checkpoint as ocp

    expected = load(packed["hf"])
    mesh = Mesh(np.array(jax.devices()[:2]), ("x",))
    args = {
        name: ocp.ArrayRestoreArgs(sharding=NamedSharding(mesh, PartitionSpec("x")), dtype=array.dtype)
        for name, array in expected.items()
    }
    restored = ocp.PyTreeCheckpointer().restore(packed["orbax"], restore_args=args)
    assert_same({name: np.asarray(array) for name, array in restored.items()}, expected)


@pytest.mark.parametrize("options", [{}, {"use_ocdbt": False}, {"use_zarr3": True}])
def test_trees_written_by_orbax_load(packed: dict[str, Path], tmp_path: Path, options: Any) -> None:
    import orbax.checkpoint as ocp

    tree: dict[str, Any] = {}
    for name, array in load(packed["hf"]).items():
        *path, leaf = name.split(".")
        branch = tree
        for key in path:
            branch = branch.setdefault(key, {})
        branch[leaf] = jnp.asarray(array)
    directory = tmp_path / "orbax"
    ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**options)).save(directory, args=ocp.args.PyTreeSave(tree))
    shutil.copy(packed["hf"] / "config.json", directory)
    with open_checkpoint(packed["hf"]) as source:
        compare(source, directory)


# Verification.


def test_verify_finds_a_changed_byte(packed: dict[str, Path], tmp_path: Path) -> None:
    with open_checkpoint(packed["hf"]) as source:
        for layout in ("hf", "orbax"):
            copy = Path(shutil.copytree(packed[layout], tmp_path / layout))
            compare(source, copy)
            data = load(copy)["lm_head.weight"] if layout == "hf" else source.read("lm_head.weight")
            needle = data.tobytes()[1000:1064]
            for file in copy.rglob("*"):
                content = bytearray(file.read_bytes()) if file.is_file() else bytearray()
                if (at := content.find(needle)) >= 0:
                    content[at] ^= 1
                    file.write_bytes(content)
            with pytest.raises(CheckpointError, match=r"lm_head\.weight: differs from .* at byte 1000"):
                compare(source, copy)
    result = command(packed["hf"], tmp_path / "hf", "--verify-only")
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert "lm_head.weight: differs" in result.stderr


def test_target_that_fails_verification_does_not_appear(
    packed: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gptoss_jax.checkpoints import conversion as module

    original = module._write

    def corrupting(*arguments: Any) -> Path:
        written = original(*arguments)
        file = written / SINGLE_FILE
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
        return written

    monkeypatch.setattr(module, "_write", corrupting)
    with pytest.raises(CheckpointError, match=f"^{re.escape(str(tmp_path / 'out'))}.*differs"):
        convert(packed["hf"], tmp_path / "out", "hf", verify=True)
    assert list(tmp_path.iterdir()) == []


# Interruptions and errors.


@pytest.mark.parametrize("to", ["hf", "orbax"])
def test_killed_at_a_given_read(packed: dict[str, Path], tmp_path: Path, to: str) -> None:
    """Kills the process at its n-th read, independently of the machine's speed."""
    script = (
        "import os, signal, sys\n"
        "from gptoss_jax.checkpoints import conversion as module\n"
        "read = module.Checkpoint.read_into\n"
        "left = int(sys.argv[4])\n"
        "def counted(*arguments):\n"
        "    global left\n"
        "    left -= 1\n"
        "    if not left: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    read(*arguments)\n"
        "module.Checkpoint.read_into = counted\n"
        "module.convert(*sys.argv[1:4], verify=True)\n"
    )
    target = tmp_path / "deep" / "out"
    # In the middle of writing 43 tensors, and of verifying them.
    for moment in (20, 70) if to == "hf" else (40,):
        arguments = [sys.executable, "-c", script, str(packed["hf"]), str(target), to, str(moment)]
        assert subprocess.run(arguments, check=False).returncode == -signal.SIGKILL
        assert not target.exists()
        assert len(list(target.parent.iterdir())) == 1
    convert(packed["hf"], target, to, verify=True)  # type: ignore[arg-type]
    assert [path.name for path in target.parent.iterdir()] == ["out"]


def test_killed_at_any_time(packed: dict[str, Path], tmp_path: Path) -> None:
    target = tmp_path / "out"
    arguments = [sys.executable, "-m", "tools.convert", str(packed["hf"]), str(target), "--to", "hf"]
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list(tmp_path.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.0005)
    process.kill()
    process.wait()
    if target.exists():  # The conversion ended before the signal.
        assert_same(load(target), load(packed["hf"]))
    else:
        convert(packed["hf"], target, "hf", verify=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_running_process_keeps_its_partial_directory(packed: dict[str, Path], tmp_path: Path) -> None:
    from gptoss_jax.checkpoints.new_directory import new_directory

    with new_directory(tmp_path / "out") as partial:
        with new_directory(tmp_path / "other"):
            pass
        convert(packed["hf"], tmp_path / "out", "hf")
        assert partial.exists()
        shutil.rmtree(tmp_path / "out")


@pytest.mark.parametrize("to", ["hf", "orbax"])
def test_file_size_limit(packed: dict[str, Path], tmp_path: Path, to: str) -> None:
    # Bytecode is not written either: the limit would truncate it, and Python does not check the written size.
    limit = (
        "import resource, signal, sys\n"
        "sys.dont_write_bytecode = True\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, 5_000))"
    )
    result = command(packed["hf"], tmp_path / "out", "--to", to, setup=limit)
    assert result.returncode == 2
    assert result.stderr == f"error: {tmp_path / 'out'}: cannot be written: File too large\n"
    assert list(tmp_path.iterdir()) == []


def test_disk_full(packed: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def save_file(*_: object, **__: object) -> None:
        # What the library raises where a file may not grow, with a full disk's number.
        text = f"I/O error: {os.strerror(errno.ENOSPC)} (os error {errno.ENOSPC})"
        raise SafetensorError(f"Error while serializing: {text}")

    with monkeypatch.context() as patch:
        patch.setattr(writer, "save_file", save_file)
        with pytest.raises(CheckpointError, match="out: cannot be written: No space left on device"):
            convert(packed["hf"], tmp_path / "out", "hf")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 7, 3))  # type: ignore[attr-defined]
    with pytest.raises(CheckpointError, match="bytes are needed, the disk has 3 left"):
        convert(packed["hf"], tmp_path / "out", "orbax")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("to", ["hf", "orbax"])
def test_permission_denied(
    packed: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: Any
) -> None:
    mkdir = Path.mkdir

    def denied(self: Path, *arguments: Any, **options: Any) -> None:
        if ".partial-" in self.name:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))
        mkdir(self, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", denied)
    with pytest.raises(CheckpointError, match="out: cannot be written: Permission denied"):
        convert(packed["hf"], tmp_path / "out", to)


def test_target_in_use_and_wrong_flags(
    packed: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    source = packed["hf"]
    for arguments, message in (
        ((source, tmp_path, "--to", "hf"), "found it in use"),
        ((source, tmp_path / "file", "--to", "hf"), "found it in use"),
        ((source, tmp_path / "file" / "out", "--to", "hf"), "cannot be written"),
        ((tmp_path / "none", tmp_path / "out", "--to", "hf"), "no such directory"),
        ((source, tmp_path / "out"), "--to: expected"),
        ((source, tmp_path / "out", "--to", "hf", "--verify-only"), "--to: expected"),
        ((source, tmp_path / "out", "--to", "orbax", "--max-shard-size", "5GB"), "--max-shard-size: only"),
        ((source, tmp_path / "out", "--to", "hf", "--max-shard-size", "big"), "--max-shard-size: expected"),
    ):
        monkeypatch.setattr(sys, "argv", ["convert", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            run_command(main)
        assert caught.value.code == 2
        error = capsys.readouterr().err
        assert message in error
        assert len(error.splitlines()) == 1, error
    assert not (tmp_path / "out").exists()


def test_help_is_fast_and_success_is_printed(packed: dict[str, Path], tmp_path: Path) -> None:
    start = time.perf_counter()
    result = command("--help")
    assert result.returncode == 0
    assert "--verify-only" in result.stdout
    assert time.perf_counter() - start < 1
    result = command(packed["orbax"], tmp_path / "out", "--to", "hf", "--verify", "--progress")
    assert result.returncode == 0, result.stderr
    assert re.fullmatch(r".*out: [\d,]+ bytes written and verified\n", result.stdout)
    assert "Converting" in result.stderr
    assert "Verifying" in result.stderr


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("1.5 kb", 1500), ("7", 7), ("100b", 100), ("2TB", 2 * 10**12)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["GB", "0", "-1GB", "1e400", "nan", "5GBB", "5XB", "inf"])
def test_wrong_sizes(text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(text)):
        parse_size(text)


# Orbax directories that are wrong.


def damage(directory: Path, kind: str) -> None:
    metadata = directory / "_METADATA"
    if kind == "no metadata":
        metadata.unlink()
    elif kind == "metadata is no JSON":
        metadata.write_bytes(metadata.read_bytes()[:100])
    elif kind == "metadata is empty":
        metadata.write_text("{}")
    elif kind == "metadata is a list":
        metadata.write_text("[]")
    elif kind == "no manifest":
        (directory / "manifest.ocdbt").unlink()
    elif kind == "manifest is noise":
        (directory / "manifest.ocdbt").write_bytes(b"noise" * 20)
    elif kind == "no index":
        shutil.rmtree(directory / "d")
    elif kind == "no data":
        shutil.rmtree(directory / "ocdbt.process_0")
    elif kind == "data cut short":
        for file in (directory / "ocdbt.process_0" / "d").iterdir():
            os.truncate(file, file.stat().st_size // 2)


@pytest.mark.parametrize(
    "kind",
    [
        "no metadata",
        "metadata is no JSON",
        "metadata is empty",
        "metadata is a list",
        "no manifest",
        "manifest is noise",
        "no index",
        "no data",
        "data cut short",
    ],
)
def test_damaged_orbax_is_reported_in_one_line(packed: dict[str, Path], tmp_path: Path, kind: str) -> None:
    directory = Path(shutil.copytree(packed["orbax"], tmp_path / "orbax"))
    damage(directory, kind)
    with pytest.raises(CheckpointError) as caught:
        load_model(directory)
    message = str(caught.value)
    assert message.startswith(str(directory))
    assert message.isprintable()


def save_changed(packed: dict[str, Path], directory: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    import orbax.checkpoint as ocp

    tensors: dict[str, Any] = load(packed["hf"])
    change(tensors)
    ocp.PyTreeCheckpointer().save(directory, tensors)
    shutil.copy(packed["hf"] / "config.json", directory)
    return directory


EXPERTS = "model.layers.1.mlp.experts."


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda t: t.pop("lm_head.weight"), r"lm_head\.weight: missing tensor"),
        (lambda t: t.update(extra=np.zeros(2, np.float32)), "extra: unknown tensor"),
        (lambda t: t.update(extra="text"), "extra: expected an array"),
        (lambda t: t.update({"lm_head.weight": np.zeros((3, 64), np.float32)}), r"expected shape \[128, 64\]"),
        (lambda t: t.update({"lm_head.weight": np.zeros((128, 64), np.int32)}), "expected dtype BF16 or F32"),
        (
            lambda t: t[EXPERTS + "down_proj_scales"].__setitem__((1, 2, 0), 255),
            r"found 255 \(NaN\) at \[1, 2, 0\]",
        ),
        (lambda t: t.pop(EXPERTS + "down_proj_scales"), "down_proj_scales: missing tensor"),
    ],
)
def test_wrong_tensors_in_orbax(
    packed: dict[str, Path], tmp_path: Path, change: Callable[[dict[str, Any]], None], expected: str
) -> None:
    directory = save_changed(packed, tmp_path / "orbax", change)
    with pytest.raises(CheckpointError, match=expected) as caught:
        load_model(directory)
    assert str(caught.value).isprintable()


def test_both_layouts_in_one_directory(packed: dict[str, Path], tmp_path: Path) -> None:
    directory = Path(shutil.copytree(packed["orbax"], tmp_path / "orbax"))
    shutil.copy(packed["hf"] / SINGLE_FILE, directory)
    with pytest.raises(CheckpointError, match=r"found both \*\.safetensors and an Orbax checkpoint"):
        open_checkpoint(directory)


# Shards.


def placed(mesh: Mesh) -> Callable[[WeightSpec], NamedSharding]:
    axes = {"experts": "expert", "expert_gate_up": "tensor", "heads": "tensor", "vocab": "tensor"}
    return lambda spec: NamedSharding(mesh, PartitionSpec(*(axes.get(axis or "") for axis in spec.axes)))


def one_process(address: str, process: int, directory: str) -> None:
    """One of two processes with two devices each."""
    jax.distributed.initialize(address, num_processes=2, process_id=process)
    mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("expert", "tensor"))
    with open_checkpoint(directory) as checkpoint:
        specs = weight_specs(checkpoint.config)
        checkpoint.validate(specs)
        create = checkpoint.creator(sharding=placed(mesh))
        for spec in specs:
            names = [f"{spec.name}_blocks", f"{spec.name}_scales"] if spec.packed else [spec.name]
            before = checkpoint.bytes_read
            weight = create(spec)
            read = checkpoint.bytes_read - before
            for name, array in zip(names, jax.tree.leaves(weight), strict=True):
                whole = checkpoint.read(name).astype(array.dtype)
                for shard in array.addressable_shards:
                    assert np.asarray(shard.data).tobytes() == whole[shard.index].tobytes()
            if spec.packed:
                assert read == sum(leaf.nbytes for leaf in jax.tree.leaves(weight)) // 2
    print("loaded")


def test_processes_restore_their_own_shards(packed: dict[str, Path]) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count=2 {QUICK}", "JAX_PLATFORMS": "cpu"}
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, address, str(i), str(packed["orbax"])],
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
