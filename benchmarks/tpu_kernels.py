"""The TPU kernels compiled ahead of time: the bytes that they copy, and their VMEM.

python -m benchmarks.tpu_kernels --chips v5e v6e                (extra: aot)

Bytes are counted, not measured: a kernel's grid is iterated with a real routing or real lengths, and a block is
counted when its index changes, as the pipeline copies it then; of attention, which makes its own copies, the copies of
all items are. The minimum is the released bytes of the experts that tokens chose, or the keys and values that queries
attend to, plus inputs and outputs. VMEM is as reported by the compiler.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from sharding.compiled.topologies import parse_topology, prepare_environment

prepare_environment()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax.experimental import pallas as pl  # noqa: E402
from jax.sharding import Mesh, NamedSharding, PartitionSpec  # noqa: E402

from gptoss_jax.model.mxfp4 import GROUP, MXFP4Tensor  # noqa: E402
from pallas_kernels import platform  # noqa: E402
from pallas_kernels.attention import RaggedBatch, mosaic_tpu, ragged_paged_attention  # noqa: E402
from pallas_kernels.mxfp4_matmul import expert_mlp, tpu_layout  # noqa: E402
from pallas_kernels.tpu import LANES  # noqa: E402

CHIPS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
EXPERTS = {"20b": 32, "120b": 128}
HIDDEN, HEADS, KV_HEADS, WIDTH, TOP, WINDOW, PAGE = 2880, 64, 8, 64, 4, 128, 32
ROW_BYTES = KV_HEADS * 2 * WIDTH * 2
"""A token's keys and values of one layer, bfloat16."""


@dataclasses.dataclass(frozen=True)
class Case:
    """An op at one shape; arguments are arrays, or abstract where their values do not matter."""

    name: str
    function: Callable[..., jax.Array]
    arguments: tuple[Any, ...]
    least_bytes: float


def cases(models: list[str]) -> Iterator[Case]:
    for model in models:
        for tokens in (1, 8, 64, 2048):
            yield expert_case(model, tokens)
    for window in (None, WINDOW):
        for batch in (1, 64, 256):
            yield attention_case(f"decode, {batch} of 1024 keys", [(1, 1024)] * batch, window)
        for context in (2048, 16384):
            yield attention_case(f"chunk of 2048, {context} keys", [(2048, context)], window)
        yield attention_case("255 of 1024 keys and chunk of 1793", [(1, 1024)] * 255 + [(1793, 1793)], window)
    yield attention_case("decode, 1 of 131072 keys", [(1, 131072)], None)
    yield attention_case("decode, 64 of 1024 keys, pages of 256", [(1, 1024)] * 64, None, page=256)
    yield attention_case("64 chunks of 32, 1024 keys, pages of 1024", [(32, 1024)] * 64, None, page=1024)


