"""Compare each op on the device with its reference in float32, beside what plain bfloat16 computation loses.

python -m benchmarks.check_kernels [--ops expert_mlp attention ...]

A line an op and shape: the error of the op and that of the reference in bfloat16, both relative to the float32
reference's norm. The exit code is 1 if an op's error is more than 10 % above bfloat16's, or not a number.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from benchmarks.errors import relative_error, to_float32
from pallas_kernels.attention import attention, paged_attention
from pallas_kernels.linear import linear
from pallas_kernels.mxfp4_matmul import expert_mlp
from pallas_kernels.mxfp4_matmul.gpu_layout import BLOCK, WORDS, GpuExperts
from pallas_kernels.rotary import rotate_and_keep
from pallas_kernels.routing import route

HIDDEN, HEADS, KV_HEADS, WIDTH = 2880, 64, 8, 64
ALLOWED = 1.1

ATTENTION_SHAPES: list[tuple[int, int, int, int | None]] = [
    (1, 1, 128, 128),
    (16, 1, 128, 128),
    (1, 1, 1024, None),
    (64, 1, 1024, None),
    (1, 1, 131072, None),
    (1, 512, 640, 128),
    (1, 2048, 2048, None),
    (1, 512, 131072, None),
]
"""Sequences, queries of each, keys and window."""

Row = tuple[str, float, float]
"""A case, the op's error and that of bfloat16."""


def normal(seed: int, *shape: int, scale: float = 1.0) -> jax.Array:
    return (jax.random.normal(jax.random.key(seed), shape) * scale).astype(jnp.bfloat16)


def compare(function: Callable[..., Any], *args: Any) -> tuple[float, float]:
    """Errors of `function(backend, *args)` by the device's kernels, and by the reference in bfloat16."""
    want = jax.jit(lambda *a: function("reference", *a))(*to_float32(args))
    plain = jax.jit(lambda *a: function("reference", *a))(*args)
    got = jax.jit(lambda *a: function(None, *a))(*args)
    return relative_error(got, want), relative_error(plain, want)


