"""Expert parallelism without dropped tokens.

`run_experts` has two strategies:

- replicated: every device of the `expert` axis has all tokens and computes its own experts' contributions, which one
  all-reduce sums. It needs no token exchange, which suits small batches.
- all-to-all: tokens are sharded over `expert` too, and are sent to their experts and back. The buffers of an exchange
  hold slightly more than an even share of tokens per device; the remainder is sent in further rounds, so any routing
  is exact and balanced routing takes one round. Small batches get buffers for all tokens, so that the host does not
  wait for the number of rounds.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from sharding.partition import LogicalAxes, Partition, add_residual, current, is_axes
from sharding.rules import ShardingRules

ExpertFunction = Callable[..., jax.Array]

WEIGHT_AXES: tuple[LogicalAxes, ...] = (
    ("experts", "expert_gate_up", "hidden"),
    ("experts", "expert_gate_up"),
    ("experts", "hidden", "expert_intermediate"),
    ("experts", "hidden"),
)
"""Logical axes of gate_up, gate_up's bias, down and down's bias."""

ROOM = 1.25
"""The size of an exchange's buffers relative to an even share of the rows."""

FEW_ROWS = 4096
"""The most rows received by a device for which an exchange has buffers for all rows."""

FEW_ON_GPUS = 4
"""The factor on FEW_ROWS on GPUs, where the host waits for the number of rounds: this covers 4096 prompt tokens.

On four H100s, prefill of 2048 tokens per step was 1.4 times as fast as in rounds.
"""

EXCHANGING_DEVICES = 8
"""The smallest degree of expert parallelism at which `auto` may choose the all-to-all.

From this degree on, sending a token's bfloat16 copies and their float32 results, buffers included, takes fewer bytes
than replicating the token and reducing its float32 sum. On four H100s the all-to-all made decoding take 2.0, 1.1, 1.1
and 1.0 times as long for 1, 8, 64 and 256 sequences, and prefill 1.1 times (benchmarks/RESULTS.md).
"""

TOKENS_A_DEVICE = 16
"""The fewest tokens per device of the expert axis at which `auto` may choose the all-to-all."""


def run_experts(
    function: ExpertFunction,
    x_TD: jax.Array,
    expert_ids_Tk: jax.Array,
    expert_weights_Tk: jax.Array,
    gate_up_EFD: Any,
    gate_up_bias_EF: jax.Array,
    down_EDI: Any,
    down_bias_ED: jax.Array,
    residual_TD: jax.Array | None = None,
) -> jax.Array:
    """Run the experts over the active mesh: [T, D] tokens, [T, k] expert ids and weights -> [T, D].

    `function` has the signature of `pallas_kernels.expert_mlp`. It is called with one device's experts, numbered from
    0; ids of experts on other devices are past the last. It also receives the `out_dtype` of results that are sent
    between devices. Weights may be pytrees whose `axes` method maps the weight's logical axes to those of its arrays
    (see MXFP4Tensor). The residual is added once, after all sums.
    """
    partition = current()
    weights = (gate_up_EFD, gate_up_bias_EF, down_EDI, down_bias_ED)
    if partition.mesh is None:
        return _with_residual(function, residual_TD)(x_TD, expert_ids_Tk, expert_weights_Tk, *weights)
    rules = partition.rules
    strategy = _replicated
    token_axes = tuple(axis for axis in rules.batch if axis not in rules.experts)
    if _use_all_to_all(partition, x_TD.shape[0]):
        strategy, token_axes = _all_to_all, (*token_axes, *rules.experts)
    return _over_mesh(partition, partial(strategy, partition, function), token_axes)(
        x_TD, expert_ids_Tk, expert_weights_Tk, residual_TD, *weights
    )


def _with_residual(function: ExpertFunction, residual_TD: jax.Array | None) -> ExpertFunction:
    return function if residual_TD is None else partial(function, residual_TD=residual_TD)


