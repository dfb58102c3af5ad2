"""Check that processes which load a model at the same time get the same weights.

python -m benchmarks.weights_alike --mesh tensor=4

For a config.json the weights are random. Each process loads the model repeatedly, and computes checksums of each weight
on each device. Differences from the majority of the loads are reported, and the exit code is 1 if there are any. The
processes share the devices' memory: each preallocates its share.
"""

from __future__ import annotations

import argparse
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import TYPE_CHECKING

from benchmarks.several_gpus import MEMORY_SHARE, NO_MULTICAST, progress
from gptoss_jax.commands.running import run_command
from gptoss_jax.errors import UsageError

if TYPE_CHECKING:
    import jax

    from gptoss_jax.model.gpt_oss import GptOss

BLOCKS = 64
"""Checksums per weight and device, of equal blocks. The number of differing blocks is a hint at the cause."""

CONTEXT = 0.027
"""Fraction of a device's memory that a process uses outside of JAX's allocator."""

Checksums = dict[str, tuple[int, ...]]
"""Checksums of each weight on each device, by a name such as `layers.0.self_attn.q_proj.weight on device 1`."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default="configs/gpt_oss_20b.json", help='a checkpoint, a config.json, or "embedded"'
    )
    parser.add_argument("--mesh", metavar="MESH", help="such as tensor=4 (default: one device)")
    parser.add_argument("--processes", type=int, default=4, metavar="N", help="concurrent processes (default: 4)")
    parser.add_argument("--loads", type=int, default=4, metavar="N", help="loads per process (default: 4)")
    options = parser.parse_args()
    if min(options.processes, options.loads) < 1 or options.processes * options.loads < 2:
        raise UsageError("--processes, --loads: expected numbers from 1, and at least two loads in total")
    os.environ.update(NO_MULTICAST)
    share = float(MEMORY_SHARE) / options.processes - CONTEXT
    if share <= 0:
        raise UsageError(f"{options.processes} processes leave no memory for each", "--processes")
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", f"{share:.3f}")
    with ProcessPoolExecutor(options.processes, get_context("spawn")) as pool:
        running = [
            pool.submit(checksums_of_loads, number, options.model, options.mesh, options.loads)
            for number in range(1, options.processes + 1)
        ]
        found = [process.result() for process in running]
    differing = list(differences(found))
    for line in differing:
        print(line)
    loads = options.processes * options.loads
    print(
        f"{loads} loads by {options.processes} processes, {len(found[0][0])} weight shards on devices:"
        f" {len(differing)} differed"
    )
    return int(bool(differing))


def checksums_of_loads(number: int, model: str, mesh: str | None, loads: int) -> list[Checksums]:
    """The checksums of each load; runs in a process of its own, with this `number` in progress lines."""
    import jax

    from gptoss_jax.benching import workload

    start, found = time.monotonic(), []
    name = None if model == "embedded" else model
    for load in range(1, loads + 1):
        found.append(checksums(jax.block_until_ready(workload.load(name, mesh, "bfloat16", 0))))
        progress(f"process {number}, load {load}: after {time.monotonic() - start:.0f} s")
    return found


def checksums(model: GptOss) -> Checksums:
    """Checksums of all weights, for each block of each device's shard."""
    import jax
    from flax import nnx

    from gptoss_jax.runtime.xla_options import in_order

    summed = jax.jit(_block_checksums, compiler_options=in_order(model.partition.mesh))
    found: dict[str, jax.Array] = {}
    for path, weight in jax.tree.leaves_with_path(nnx.state(model)):
        name = jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")
        for shard in weight.addressable_shards:
            found[f"{name} on device {shard.device.id}"] = summed(shard.data)
    return {name: tuple(values.tolist()) for name, values in jax.device_get(found).items()}


def _block_checksums(x: jax.Array) -> jax.Array:
    """uint32 [BLOCKS]: sums of the elements' bits, each times an odd factor that depends on its position."""
    import jax
    import jax.numpy as jnp

    bits = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    words = jax.lax.bitcast_convert_type(x, bits).reshape(-1).astype(jnp.uint32)
    words = jnp.pad(words, (0, -words.size % BLOCKS))
    factors = (jax.lax.iota(jnp.uint32, words.size) * jnp.uint32(2654435761)) | jnp.uint32(1)
    return (words * factors).reshape(BLOCKS, -1).sum(1, dtype=jnp.uint32)


def differences(found: Sequence[Sequence[Checksums]]) -> Iterator[str]:
    """A line for each difference from the majority; `found` has the checksums by process and load."""
    every = [load for process in found for load in process]
    majority = {name: Counter(load[name] for load in every).most_common(1)[0][0] for name in every[0]}
    for number, process in enumerate(found, 1):
        for count, load in enumerate(process, 1):
            for name, values in load.items():
                blocks = [i for i, (a, b) in enumerate(zip(values, majority[name], strict=True)) if a != b]
                if blocks:
                    of = f"{len(blocks)} of {BLOCKS} blocks, from {blocks[0]} to {blocks[-1]}"
                    yield f"process {number}, load {count}: {name}: {of}"


if __name__ == "__main__":
    run_command(main)