def random_experts(seed: int, experts: int, parts: int) -> GpuExperts:
    """Random packed weights whose scales differ from group to group; padding is zero, as it is when prepared."""
    blocks = -(-HIDDEN // BLOCK)
    keys = jax.random.split(jax.random.key(seed))
    words = jax.random.bits(keys[0], (experts, parts, blocks, HIDDEN, WORDS), jnp.uint16)
    scales = 0x77777777 + (jax.random.bits(keys[1], (experts, parts, blocks, HIDDEN), jnp.uint32) & 0x01010101)
    groups = (HIDDEN - (blocks - 1) * BLOCK) // 32
    words = words.at[:, :, -1].set(words[:, :, -1] & jnp.uint16((1 << 4 * groups) - 1))
    scales = scales.at[:, :, -1].set(scales[:, :, -1] & jnp.uint32((1 << 8 * groups) - 1))
    return GpuExperts(words, scales, HIDDEN)


def expert_cases() -> Iterator[Row]:
    for experts in (32, 128):
        up, down = random_experts(0, experts, 2), random_experts(1, experts, 1)
        biases = normal(2, experts, 2 * HIDDEN), normal(3, experts, HIDDEN)

        def mlp(backend: str | None, x: Any, ids: Any, up_bias: Any, down_bias: Any, up: Any, down: Any) -> Any:
            weights = jnp.linspace(0.1, 0.4, ids.size, dtype=jnp.float32).reshape(ids.shape)
            return expert_mlp(
                x, ids, weights, up, up_bias, down, down_bias, swiglu_limit=7.0, residual_TD=x, backend=backend
            )

        counts = (1, 2, 64, 256, 1024, 8192) if experts == 32 else (1, 8, 256, 2048)
        routings = [(count, "uniform") for count in counts] + [(1, "absent"), (64, "absent"), (300, "one")]
        # Enough rows an expert for the kernels for many.
        routings += [(2048, "absent"), (64 * experts + 1, "one")]
        for count, routing in routings:
            draw = jax.random.uniform(jax.random.key(count), (count, experts))
            ids = lax.top_k(draw, 4)[1]
            if routing == "one":
                ids = jnp.full((count, 1), experts - 1, jnp.int32)
            if routing == "absent":
                ids = jnp.where(ids % 3 == 0, experts, ids)
            yield (
                f"expert_mlp {experts} experts, {count} tokens, {routing}",
                *compare(mlp, normal(count, count, HIDDEN), ids, *biases, up, down),
            )


def some_queries(q: jax.Array, positions: jax.Array, most: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries whose attention a reference can hold in memory, spread over all of them, and their indices."""
    index = jnp.linspace(0, q.shape[1] - 1, min(most, q.shape[1])).astype(jnp.int32)
    return q[:, index], positions[:, index], index


def attention_cases() -> Iterator[Row]:
    scale = 1 / math.sqrt(WIDTH)
    sinks = normal(0, HEADS)
    for batch, length, keys, window in ATTENTION_SHAPES:
        q, kv = normal(1, batch, length, HEADS, WIDTH), normal(2, batch, keys, KV_HEADS, 2 * WIDTH)
        kv_positions = jnp.broadcast_to(jnp.arange(keys, dtype=jnp.int32), (batch, keys))
        positions = kv_positions[:, keys - length :]
        page_size, pages = 32, keys // 32
        table = jax.random.permutation(jax.random.key(3), batch * pages).reshape(batch, pages).astype(jnp.int32)
        stored = jnp.zeros((batch * pages, page_size, *kv.shape[2:]), kv.dtype)
        stored = stored.at[table.reshape(-1)].set(kv.reshape(-1, page_size, *kv.shape[2:]))
        own, own_positions, index = some_queries(q, positions, max(1, min(64, (1 << 23) // (batch * keys * 4))))

        options = {"window": window, "sm_scale": scale}
        reference = jax.jit(partial(attention, **options, backend="reference"))
        want = reference(*to_float32((own, kv)), sinks, own_positions, kv_positions)
        plain = relative_error(reference(own, kv, sinks, own_positions, kv_positions), want)
        flat = jax.jit(partial(attention, **options))
        got = flat(q, kv, sinks, positions, kv_positions)
        name = f"{batch} x {length} queries, {keys} keys, window {window}"
        yield f"attention {name}", relative_error(got[:, index], want), plain
        if window is None:
            paged = jax.jit(partial(paged_attention, sm_scale=scale))
            got = paged(q, stored, table, sinks, positions)
            yield f"paged_attention {name}", relative_error(got[:, index], want), plain


def rotary_cases() -> Iterator[Row]:
    frequencies = 150000.0 ** -(jnp.arange(WIDTH // 2) / (WIDTH // 2))
    for batch in (1, 8, 256):
        q, k, v = (normal(i, batch, 1, n, WIDTH) for i, n in enumerate((HEADS, KV_HEADS, KV_HEADS)))
        positions = jax.random.randint(jax.random.key(0), (batch, 1), 0, 131072)
        pages = jax.random.permutation(jax.random.key(1), 2 * batch)[:batch, None].astype(jnp.int32)
        pages = pages.at[0].set(jnp.where(batch > 1, 2 * batch, pages[0]))
        store = normal(5, 2 * batch, 32, KV_HEADS, 2 * WIDTH)

        def turn(backend: str | None, q: Any, k: Any, v: Any, store: Any, positions: Any, pages: Any) -> Any:
            return rotate_and_keep(
                q,
                k,
                v,
                positions,
                frequencies,
                store,
                pages,
                positions % 32,
                concentration=1.34657,
                out_dtype=q.dtype,
                backend=backend,
            )

        yield f"rotate_and_keep {batch} sequences", *compare(turn, q, k, v, store, positions, pages)


def dense_cases() -> Iterator[Row]:
    rows = (HEADS * WIDTH, KV_HEADS * WIDTH, KV_HEADS * WIDTH)
    weights = [normal(i, n, HIDDEN, scale=HIDDEN**-0.5) for i, n in enumerate(rows)]
    biases = [normal(i + 3, n) for i, n in enumerate(rows)]
    back = normal(9, HIDDEN, rows[0], scale=rows[0] ** -0.5)
    for tokens in (1, 8):
        x, norm = normal(6, tokens, HIDDEN), normal(7, HIDDEN)

        def qkv(backend: str | None, x: Any, norm: Any, weights: Any, biases: Any) -> Any:
            return linear(x, weights, biases, norm_I=norm, backend=backend)

        def out(backend: str | None, heads: Any, weight: Any, bias: Any, x: Any) -> Any:
            return linear(heads, (weight,), (bias,), residual_TO=x, out_dtype=x.dtype, backend=backend)

        yield f"linear q, k, v with norm, {tokens} tokens", *compare(qkv, x, norm, weights, biases)
        heads = normal(8, tokens, rows[0])
        yield f"linear o with residual, {tokens} tokens", *compare(out, heads, back, normal(10, HIDDEN), x)


def route_cases() -> Iterator[Row]:
    """The normed tokens and each expert's weight, which is zero unless it was chosen."""
    for experts, tokens in ((32, 1), (32, 64), (128, 1), (128, 64), (32, 512)):
        router, bias = normal(0, experts, HIDDEN, scale=HIDDEN**-0.5), normal(1, experts)

        def chosen(backend: str | None, x: Any, norm: Any, router: Any, bias: Any) -> Any:
            normed, ids, weights = route(x, norm, router, bias, k=4, eps=1e-5, backend=backend)
            rows = jnp.arange(len(ids))[:, None]
            dense = jnp.zeros((len(ids), router.shape[0])).at[rows, ids].set(weights)
            return normed, dense

        yield (
            f"route {experts} experts, {tokens} tokens",
            *compare(chosen, normal(tokens, tokens, HIDDEN), normal(3, HIDDEN), router, bias),
        )


CASES = {
    "expert_mlp": expert_cases,
    "attention": attention_cases,
    "rotate_and_keep": rotary_cases,
    "linear": dense_cases,
    "route": route_cases,
}


def main() -> int:
    """Print a line a case; 1 if one is worse than allowed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", nargs="+", choices=CASES, default=list(CASES))
    flags = parser.parse_args()
    failed = 0
    print(f"# {jax.devices()[0].device_kind}", file=sys.stderr)
    for op in flags.ops:
        for name, error, plain in CASES[op]():
            good = error <= ALLOWED * plain or error < 1e-6
            failed += not good
            print(f"{name:64} {error:.2e}  bfloat16 {plain:.2e}  {'' if good else 'WORSE'}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