def _use_all_to_all(partition: Partition, num_tokens: int) -> bool:
    rules, degree = partition.rules, partition.degree("experts")
    if degree == 1 or rules.dispatch == "replicated":
        return False
    if rules.dispatch == "all_to_all":
        return True
    # If attention replicates the tokens over the expert axis, distributing and gathering them gains nothing.
    split_already = set(rules.experts) <= set(rules.batch)
    return split_already and degree >= EXCHANGING_DEVICES and num_tokens >= TOKENS_A_DEVICE * degree


def _over_mesh(partition: Partition, strategy: Callable[..., jax.Array], token_axes: tuple[str, ...]) -> Any:
    """`strategy` on every device's shard; tokens are padded to divide evenly, with ids of no expert."""
    mesh, rules = partition.mesh, partition.rules
    assert mesh is not None
    shards = math.prod(mesh.shape[axis] for axis in token_axes)
    tokens = PartitionSpec(token_axes or None, None)

    def call(
        x_TD: jax.Array, ids_Tk: jax.Array, weights_Tk: jax.Array, residual_TD: jax.Array | None, *weights: Any
    ) -> jax.Array:
        rows = ((0, -len(x_TD) % shards), (0, 0))
        nowhere = jnp.iinfo(ids_Tk.dtype).max
        specs = (_specs(rules, weight, axes) for weight, axes in zip(weights, WEIGHT_AXES, strict=True))
        mapped = jax.shard_map(
            strategy, mesh=mesh, in_specs=(*(tokens,) * 4, *specs), out_specs=tokens, check_vma=False
        )
        y_TD = mapped(
            jnp.pad(x_TD, rows),
            jnp.pad(ids_Tk, rows, constant_values=nowhere),
            jnp.pad(weights_Tk, rows),
            None if residual_TD is None else jnp.pad(residual_TD, rows),
            *weights,
        )
        return y_TD[: len(x_TD)]

    return call


def _specs(rules: ShardingRules, weight: Any, axes: LogicalAxes) -> Any:
    own_axes = axes if isinstance(weight, jax.Array) else weight.axes(axes)
    return jax.tree.map(rules.spec, own_axes, is_leaf=is_axes)


def _replicated(
    partition: Partition,
    function: ExpertFunction,
    x_TD: jax.Array,
    ids_Tk: jax.Array,
    weights_Tk: jax.Array,
    residual_TD: jax.Array | None,
    *experts: Any,
) -> jax.Array:
    here = experts[1].shape[0]
    if partition.degree("experts") > 1:
        ids_Tk = ids_Tk - partition.index("experts") * here
        ids_Tk = jnp.where((ids_Tk >= 0) & (ids_Tk < here), ids_Tk, here)
    ours = (x_TD, ids_Tk, weights_Tk, *_bias_once(partition, experts))
    if partition.degree("experts") * partition.degree("expert_intermediate") == 1:
        return _with_residual(function, residual_TD)(*ours)
    y_TD = partition.reduce(function(*ours), "experts", "expert_intermediate")
    return y_TD if residual_TD is None else add_residual(y_TD, residual_TD)


