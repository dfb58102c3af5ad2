"""Time the ops at the released shapes, and compare with the floor set by memory bandwidth or peak FLOP/s.

python -m benchmarks.kernels --ops expert_mlp attention --tokens 1 64 --json
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.timing import chained_seconds, read_bandwidth
from gptoss_jax.model.config import ModelConfig
from pallas_kernels.attention import RaggedBatch, ragged_paged_attention
from pallas_kernels.linear import linear
from pallas_kernels.mxfp4_matmul import expert_mlp
from pallas_kernels.mxfp4_matmul.gpu_layout import BLOCK, WORDS, GpuExperts
from pallas_kernels.routing import route

PEAK_FLOPS = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H200": 989e12}
"""Dense bf16 operations per second, from the vendor's data sheets."""

MOST_KEYS = 8 << 20
"""Most keys of a case: 16 GiB at the released shapes."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One op at one shape: `step(carry, set)` runs it; `bytes` and `flops` bound its time."""

    name: str
    step: Callable[[jax.Array, Any], jax.Array]
    carry: jax.Array
    sets: list[Any]
    bytes: float
    flops: float


def random_experts(key: jax.Array, experts: int, parts: int, rows: int, contracting: int) -> GpuExperts:
    """Random packed weights in the kernels' layout, whose rows have a norm near 1."""
    blocks = -(-contracting // BLOCK)
    words = jax.random.bits(key, (experts, parts, blocks, rows, WORDS), jnp.uint16)
    return GpuExperts(words, jnp.full((experts, parts, blocks, rows), 0x78787878, jnp.uint32), contracting)


def expert_cases(config: ModelConfig, tokens: list[int]) -> Iterator[Case]:
    """The expert op, with uniform routing."""
    experts, k = config.num_local_experts, config.num_experts_per_tok
    hidden, inner = config.hidden_size, config.intermediate_size
    keys = jax.random.split(jax.random.key(0), 4)
    up, down = (
        random_experts(keys[0], experts, 2, inner, hidden),
        random_experts(keys[1], experts, 1, hidden, inner),
    )
    biases = jnp.zeros((experts, 2 * inner), jnp.bfloat16), jnp.zeros((experts, hidden), jnp.bfloat16)
    one_expert = sum(x.nbytes for x in jax.tree.leaves((up, down))) / experts
    for count in tokens:
        sets, touched = [], 0.0
        for i in range(8):
            draw = jax.random.uniform(jax.random.fold_in(keys[2], i), (count, experts))
            ids = jax.lax.top_k(draw, k)[1]
            touched += len(set(ids.reshape(-1).tolist())) / 8
            sets.append((ids, jnp.full((count, k), 1 / k), up, down, *biases))

        def step(x: jax.Array, own: Any) -> jax.Array:
            ids, weights, up, down, up_bias, down_bias = own
            return expert_mlp(x, ids, weights, up, up_bias, down, down_bias, swiglu_limit=config.swiglu_limit)

        x = jax.random.normal(keys[3], (count, hidden), jnp.bfloat16)
        flops = 2 * count * k * 3 * hidden * inner
        yield Case(f"expert_mlp T={count}", step, x, sets, touched * one_expert, flops)


PAGE_SIZE = 32
MOST_DRAFTS = 3


@dataclasses.dataclass(frozen=True)
class Ragged:
    """A batch for the attention op: the queries and the length of each sequence, over pages in random order."""

    counts: list[int]
    lengths: list[int]
    window: int | None

    def first_page(self, n: int) -> int:
        """The first page with a key that a query of a sequence sees; those before are not in memory."""
        seen = 0 if self.window is None else max(0, self.lengths[n] - self.counts[n] - self.window + 1)
        return seen // PAGE_SIZE

    def layout(self, seed: int = 0) -> tuple[RaggedBatch, int]:
        """The layout, and the number of pages that it needs."""
        counts, lengths = (np.array(x, np.int32) for x in (self.counts, self.lengths))
        ends = -(-lengths // PAGE_SIZE)
        held = [int(end) - self.first_page(n) for n, end in enumerate(ends)]
        free = np.random.default_rng(seed).permutation(sum(held)).astype(np.int32)
        # Tables of windows are cyclic.
        entries = max(64, 1 << max(held).bit_length())
        tables = np.zeros((len(counts), entries), np.int32)
        for n, end in enumerate(ends):
            own, free = free[: held[n]], free[held[n] :]
            tables[n, np.arange(self.first_page(n), end) % entries] = own
        starts = (np.cumsum(counts) - counts).astype(np.int32)
        arrays = (tables, np.arange(len(counts), dtype=np.int32), starts, counts, lengths)
        return RaggedBatch(*(jnp.asarray(x) for x in arrays)), sum(held)

    def keys(self) -> int:
        """The keys that are read at least."""
        seen = (0 if self.window is None else max(0, length - count - self.window + 1) for count, length in self)
        return sum(self.lengths) - sum(seen)

    def pairs(self) -> int:
        """The scores that are needed."""
        every = (range(length - count + 1, length + 1) for count, length in self)
        return sum(min(seen, self.window or seen) for one in every for seen in one)

    def max_queries(self) -> int | None:
        """The most queries of a sequence where the engine knows that: a batch that only decodes, with drafts or not."""
        return max(self.counts) if max(self.counts) <= MOST_DRAFTS + 1 else None

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return zip(self.counts, self.lengths, strict=True)


def attention_cases(config: ModelConfig, batches: list[int], contexts: list[int]) -> Iterator[Case]:
    """Decode in a full and a sliding layer, prompts, and a step of both."""
    window = config.sliding_window
    for batch in batches:
        yield ragged_case(config, f"decode N={batch} S=1000", Ragged([1] * batch, [1000] * batch, window))
        for context in contexts:
            if batch * context <= MOST_KEYS:
                name = f"decode N={batch} S={context}"
                yield ragged_case(config, name, Ragged([1] * batch, [context] * batch, None))
    for own in (None, window):
        for length in (512, 2048, 8192):
            yield ragged_case(config, f"prompt T={length}", Ragged([length], [length], own))
        yield ragged_case(config, "prompt T=2048 S=16384", Ragged([2048], [16384], own))
        mixed = Ragged([1] * 64 + [1984], [1000] * 64 + [1984], own)
        yield ragged_case(config, "64 decodes S=1000, prompt T=1984", mixed)


def ragged_case(config: ModelConfig, name: str, ragged: Ragged) -> Case:
    """The attention op on a batch, over so many copies of the keys that they exceed the cache."""
    heads, kv_heads, width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    sinks = jax.random.normal(jax.random.key(8), (heads,), jnp.bfloat16)
    layout, pages = ragged.layout()

    def step(q: jax.Array, own: Any) -> jax.Array:
        options: dict[str, Any] = {"window": ragged.window, "max_queries": ragged.max_queries()}
        return ragged_paged_attention(q, own[0], own[1], sinks, sm_scale=width**-0.5, **options)

    shape = (pages, PAGE_SIZE, kv_heads, 2 * width)
    copies = max(1, min(8, int(2e8 // (math.prod(shape) * 2))))
    sets = [(jax.random.normal(jax.random.key(i), shape, jnp.bfloat16), layout) for i in range(copies)]
    q = jax.random.normal(jax.random.key(9), (sum(ragged.counts), heads, width), jnp.bfloat16)
    size = ragged.keys() * kv_heads * 2 * width * 2 + 2 * q.nbytes
    flops = 4 * heads * width * ragged.pairs()
    return Case(f"attention {name} window={ragged.window}", step, q, sets, size, flops)


def linear_cases(config: ModelConfig, tokens: list[int]) -> Iterator[Case]:
    """The dense projections; each step depends on the previous one."""
    hidden = config.hidden_size
    heads = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim

    def weights(i: int, rows: tuple[int, ...], columns: int) -> list[jax.Array]:
        key = jax.random.key(i)
        return [jax.random.normal(key, (r, columns), jnp.bfloat16) * columns**-0.5 for r in rows]

    def case(name: str, rows: tuple[int, ...], columns: int, norm: bool, count: int, tokens: int) -> Case:
        def step(x: jax.Array, own: Any) -> jax.Array:
            outs = linear(x, own, [None] * len(rows), norm_I=jnp.ones(columns, x.dtype) if norm else None)
            return x + outs[0][:, :1].astype(x.dtype)

        sets = [weights(i, rows, columns) for i in range(count)]
        x = jax.random.normal(jax.random.key(9), (tokens, columns), jnp.bfloat16)
        size = sum(w.nbytes for w in sets[0])
        return Case(f"{name} T={tokens}", step, x, sets, size, size * tokens)

    for count in tokens:
        yield case("linear q,k,v with norm", (heads, kv, kv), hidden, True, 6, count)
        yield case("linear o", (hidden,), heads, False, 6, count)
        yield case("linear unembedding with norm", (config.vocab_size,), hidden, True, 1, count)


def route_cases(config: ModelConfig, tokens: list[int]) -> Iterator[Case]:
    """Norm, router and top-k."""
    experts, hidden = config.num_local_experts, config.hidden_size

    def step(x: jax.Array, own: Any) -> jax.Array:
        normed, _, weights = route(x, own[0], own[1], own[2], k=config.num_experts_per_tok, eps=1e-5)
        return normed + weights[:, :1].astype(x.dtype)

    for count in tokens:
        keys = [jax.random.key(i) for i in range(8)]
        sets = [
            (
                jnp.ones(hidden, jnp.bfloat16),
                jax.random.normal(key, (experts, hidden), jnp.bfloat16) * hidden**-0.5,
                jnp.zeros(experts, jnp.bfloat16),
            )
            for key in keys
        ]
        x = jax.random.normal(keys[0], (count, hidden), jnp.bfloat16)
        size = sets[0][1].nbytes
        yield Case(f"route T={count}", step, x, sets, size, 2 * count * experts * hidden)


def main() -> None:
    """Run the cases selected by the flags, and print a row for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", nargs="+", default=["expert_mlp", "attention", "linear", "route"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 8, 64, 256, 2048, 8192])
    parser.add_argument("--contexts", nargs="+", type=int, default=[1024, 8000, 100000])
    parser.add_argument("--experts", type=int, default=32, help="32 for gpt-oss-20b, 128 for gpt-oss-120b")
    parser.add_argument("--json", action="store_true", help="print one JSON object per row")
    flags = parser.parse_args()
    config = dataclasses.replace(ModelConfig(), num_local_experts=flags.experts)
    few = [t for t in flags.tokens if t <= 256]
    makers: dict[str, Callable[[], Iterator[Case]]] = {
        "expert_mlp": lambda: expert_cases(config, flags.tokens),
        "attention": lambda: attention_cases(config, few, flags.contexts),
        "linear": lambda: linear_cases(config, [1]),
        "route": lambda: route_cases(config, few),
    }
    bandwidth = read_bandwidth()
    peak = PEAK_FLOPS.get(jax.devices()[0].device_kind, float("inf"))
    print(f"# {jax.devices()[0].device_kind}: reads {bandwidth / 1e12:.2f} TB/s", file=sys.stderr)
    for op in flags.ops:
        for case in makers[op]():
            calls = 24 if case.flops < 1e12 else 4
            took = chained_seconds(case.step, case.carry, case.sets, calls)
            floor = max(case.bytes / bandwidth, case.flops / peak)
            row = {"case": case.name, "us": took * 1e6, "floor_us": floor * 1e6, "share": floor / took}
            if flags.json:
                print(json.dumps(row), flush=True)
            else:
                print(
                    f"{case.name:48} {took * 1e6:10.1f} us  floor {floor * 1e6:9.1f} us  {floor / took:5.0%}"
                    f"  {case.bytes / took / 1e12:5.2f} TB/s  {case.flops / took / 1e12:6.1f} TFLOP/s",
                    flush=True,
                )


if __name__ == "__main__":
    main()
