"""Checks that all processes of a command have the same versions, flags and checkpoint."""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import os
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gptoss_jax.checkpoints.hub import resolve
from gptoss_jax.commands.flags import flag_name
from gptoss_jax.errors import CheckpointError
from sharding.processes import Cluster

PACKAGES = ("gptoss-jax", "jax", "jaxlib", "flax", "numpy", "libtpu", "jax-cuda13-plugin", "jax-rocm7-plugin")
SOURCES = ("gptoss_jax", "sharding", "pallas_kernels")
ENVIRONMENT = (
    "JAX_COMPILATION_CACHE_DIR",
    "JAX_DEFAULT_MATMUL_PRECISION",
    "JAX_ENABLE_X64",
    "JAX_PLATFORMS",
    "LIBTPU_INIT_ARGS",
    "XLA_FLAGS",
)

OWN = {
    "coordinator_address",
    "num_processes",
    "process_id",
    "cluster_secret_file",
    "model",
    "prompt",
    "prompt_file",
    "prompt_tokens",
    "batch",
    "output",
    "tools",
    "json_schema",
    "regex",
    "grammar",
    "json",
    "show_analysis",
    "hide_analysis",
}
"""Flags that may differ between processes: a process's identity, the model's path, and process 0's input and output."""

FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "model.safetensors.index.json",
    "_METADATA",
    "manifest.ocdbt",
)
"""Files of a checkpoint, besides the weights, that decide how it is read; the last two belong to Orbax."""

SAMPLES, SAMPLE_BYTES = 16, 4096


def versions() -> dict[str, Any]:
    """Versions of the packages that compute, a digest of the source, and the relevant environment variables."""
    facts: dict[str, Any] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            facts[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            facts[package] = None
    facts["gptoss-jax source"] = _source_digest()
    return facts | {name: os.environ.get(name) for name in ENVIRONMENT}


def _source_digest() -> str:
    """A digest of the Python source: two copies of one version may differ."""
    root, digest = Path(__file__).parents[2], hashlib.sha256()
    for path in sorted(path for package in SOURCES for path in (root / package).rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def flags_of(command: str, options: argparse.Namespace) -> dict[str, Any]:
    """The command and its flags, except those that may differ between processes."""
    facts = {
        flag_name(name): value if value is None or isinstance(value, int | list) else str(value)
        for name, value in vars(options).items()
        if name not in OWN
    }
    return {"command": command} | facts


def agree_on_checkpoint(cluster: Cluster, options: argparse.Namespace) -> None:
    """Check that all processes read the same checkpoint. Raises CheckpointError, and ClusterError if they differ."""
    from gptoss_jax.checkpoints.loading import EMBEDDED

    error: CheckpointError | None = None
    try:
        facts = checkpoint_facts(resolve(options.model or EMBEDDED))
    except CheckpointError as problem:
        error, facts = problem, {"checkpoint": f"({problem})"}
    cluster.agree(facts)
    if error is not None:
        raise error


def checkpoint_facts(path: Path) -> dict[str, Any]:
    """The fingerprint of each file of a checkpoint. Raises CheckpointError."""
    try:
        files = sorted(_checkpoint_files(path))
        return {f"checkpoint {file.relative_to(path)}": _fingerprint(file) for file in files}
    except OSError as error:
        raise CheckpointError(f"{error.filename}: {error.strerror}") from None


def _checkpoint_files(path: Path) -> Iterable[Path]:
    for pattern in ("*.safetensors", *FILES):
        yield from path.glob(pattern)


def _fingerprint(file: Path) -> str:
    """A file's size and digest; of a large file, the digest covers the header and evenly spaced samples."""
    size, digest = file.stat().st_size, hashlib.sha256()
    with file.open("rb") as stream:
        if size <= SAMPLES * SAMPLE_BYTES or file.suffix == ".json":
            digest.update(stream.read())
        else:
            header = stream.read(8)
            digest.update(stream.read(min(int.from_bytes(header, "little"), size)))
            for i in range(SAMPLES):
                stream.seek((size - SAMPLE_BYTES) * i // (SAMPLES - 1))
                digest.update(stream.read(SAMPLE_BYTES))
    return f"{size} bytes, digest {digest.hexdigest()[:12]}"