def _all_to_all(
    partition: Partition,
    function: ExpertFunction,
    x_TD: jax.Array,
    ids_Tk: jax.Array,
    weights_Tk: jax.Array,
    residual_TD: jax.Array | None,
    *experts: Any,
) -> jax.Array:
    """Exchange rows (a token and one of its k experts), sorted by destination, at most C per device and round."""
    axes = partition.rules.experts
    devices, here = partition.degree("experts"), experts[1].shape[0]
    num_tokens, k = ids_Tk.shape
    rows = num_tokens * k
    ids_R = ids_Tk.reshape(rows)
    device_R = jnp.minimum(ids_R // here, devices)
    order_R = jnp.argsort(device_R, stable=True)
    counts_P = jnp.bincount(device_R, length=devices + 1)[:devices]
    starts_P = jnp.cumsum(counts_P) - counts_P
    few = rows * devices <= FEW_ROWS * (FEW_ON_GPUS if _device(partition).platform == "gpu" else 1)
    room = rows if few else min(rows, math.ceil(ROOM * rows / devices))
    exchange = partial(_exchange, axes, not few and _has_ragged_all_to_all(_device(partition)))
    ours = _bias_once(partition, experts)
    # Devices that share an expert return terms of a sum, which lose more by rounding than their sum does.
    back_dtype = jnp.float32 if partition.degree("expert_intermediate") > 1 else x_TD.dtype

    def some_rows(index: jax.Array | int, out_RD: jax.Array) -> jax.Array:
        place_PC = index * room + jnp.arange(room)
        valid_PC = place_PC < counts_P[:, None]
        row_PC = order_R[jnp.minimum(starts_P[:, None] + place_PC, rows - 1)]
        sent_PCD = jnp.where(valid_PC[..., None], x_TD[row_PC // k], 0)
        # Ids are sent in full: rows beyond those received keep the id of no expert.
        ids_PC = jnp.where(valid_PC, ids_R[row_PC] % here, here)
        ids_PC = lax.all_to_all(ids_PC, axes, 0, 0, tiled=True)
        sizes_P, theirs_P = (jnp.sum(x_PC, axis=1, dtype=jnp.int32) for x_PC in (valid_PC, ids_PC < here))
        got_PCD = exchange(sent_PCD, sizes_P, theirs_P)
        y_ND = function(
            got_PCD.reshape(devices * room, -1),
            ids_PC.reshape(-1, 1),
            jnp.ones((devices * room, 1), jnp.float32),
            *ours,
            out_dtype=back_dtype,
        )
        back_PCD = exchange(y_ND.reshape(devices, room, -1), theirs_P, sizes_P)
        return out_RD.at[jnp.where(valid_PC, row_PC, rows)].set(back_PCD, mode="drop")

    out_RD = jnp.zeros((rows, x_TD.shape[1]), back_dtype)
    if few:
        out_RD = some_rows(0, out_RD)
    else:
        everywhere = partition.mesh.axis_names if partition.mesh else ()
        rounds = lax.pmax(-(-jnp.max(counts_P) // room), everywhere)
        out_RD = lax.fori_loop(0, rounds, some_rows, out_RD)
    out_TkD = out_RD.reshape(num_tokens, k, -1).astype(jnp.float32)
    # Rows return as partial sums over shards of the intermediate dimension: one float32 reduction per token remains.
    y_TD = partition.reduce(jnp.sum(out_TkD * weights_Tk[..., None], axis=1), "expert_intermediate")
    return y_TD.astype(x_TD.dtype) if residual_TD is None else add_residual(y_TD, residual_TD)


def _exchange(
    axes: tuple[str, ...], ragged: bool, x_PCD: jax.Array, sizes_P: jax.Array, theirs_P: jax.Array
) -> jax.Array:
    """Send x[p, :sizes[p]] to each device p, and receive theirs[p] rows from it into row p of the result."""
    if not ragged:
        return lax.all_to_all(x_PCD, axes, 0, 0, tiled=True)
    devices, room, _ = x_PCD.shape
    flat = x_PCD.reshape(devices * room, -1)
    mine = jnp.full((devices,), lax.axis_index(axes) * room, jnp.int32)
    received = lax.ragged_all_to_all(
        flat,
        jnp.zeros_like(flat),
        jnp.arange(devices, dtype=jnp.int32) * room,
        sizes_P,
        mine,
        theirs_P,
        axis_name=axes,
    )
    return received.reshape(x_PCD.shape)


def _device(partition: Partition) -> jax.Device:
    assert partition.mesh is not None
    return partition.mesh.devices.flat[0]


def _has_ragged_all_to_all(device: jax.Device) -> bool:
    """TPUs have it, except v5e slices, whose interconnect cannot route it.

    CPUs lack it. On NVIDIA GPUs rounds took 2.5 times as long with it as without, probably because the host waits for
    its sizes.
    """
    return device.platform == "tpu" and device.device_kind != "TPU v5 lite"


def _bias_once(partition: Partition, experts: tuple[Any, ...]) -> tuple[Any, ...]:
    """The experts' weights with the down bias zeroed on all but the first of the devices that share an expert."""
    if partition.degree("expert_intermediate") == 1:
        return experts
    *others, down_bias_ED = experts
    return (*others, jnp.where(partition.index("expert_intermediate") == 0, down_bias_ED, 0))