def shape(*dims: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(dims, dtype)


def experts(count: int, rows: int, contracting: int, parts: int) -> tpu_layout.TpuExperts:
    """Abstract prepared weights."""
    groups = contracting // GROUP
    packed = MXFP4Tensor(
        shape(count, rows, groups, GROUP // 2, dtype=jnp.uint8),  # type: ignore[arg-type]
        shape(count, rows, groups, dtype=jnp.uint8),  # type: ignore[arg-type]
    )
    return jax.eval_shape(functools.partial(tpu_layout.prepare, parts=parts), packed)


def expert_case(model: str, tokens: int) -> Case:
    count = EXPERTS[model]
    rng = np.random.default_rng(0)
    ids = rng.permuted(np.tile(np.arange(count), (tokens, 1)), axis=1)[:, :TOP].astype(np.int32)
    weights = experts(count, 2 * HIDDEN, HIDDEN, 2), experts(count, HIDDEN, HIDDEN, 1)
    an_expert = 3 * HIDDEN * HIDDEN * (1 / 2 + 1 / GROUP) + 3 * HIDDEN * 2
    arguments = (
        shape(tokens, HIDDEN),
        ids,
        np.full(ids.shape, 1 / TOP, np.float32),
        weights[0],
        shape(count, 2 * HIDDEN),
        weights[1],
        shape(count, HIDDEN),
    )
    least = len(np.unique(ids)) * an_expert + 2 * tokens * HIDDEN * 2
    return Case(
        f"experts, {model}, {tokens} tokens", functools.partial(expert_mlp, swiglu_limit=7.0), arguments, least
    )


def attention_case(name: str, sequences: list[tuple[int, int]], window: int | None, page: int = PAGE) -> Case:
    """Sequences of (queries, keys) over the tables of a pool: one for long contexts, or a cyclic one for windows."""
    counts, lengths = np.array(sequences, np.int32).T
    most, tokens = int(counts.max()), int(counts.sum())
    entries = 131072 // page if window is None else (window + 2048) // page + 2
    # Only the numbers of pages matter, not which they are.
    pages = -(-int(lengths.max()) // page)
    layout: Any = (
        np.broadcast_to(np.arange(entries, dtype=np.int32) % pages, (256, entries)),
        np.arange(len(counts), dtype=np.int32),
        (np.cumsum(counts) - counts).astype(np.int32),
        counts,
        lengths,
    )
    batch = RaggedBatch(*layout)
    arguments = (shape(tokens, HEADS, WIDTH), shape(pages, page, KV_HEADS, 2 * WIDTH), batch, shape(HEADS))
    keys = lengths if window is None else np.minimum(lengths, window + counts - 1)
    function = functools.partial(
        ragged_paged_attention, window=window, sm_scale=0.125, max_queries=1 if most == 1 else None
    )
    name = f"attention, {name}" + ("" if window is None else ", window")
    return Case(name, function, arguments, int(keys.sum()) * ROW_BYTES + 2 * tokens * HEADS * WIDTH * 2)


def compiled(case: Case, chip: str) -> str:
    """The program of a case, compiled for one device of the chip."""
    mesh = Mesh(np.array(parse_topology(CHIPS[chip]).devices()[:1]), ("x",))
    everywhere = NamedSharding(mesh, PartitionSpec())
    arguments = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), case.arguments)
    with platform("tpu"), jax.set_mesh(mesh):
        return jax.jit(case.function).lower(*arguments).compile().as_text() or ""


def vector_memory(program: str) -> dict[str, int]:
    """Bytes of VMEM that each kernel of a compiled program uses."""
    kernels = {}
    for line in program.splitlines():
        if 'custom_call_target="tpu_custom_call"' in line:
            name = re.search(r'op_name="[^"]*?([\w]+)/pallas_call', line)
            used = re.search(r'"used_scoped_memory_configs":\[\{"memory_space":"1"[^}]*"size":"(\d+)"', line)
            assert name is not None
            assert used is not None
            kernels[name[1]] = int(used[1])
    return kernels


def copied_bytes(case: Case) -> dict[str, int]:
    """Bytes that each kernel of a case copies to and from VMEM."""
    counts: dict[str, int] = {}

    def recorded(kernel: Any, **options: Any) -> Callable[..., jax.Array]:
        def call(*arguments: Any) -> jax.Array:
            copied = _copied(options["grid_spec"], options["out_shape"], arguments)
            if options["name"] == "attention":
                copied += _copied_by_attention(kernel.keywords["blocks"], options["out_shape"], arguments)
            counts[options["name"]] = copied
            return jnp.zeros(options["out_shape"].shape, options["out_shape"].dtype)

        return call

    def concrete(x: Any) -> Any:
        big = isinstance(x, jax.ShapeDtypeStruct) and x.dtype == jnp.uint8
        return x if big else jnp.zeros(x.shape, x.dtype) if isinstance(x, jax.ShapeDtypeStruct) else jnp.asarray(x)

    with mock.patch.object(pl, "pallas_call", recorded):
        case.function(*jax.tree.map(concrete, case.arguments), backend="mosaic_tpu")
    return counts


def _copied(spec: Any, out: Any, arguments: tuple[Any, ...]) -> int:
    scalars = [np.asarray(x) for x in arguments[: spec.num_scalar_prefetch]]
    blocks = zip((*spec.in_specs, spec.out_specs), (*arguments[spec.num_scalar_prefetch :], out), strict=True)
    total = 0
    for block, array in blocks:
        if block.block_shape is None:
            continue
        last = None
        for point in itertools.product(*(range(int(n)) for n in spec.grid)):
            index = tuple(int(i) for i in block.index_map(*point, *scalars))
            if index != last:
                last = index
                sizes = zip(block.block_shape, index, array.shape, strict=True)
                total += math.prod(min(b, n - i * b) for b, i, n in sizes) * array.dtype.itemsize
    return total


def _copied_by_attention(blocks: mosaic_tpu.Blocks, out: Any, arguments: tuple[Any, ...]) -> int:
    """What the attention kernel copies itself: entries of tables, queries, the keys of each item, and results."""
    items = mosaic_tpu.Items(*(np.asarray(x) for x in arguments[: len(mosaic_tpu.Items._fields)]))
    _, q, kv, _ = arguments[len(items) :]
    units = items.last - items.first
    numbers = ((items.queries, q), (items.queries, out), (units, kv))
    rows = sum(int(n.sum()) * math.prod(x.shape[1:]) * x.dtype.itemsize for n, x in numbers)
    return rows + int((-(-units // blocks.units)).sum()) * 2 * LANES * 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", nargs="+", choices=CHIPS, default=list(CHIPS))
    parser.add_argument("--models", nargs="+", choices=EXPERTS, default=list(EXPERTS))
    options = parser.parse_args()
    header = ("", "MB copied", "minimum MB", "ratio", *(f"VMEM MiB, {chip}" for chip in options.chips))
    print("| " + " | ".join(header) + " |\n|" + "---|" * len(header))
    for case in cases(options.models):
        moved = copied_bytes(case)
        memory = [vector_memory(compiled(case, chip)) for chip in options.chips]
        cells = [" + ".join(f"{used[name] / 2**20:.1f}" for name in moved) for used in memory]
        total = sum(moved.values())
        numbers = (f"{total / 1e6:.1f}", f"{case.least_bytes / 1e6:.1f}", f"{total / case.least_bytes:.2f}")
        print("| " + " | ".join((case.name, *numbers, *cells)) + " |", flush=True)


if __name__ == "__main__":
    main()
