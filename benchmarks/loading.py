"""Time and memory of loading a checkpoint in several processes that each hold a shard of the experts.

    python benchmarks/loading.py --layers 24 --processes 2

The benchmark writes a checkpoint of gpt-oss-20b's shapes with random bytes, starts the processes (with four CPU
devices each, connected by jax.distributed, experts sharded over the processes), and compares with reading the same
number of bytes from the page cache with the same number of threads. Memory is what the processes allocate; file pages,
which the system may evict at any time, are not counted.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import mmap
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

DEVICES = 4
ROOT = Path(__file__).resolve().parent.parent


def make_checkpoint(directory: Path, layers: int, config_file: Path) -> int:
    """Write a checkpoint of the config's shapes with this number of layers; returns its size in bytes."""
    from gptoss_jax.checkpoints.safetensors_file import DTYPES
    from gptoss_jax.checkpoints.writer import save_safetensors, stored_tensors
    from gptoss_jax.model.config import ModelConfig
    from gptoss_jax.model.gpt_oss import weight_specs

    config = ModelConfig.from_file(config_file)
    config = dataclasses.replace(config, num_hidden_layers=layers, layer_types=config.layer_types[:layers])
    tensors = stored_tensors(weight_specs(config))
    # Bytes below 127, so that no scale is NaN and no float infinite.
    noise = np.random.default_rng(0).integers(0, 127, 1 << 24, np.uint8)

    def arrays() -> Iterator[tuple[str, np.ndarray]]:
        for info in tensors:
            yield info.name, np.resize(noise, info.nbytes).view(DTYPES[info.dtype]).reshape(info.shape)

    save_safetensors(directory, config, tensors, arrays())
    return sum(info.nbytes for info in tensors)


def anonymous_bytes() -> int:
    """Resident bytes of this process without file pages."""
    status = Path("/proc/self/status").read_text()
    fields = {line.split(":")[0]: line.split()[1] for line in status.splitlines() if line.startswith("Rss")}
    return 1024 * (int(fields["RssAnon"]) + int(fields["RssShmem"]))


class Peak:
    """Records the maximum of `anonymous_bytes` during the block."""

    def __enter__(self) -> Peak:
        self.bytes = anonymous_bytes()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.01):
            self.bytes = max(self.bytes, anonymous_bytes())

    def __exit__(self, *exception: object) -> None:
        self._done.set()
        self._thread.join()


def one_process(directory: Path, address: str, processes: int, process: int, turns: int) -> None:
    """Load this process's shard, then read the same number of bytes directly; prints the figures as JSON."""
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    from gptoss_jax.checkpoints.reader import open_checkpoint
    from gptoss_jax.model.gpt_oss import GptOss, weight_specs
    from gptoss_jax.model.weights import WeightSpec

    jax.distributed.initialize(address, num_processes=processes, process_id=process)
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("expert",))

    def sharding(spec: WeightSpec) -> NamedSharding:
        # Embeddings and attention are sharded too, because replicas on CPU devices would each use memory.
        axis = next((i for i, size in enumerate(spec.shape) if size % mesh.size == 0), None)
        return NamedSharding(
            mesh, PartitionSpec(*("expert" if i == axis else None for i in range(len(spec.shape))))
        )

    from jax.experimental import multihost_utils

    def load() -> tuple[float, int, int]:
        with Peak() as peak, open_checkpoint(directory) as checkpoint:
            start = time.perf_counter()
            checkpoint.validate(weight_specs(checkpoint.config))
            model = GptOss(checkpoint.config, checkpoint.creator("bfloat16", sharding))
            seconds = time.perf_counter() - start
        del model
        gc.collect()
        return seconds, checkpoint.bytes_read, peak.bytes

    # Alternate, and report the best of each, because the speed of memory allocation varies widely.
    plain, copies, loads, base = [], [], [], anonymous_bytes()
    wanted = sum(path.stat().st_size for path in directory.glob("*.safetensors")) // processes
    for turn in range(turns):
        multihost_utils.sync_global_devices(f"load {turn}")
        loads.append(load())
        multihost_utils.sync_global_devices(f"plain {turn}")
        plain.append(plain_read(directory, processes, process, wanted, keep=True))
        multihost_utils.sync_global_devices(f"copy {turn}")
        copies.append(plain_read(directory, processes, process, wanted, keep=False))
    figures = {
        "read_bytes": loads[0][1],
        "base_bytes": base,
        "peak_bytes": max(peak for _, _, peak in loads),
        "load_s": min(seconds for seconds, _, _ in loads),
        "plain_s": min(plain),
        "copy_s": min(copies),
    }
    print(json.dumps(figures), flush=True)
    multihost_utils.sync_global_devices("done")


