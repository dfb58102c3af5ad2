"""Compare each op's error on the device with that of the bfloat16 reference, both against the float32 reference.

python -m benchmarks.check_kernels [--ops expert_mlp attention ...] [--share 1/4]

Each line is an op and a shape: the error of the op and that of the reference in bfloat16, relative to the float32
reference's norm. The exit code is 1 if an op's error is NaN or more than 10 % above that of the bfloat16 reference.
Most of the time is spent compiling: `--share 1/4` to `--share 4/4` split the cases over four processes.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from benchmarks.errors import relative_error, to_float32
from benchmarks.kernels import PAGE_SIZE, Ragged
from pallas_kernels.attention import attention, ragged_paged_attention
from pallas_kernels.linear import linear
from pallas_kernels.mxfp4_matmul import expert_mlp
from pallas_kernels.mxfp4_matmul.gpu_layout import BLOCK, WORDS, GpuExperts
from pallas_kernels.rotary import rotate_and_store
from pallas_kernels.routing import route

HIDDEN, HEADS, KV_HEADS, WIDTH = 2880, 64, 8, 64
ALLOWED = 1.1

BATCHES: dict[str, Ragged] = {
    **{f"decode {n} x {s}": Ragged([1] * n, [s] * n, None) for n, s in ((1, 1024), (64, 1024), (1, 131072))},
    **{f"decode {n} x 1000": Ragged([1] * n, [1000] * n, 128) for n in (1, 16)},
    "decode 131072 beside 63 x 100": Ragged([1] * 64, [131072] + [100] * 63, None),
    "decode 8 x 5000 with 3 drafts": Ragged([4] * 8, [5000] * 8, None),
    "prompt 512 of 640": Ragged([512], [640], 128),
    "prompt 2048": Ragged([2048], [2048], None),
    "prompt 512 of 131072": Ragged([512], [131072], None),
    "64 decodes of 1000, prompt 1984": Ragged([1] * 64 + [1984], [1000] * 64 + [1984], None),
    "64 sliding decodes of 1000, prompt 1984": Ragged([1] * 64 + [1984], [1000] * 64 + [1984], 128),
}

Case = tuple[str, Callable[[], tuple[float, float]]]
"""A name, and a function that returns the error of the op and that of the bfloat16 reference."""


def normal(seed: int, *shape: int, scale: float = 1.0) -> jax.Array:
    return (jax.random.normal(jax.random.key(seed), shape) * scale).astype(jnp.bfloat16)


def compare(function: Callable[..., Any], *args: Any) -> tuple[float, float]:
    """Errors of `function(backend, *args)` with the device's kernels, and with the reference in bfloat16."""
    want = jax.jit(lambda *a: function("reference", *a))(*to_float32(args))
    plain = jax.jit(lambda *a: function("reference", *a))(*args)
    got = jax.jit(lambda *a: function(None, *a))(*args)
    return relative_error(got, want), relative_error(plain, want)


