"""The linear op on NVIDIA GPUs for a single token: a matrix-vector product bound by memory bandwidth.

A program multiplies a few whole rows, so that all of its loads are independent and in flight at once. The norm's
scale is one number per token; it is applied to the final sums, so no load depends on it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jax.typing import DTypeLike

from pallas_kernels.linear import reference

LARGEST_PIECE = 2048
"""Most columns in one load; rows are split into powers of two of at most this size."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Weight rows and warps per program."""

    rows: int
    num_warps: int


def choose(columns: int) -> Config:
    """The fastest measured config: one warp per program, with one row of 2880 columns or two of 4096."""
    return Config(1 if columns < 4096 else 2, 1)


def linear(
    x_TI: jax.Array,
    weights_OI: tuple[jax.Array, ...],
    biases_O: tuple[jax.Array | None, ...],
    *,
    norm_I: jax.Array | None,
    eps: float,
    residual_TO: jax.Array | None,
    out_dtype: DTypeLike,
    interpret: bool,
    config: Config | None = None,
) -> tuple[jax.Array, ...]:
    """See `pallas_kernels.linear.linear`."""
    tokens, columns = x_TI.shape
    if tokens != 1:
        # XLA's matrix product is the fastest here.
        return reference.linear(
            x_TI, weights_OI, biases_O, norm_I=norm_I, eps=eps, residual_TO=residual_TO, out_dtype=out_dtype
        )
    config = config or choose(columns)
    if columns % 16:
        raise NotImplementedError(f"{columns} columns are not a multiple of 16")
    if any(w.dtype != x_TI.dtype for w in weights_OI):
        raise NotImplementedError("weights and tokens have different dtypes")
    operands: list[jax.Array] = [x_TI[0]]
    if norm_I is not None:
        operands.append(norm_I)
    for weight, bias in zip(weights_OI, biases_O, strict=True):
        operands.append(weight)
        operands += [] if bias is None else [bias]
        operands += [] if residual_TO is None else [residual_TO[0]]
    outs = pl.pallas_call(
        functools.partial(
            _kernel,
            has_norm=norm_I is not None,
            has_bias=tuple(bias is not None for bias in biases_O),
            has_residual=residual_TO is not None,
            eps=eps,
            rows=config.rows,
        ),
        grid=(sum(pl.cdiv(w.shape[0], config.rows) for w in weights_OI),),
        out_shape=[jax.ShapeDtypeStruct((w.shape[0],), out_dtype) for w in weights_OI],
        compiler_params=plt.CompilerParams(num_warps=config.num_warps, num_stages=1),
        interpret=interpret,
        name="linear",
    )(*operands)
    return tuple(out[None] for out in outs)


def pieces(columns: int, largest: int) -> Iterator[tuple[int, int]]:
    """Split a row into powers of two, largest first; yields (start, size)."""
    start = 0
    while start < columns:
        size = min(largest, 1 << ((columns - start).bit_length() - 1))
        yield start, size
        start += size


def _kernel(
    *refs: Any,
    has_norm: bool,
    has_bias: tuple[bool, ...],
    has_residual: bool,
    eps: float,
    rows: int,
) -> None:
    inputs, out_refs = iter(refs[: -len(has_bias)]), refs[-len(has_bias) :]
    x_ref = next(inputs)
    norm_ref = next(inputs) if has_norm else None
    first_program = 0
    for bias_here, out_ref in zip(has_bias, out_refs, strict=True):
        weight_ref = next(inputs)
        bias_ref = next(inputs) if bias_here else None
        residual_ref = next(inputs) if has_residual else None
        programs = pl.cdiv(weight_ref.shape[0], rows)
        own = pl.program_id(0) - first_program
        body = functools.partial(
            _rows, x_ref, norm_ref, weight_ref, bias_ref, residual_ref, out_ref, own, rows, eps
        )
        if len(has_bias) == 1:
            body()
        else:
            pl.when((own >= 0) & (own < programs))(body)
        first_program += programs


def _rows(
    x_ref: Any,
    norm_ref: Any | None,
    weight_ref: Any,
    bias_ref: Any | None,
    residual_ref: Any | None,
    out_ref: Any,
    program: jax.Array,
    rows: int,
    eps: float,
) -> None:
    """Computes `rows` outputs of one weight, from row `program * rows` on."""
    outputs, columns = weight_ref.shape
    row = program * rows + jnp.arange(rows)
    inside = row < outputs
    total_R = jnp.zeros(rows, jnp.float32)
    squares = jnp.float32(0)
    for start, size in pieces(columns, LARGEST_PIECE):
        at = pl.ds(start, size)
        mask = jnp.broadcast_to(inside[:, None], (rows, size)) if outputs % rows else None
        weight_RC = plt.load(
            weight_ref.at[pl.ds(program * rows, rows), at], mask=mask, other=None if mask is None else 0.0
        )
        x_C = x_ref[at].astype(jnp.float32)
        if norm_ref is not None:
            squares += jnp.sum(x_C * x_C)
            x_C *= norm_ref[at].astype(jnp.float32)
        total_R += jnp.sum(weight_RC.astype(jnp.float32) * x_C[None, :], axis=1)
    if norm_ref is not None:
        total_R *= jax.lax.rsqrt(squares / columns + eps)
    for term_ref in (bias_ref, residual_ref):
        if term_ref is not None:
            total_R += plt.load(term_ref.at[row], mask=inside, other=0.0).astype(jnp.float32)
    plt.store(out_ref.at[row], total_R.astype(out_ref.dtype), mask=inside)