def plain_read(directory: Path, processes: int, process: int, wanted: int, keep: bool) -> float:
    """Seconds to read `wanted` bytes of the files, different ones in each process.

    With `keep` the bytes are read into new memory, as when a model is loaded; otherwise into one small buffer per
    thread.
    """
    from concurrent.futures import ThreadPoolExecutor

    from gptoss_jax.checkpoints.safetensors_file import CHUNK_BYTES, THREADS

    files = sorted(directory.glob("*.safetensors"))
    chunks = [(path, at) for path in files for at in range(0, path.stat().st_size, CHUNK_BYTES)]
    mine = chunks[process::processes][: -(-wanted // CHUNK_BYTES)]
    kept: list[mmap.mmap] = []

    def new_memory() -> mmap.mmap:
        # mmap instead of malloc, which would reuse freed memory.
        memory = mmap.mmap(-1, CHUNK_BYTES)
        memory.madvise(mmap.MADV_HUGEPAGE)
        kept.append(memory)
        return memory

    def read(thread: int) -> None:
        memory = new_memory()
        for path, offset in mine[thread::THREADS]:
            with path.open("rb", buffering=0) as file:
                file.seek(offset)
                file.readinto(memory)
            if keep:
                memory = new_memory()

    start = time.perf_counter()
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(read, range(THREADS)))
    return time.perf_counter() - start


def measure(directory: Path, processes: int, turns: int = 1) -> list[dict[str, float]]:
    """Load a checkpoint with this number of processes; returns the figures of each."""
    warm(directory)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    flags = {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES}",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
    }
    command = [
        sys.executable,
        __file__,
        "--directory",
        str(directory),
        "--processes",
        str(processes),
        "--turns",
        str(turns),
    ]
    started = [
        subprocess.Popen(
            [*command, "--address", address, "--process", str(i)], env=os.environ | flags, stdout=subprocess.PIPE
        )
        for i in range(processes)
    ]
    outputs = [process.communicate()[0] for process in started]
    for process in started:
        if process.returncode:
            raise SystemExit(f"a process ended with exit code {process.returncode}")
    return [json.loads(output.splitlines()[-1]) for output in outputs]


def warm(directory: Path) -> None:
    """Bring the files into the page cache."""
    buffer = bytearray(1 << 24)
    for path in directory.glob("*.safetensors"):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def report(size: int, figures: list[dict[str, float]], write: Callable[[str], object] = print) -> None:
    """Print the figures of `measure`."""
    write(f"checkpoint {size / 1e9:.2f} GB, {len(figures)} processes of {DEVICES} devices")
    for i, f in enumerate(figures):
        write(
            f"process {i}: loaded {f['read_bytes'] / 1e9:.2f} GB in {f['load_s']:.2f} s; reading only took "
            f"{f['plain_s']:.2f} s into new memory (ratio {f['load_s'] / f['plain_s']:.2f}), {f['copy_s']:.2f} s "
            f"into a small buffer; peak memory {f['peak_bytes'] / 1e9:.2f} GB, "
            f"{(f['peak_bytes'] - size / len(figures)) / 1e9:.2f} GB above its share of the checkpoint"
        )


def main() -> None:
    flags = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    flags.add_argument("--layers", type=int, default=24)
    flags.add_argument("--processes", type=int, default=2)
    flags.add_argument("--directory", type=Path, help="an existing checkpoint (default: a synthetic one)")
    flags.add_argument("--config", type=Path, default=ROOT / "configs" / "gpt_oss_20b.json")
    flags.add_argument("--turns", type=int, default=3, help="number of loads; the fastest is reported")
    flags.add_argument("--address", help=argparse.SUPPRESS)
    flags.add_argument("--process", type=int, help=argparse.SUPPRESS)
    options = flags.parse_args()
    if options.address:
        one_process(options.directory, options.address, options.processes, options.process, options.turns)
        return
    scratch = Path(tempfile.mkdtemp(prefix="loading-"))
    try:
        directory = options.directory or scratch / "checkpoint"
        if not options.directory:
            make_checkpoint(directory, options.layers, options.config)
        size = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
        report(size, measure(directory, options.processes, options.turns))
    finally:
        shutil.rmtree(scratch)


if __name__ == "__main__":
    main()