def random_experts(seed: int, experts: int, parts: int) -> GpuExperts:
    """Random packed weights whose scales differ between groups; padding is zero, as in prepared weights."""
    blocks = -(-HIDDEN // BLOCK)
    keys = jax.random.split(jax.random.key(seed))
    words = jax.random.bits(keys[0], (experts, parts, blocks, HIDDEN, WORDS), jnp.uint16)
    scales = 0x77777777 + (jax.random.bits(keys[1], (experts, parts, blocks, HIDDEN), jnp.uint32) & 0x01010101)
    groups = (HIDDEN - (blocks - 1) * BLOCK) // 32
    words = words.at[:, :, -1].set(words[:, :, -1] & jnp.uint16((1 << 4 * groups) - 1))
    scales = scales.at[:, :, -1].set(scales[:, :, -1] & jnp.uint32((1 << 8 * groups) - 1))
    return GpuExperts(words, scales, HIDDEN)


def expert_cases() -> Iterator[Case]:
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
        # Enough rows per expert for the kernels for many rows.
        routings += [(2048, "absent"), (64 * experts + 1, "one")]
        for count, routing in routings:
            ids = expert_ids(count, experts, routing)
            errors = partial(compare, mlp, normal(count, count, HIDDEN), ids, *biases, up, down)
            yield f"expert_mlp {experts} experts, {count} tokens, {routing}", errors


def expert_ids(count: int, experts: int, routing: str) -> jax.Array:
    """int32 [count, k]: four experts per token; "absent" removes the ids divisible by 3, "one" uses only the last."""
    if routing == "one":
        return jnp.full((count, 1), experts - 1, jnp.int32)
    ids = lax.top_k(jax.random.uniform(jax.random.key(count), (count, experts)), 4)[1]
    return jnp.where(ids % 3 == 0, experts, ids) if routing == "absent" else ids


def attention_cases() -> Iterator[Case]:
    for name, ragged in BATCHES.items():
        yield f"attention {name}", partial(attention_errors, ragged)
    for batch, length, window in ((2, 300, None), (1, 1000, 128)):
        q, kv = normal(1, batch, length, HEADS, WIDTH), normal(2, batch, length, KV_HEADS, 2 * WIDTH)

        def whole(backend: str | None, q: Any, kv: Any, sinks: Any, window: int | None = window) -> Any:
            return attention(q, kv, sinks, window=window, sm_scale=1 / math.sqrt(WIDTH), backend=backend)

        name = f"attention of {batch} whole sequences of {length}, window {window}"
        yield name, partial(compare, whole, q, kv, normal(0, HEADS))


def attention_errors(ragged: Ragged) -> tuple[float, float]:
    """Errors of the op and of the bfloat16 reference, over pages in random order."""
    layout, pages = ragged.layout()
    q = normal(1, sum(ragged.counts), HEADS, WIDTH)
    kv_pages = normal(2, pages, PAGE_SIZE, KV_HEADS, 2 * WIDTH)
    options: dict[str, Any] = {"window": ragged.window, "max_queries": ragged.max_queries()}

    def attend(backend: str | None, q: Any, kv_pages: Any, sinks: Any) -> jax.Array:
        scale = 1 / math.sqrt(WIDTH)
        return ragged_paged_attention(q, kv_pages, layout, sinks, sm_scale=scale, backend=backend, **options)

    return compare(attend, q, kv_pages, normal(0, HEADS))


def rotary_cases() -> Iterator[Case]:
    frequencies = 150000.0 ** -(jnp.arange(WIDTH // 2) / (WIDTH // 2))
    for tokens in (1, 8, 256, 2048):
        q, k, v = (normal(i, tokens, n, WIDTH) for i, n in enumerate((HEADS, KV_HEADS, KV_HEADS)))
        positions = jax.random.randint(jax.random.key(0), (tokens,), 0, 131072)
        pages = jax.random.permutation(jax.random.key(1), 2 * tokens)[:tokens].astype(jnp.int32)
        pages = pages.at[0].set(jnp.where(tokens > 1, 2 * tokens, pages[0]))
        store = normal(5, 2 * tokens, PAGE_SIZE, KV_HEADS, 2 * WIDTH)

        def turn(backend: str | None, q: Any, k: Any, v: Any, store: Any, positions: Any, pages: Any) -> Any:
            return rotate_and_store(
                q,
                k,
                v,
                positions,
                frequencies,
                store,
                pages,
                positions % PAGE_SIZE,
                concentration=1.34657,
                out_dtype=q.dtype,
                backend=backend,
            )

        yield f"rotate_and_store {tokens} tokens", partial(compare, turn, q, k, v, store, positions, pages)


def dense_cases() -> Iterator[Case]:
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

        yield f"linear q, k, v with norm, {tokens} tokens", partial(compare, qkv, x, norm, weights, biases)
        heads = normal(8, tokens, rows[0])
        errors = partial(compare, out, heads, back, normal(10, HIDDEN), x)
        yield f"linear o with residual, {tokens} tokens", errors


def route_cases() -> Iterator[Case]:
    """Compares the normalised tokens, and each expert's weight, which is zero unless it was chosen."""
    for experts, tokens in ((32, 1), (32, 64), (128, 1), (128, 64), (32, 512)):
        router, bias = normal(0, experts, HIDDEN, scale=HIDDEN**-0.5), normal(1, experts)

        def chosen(backend: str | None, x: Any, norm: Any, router: Any, bias: Any) -> Any:
            normed, ids, weights = route(x, norm, router, bias, k=4, eps=1e-5, backend=backend)
            rows = jnp.arange(len(ids))[:, None]
            dense = jnp.zeros((len(ids), router.shape[0])).at[rows, ids].set(weights)
            return normed, dense

        errors = partial(compare, chosen, normal(tokens, tokens, HIDDEN), normal(3, HIDDEN), router, bias)
        yield f"route {experts} experts, {tokens} tokens", errors


CASES = {
    "expert_mlp": expert_cases,
    "attention": attention_cases,
    "rotate_and_store": rotary_cases,
    "linear": dense_cases,
    "route": route_cases,
}


def main() -> int:
    """Print one line per case; return 1 if an error is larger than allowed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--share", type=share, default=(1, 1), metavar="I/N", help="every N-th case from the I-th")
    flags = parser.parse_args()
    first, step = flags.share
    failed = 0
    print(f"# {jax.devices()[0].device_kind}", file=sys.stderr)
    cases = itertools.chain.from_iterable(CASES[op]() for op in flags.ops)
    for name, errors in itertools.islice(cases, first - 1, None, step):
        error, plain = errors()
        good = error <= ALLOWED * plain or error < 1e-6
        failed += not good
        print(f"{name:64} {error:.2e}  bfloat16 {plain:.2e}  {'' if good else 'WORSE'}", flush=True)
    return 1 if failed else 0


def share(text: str) -> tuple[int, int]:
    """Parse --share."""
    first, _, count = text.partition("/")
    if not (first.isdecimal() and count.isdecimal() and 1 <= int(first) <= int(count)):
        raise argparse.ArgumentTypeError(f"expected a share such as 1/4, found {text!r:.60}")
    return int(first), int(count)


if __name__ == "__main__":
    sys.exit(main())
