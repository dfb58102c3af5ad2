"""Whether processes that load a model at the same time hold the same weights.

python -m benchmarks.weights_alike --mesh tensor=4

Of a config.json weights are drawn at random. Each process loads the model again and again, and sums up the bits of each
weight on each device. What differs from most loads is told, and the exit code is 1 then. Several processes share the
devices' memory: each takes its part before it starts.
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
"""A weight's part on a device is summed up in this many blocks: whether all are wrong or some tells of the cause."""

CONTEXT = 0.027
"""The share of a device's memory that a process takes beside JAX's."""

Sums = dict[str, tuple[int, ...]]
"""Of each weight on each device, by name, such as `layers.0.self_attn.q_proj.weight on device 1`."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default="configs/gpt_oss_20b.json", help='a checkpoint, a config.json, or "embedded"'
    )
    parser.add_argument("--mesh", metavar="MESH", help="such as tensor=4 (default: one device)")
    parser.add_argument("--processes", type=int, default=4, metavar="N", help="at once (default: 4)")
    parser.add_argument("--loads", type=int, default=4, metavar="N", help="of each process (default: 4)")
    options = parser.parse_args()
    if min(options.processes, options.loads) < 1 or options.processes * options.loads < 2:
        raise UsageError("--processes, --loads: expected numbers from 1, and two loads at least")
    os.environ.update(NO_MULTICAST)
    share = float(MEMORY_SHARE) / options.processes - CONTEXT
    if share <= 0:
        raise UsageError(f"--processes: {options.processes} leave no memory for each")
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", f"{share:.3f}")
    with ProcessPoolExecutor(options.processes, get_context("spawn")) as pool:
        running = [
            pool.submit(sums_of_loads, number, options.model, options.mesh, options.loads)
            for number in range(1, options.processes + 1)
        ]
        found = [process.result() for process in running]
    told = list(unlike(found))
    for line in told:
        print(line)
    loads = options.processes * options.loads
    print(
        f"{loads} loads by {options.processes} processes, {len(found[0][0])} weights' parts on devices:"
        f" {len(told)} differed"
    )
    return int(bool(told))


def sums_of_loads(number: int, model: str, mesh: str | None, loads: int) -> list[Sums]:
    """Those of each load; for a process of its own, whose `number` is told."""
    import jax

    from gptoss_jax.benching import workload

    start, found = time.monotonic(), []
    name = None if model == "embedded" else model
    for load in range(1, loads + 1):
        found.append(sums(jax.block_until_ready(workload.load(name, mesh, "bfloat16", 0))))
        progress(f"process {number}, load {load}: after {time.monotonic() - start:.0f} s")
    return found


def sums(model: GptOss) -> Sums:
    """Sums of the bits of all weights, block by block of each device's part."""
    import jax
    from flax import nnx

    from gptoss_jax.runtime.xla_options import in_order

    summed = jax.jit(_sums_of_blocks, compiler_options=in_order(model.partition.mesh))
    found: dict[str, jax.Array] = {}
    for path, weight in jax.tree.leaves_with_path(nnx.state(model)):
        name = jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")
        for shard in weight.addressable_shards:
            found[f"{name} on device {shard.device.id}"] = summed(shard.data)
    return {name: tuple(values.tolist()) for name, values in jax.device_get(found).items()}


def _sums_of_blocks(x: jax.Array) -> jax.Array:
    """[BLOCKS] uint32, in which each place has its odd factor: hardly any change leaves the sums as they are."""
    import jax
    import jax.numpy as jnp

    bits = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    words = jax.lax.bitcast_convert_type(x, bits).reshape(-1).astype(jnp.uint32)
    words = jnp.pad(words, (0, -words.size % BLOCKS))
    factors = (jax.lax.iota(jnp.uint32, words.size) * jnp.uint32(2654435761)) | jnp.uint32(1)
    return (words * factors).reshape(BLOCKS, -1).sum(1, dtype=jnp.uint32)


def unlike(found: Sequence[Sequence[Sums]]) -> Iterator[str]:
    """What differs from what most loads have; `found` is each process's, of each load."""
    every = [load for process in found for load in process]
    usual = {name: Counter(load[name] for load in every).most_common(1)[0][0] for name in every[0]}
    for number, process in enumerate(found, 1):
        for count, load in enumerate(process, 1):
            for name, values in load.items():
                blocks = [i for i, (a, b) in enumerate(zip(values, usual[name], strict=True)) if a != b]
                if blocks:
                    of = f"{len(blocks)} of {BLOCKS} blocks, from {blocks[0]} to {blocks[-1]}"
                    yield f"process {number}, load {count}: {name}: {of}"


if __name__ == "__main__":
    run_command(main)
