"""The engine's compiled programs: the forward pass of a ragged step, sampling, and several decode steps in one.

The forward pass takes T tokens of any mix of prompts, decodes and drafts on each of B data-parallel ranks, and leaves
the hidden states of R rows; sampling unembeds these and chooses a token for each. They are programs of their own, so
that their sizes do not multiply, and so that constraints can be evaluated while the forward pass runs. A launch that
only decodes is one program; if it has several steps, each takes the tokens that the one before left on the device.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike

from gptoss_jax.engine.adjusting import AdjustedRows, adjust
from gptoss_jax.engine.sampling import SamplingState, logprobs_of, sample
from gptoss_jax.model.gpt_oss import GptOss, unembed
from gptoss_jax.model.kv_cache import Addresses, KVCache, Sequences, StepCache, page_of
from sharding import Partition, constrain, on_shards

TOP_LOGPROBS = 20
"""How many of the most likely tokens are reported with log-probabilities."""

Features = Literal["plain", "cuts", "all", "penalties"]
"""What sampling can do: all rows without top-k and top-p; these, too; also biases, masks and log-probabilities; and
also penalties, with token counts on the device.

They are programs of their own and not conditions on the device, which cost a small step more than they save.
"""

ADJUSTED, BIASES = 16, 320
"""Rows that are adjusted in a step, or all of them, and tokens of a row that may be biased, or twice as many each time.

Few, since all that is adjusted is sent in each step; a step that needs more has programs of its own.
"""

ROWS = ("batch", None)
TABLES = ("batch", None, None)


@dataclasses.dataclass(frozen=True)
class StepShape:
    """What a program is compiled for, per data-parallel rank.

    Args:
      tokens: tokens of the forward pass; 0 for a program that only samples.
      rows: rows that are sampled; 0 for a program that only runs the forward pass.
      steps: decode steps of a program that does both.
      features: what a program that samples can do; see Features.
      adjusted, biases: rows that may be adjusted, and tokens of each that may be biased.
      prompt_logprobs: whether the forward pass reports the log-probabilities of the prompts' tokens.
    """

    tokens: int
    rows: int
    steps: int = 1
    features: Features = "plain"
    adjusted: int = ADJUSTED
    biases: int = BIASES
    prompt_logprobs: bool = False


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DeviceState:
    """The cache, and the page tables int32 [B, slots, M] of its two pools."""

    cache: KVCache
    tables: jax.Array
    sliding_tables: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Generated:
    """What was generated in each slot: `last` int32 [B, slots] is its newest token.

    `counts` int32 and `in_prompt` bool [B, slots, V] count its tokens, once a request has penalties.
    """

    last: jax.Array
    counts: jax.Array | None = None
    in_prompt: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ForwardInputs:
    """What the host sends for a forward pass.

    Args:
      tokens, positions, slots: int32 [B, T]; a token of -1 is the slot's newest, a position of -1 padding.
      sequences: the layout of the sequences on the axis of tokens.
      rows: int32 [B, R], the tokens whose hidden states are needed.
      updates, sliding_updates: int32 [B, U, 3], changes of the page tables as (slot, entry, page); a slot past the last
        changes nothing.
      next_tokens: int32 [B, T], the tokens after those of prompts, if their log-probabilities are asked for.
    """

    tokens: ArrayLike
    positions: ArrayLike
    slots: ArrayLike
    sequences: Sequences
    rows: ArrayLike
    updates: ArrayLike
    sliding_updates: ArrayLike
    next_tokens: ArrayLike | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowInputs:
    """What the host sends for sampling. Rows of a sequence follow each other: its last token's, then its drafts'.

    Args:
      slots: int32 [B, R], the row's slot; one past the last for unused rows.
      positions: int32 [B, R], of the token that the row predicts from.
      drafts: int32 [B, R], the draft that follows the row's token; -1 for none.
      heads: bool [B, R], whether the row is the first of its sequence.
      settings: the sampling settings of the slots.
    """

    slots: ArrayLike
    positions: ArrayLike
    drafts: ArrayLike
    heads: ArrayLike
    settings: SamplingState


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Logprobs:
    """Log-probabilities [...] of chosen tokens, and those and the ids [..., TOP_LOGPROBS] of the most likely ones."""

    chosen: jax.Array
    top: jax.Array
    top_ids: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepOutputs:
    """The sampled tokens int32 [B, R], and the log-probabilities at each row if the program has all features.

    `ends` int32 [B, R] is for the first row of each sequence the row of its newest token: those from the first row to
    this one are its new tokens. Programs of several steps have no drafts, so no `ends`; their tokens and
    log-probabilities have another axis for the steps at the end.
    """

    tokens: jax.Array
    ends: jax.Array | None
    logprobs: Logprobs | None


@dataclasses.dataclass(frozen=True)
class Structure:
    """A model without its weights. These are passed as a list: walking an nnx.State costs the host more than a step."""

    graph: nnx.GraphDef[GptOss]
    treedef: jax.tree_util.PyTreeDef

    @classmethod
    def of(cls, model: GptOss) -> tuple[Structure, list[jax.Array]]:
        """A model's structure and its weights, which may be abstract."""
        graph, state = nnx.split(model)
        weights, treedef = jax.tree.flatten(state)
        return cls(graph, treedef), weights

    def model(self, weights: list[jax.Array]) -> GptOss:
        """The model with these weights."""
        return nnx.merge(self.graph, jax.tree.unflatten(self.treedef, weights))


@dataclasses.dataclass(frozen=True)
class HeadStructure:
    """What sampling needs besides the weights of the final norm [D] and of the head [V, D]."""

    partition: Partition
    eps: float


def run_forward(
    structure: Structure,
    shape: StepShape,
    weights: list[jax.Array],
    state: DeviceState,
    last_BS: jax.Array,
    inputs: ForwardInputs,
) -> tuple[tuple[jax.Array, Logprobs | None], DeviceState]:
    """The hidden states [B, R, D] of a step's rows, the log-probabilities of all its tokens, and the new state."""
    model = structure.model(weights)
    with model.partition.active():
        x_BTD, state = _forward(model, _updated(state, inputs), last_BS, inputs, max_queries=None)
        logprobs = _prompt_logprobs(model, x_BTD, inputs) if shape.prompt_logprobs else None
        rows_BRD = _take(x_BTD, jnp.asarray(inputs.rows))
        return (constrain(rows_BRD, TABLES), _whole(logprobs)), state


def run_sampling(
    head: HeadStructure,
    shape: StepShape,
    weights: tuple[jax.Array, jax.Array],
    generated: Generated,
    rows_BXD: jax.Array,
    inputs: RowInputs,
    adjustments: AdjustedRows | None,
) -> tuple[StepOutputs, Generated]:
    """Sample from the first R of a forward pass's rows. The outputs are whole on every device."""
    with head.partition.active():
        logits_BRV = unembed(rows_BXD[:, : shape.rows], *weights, eps=head.eps)
        outputs, generated = _sample(logits_BRV, generated, inputs, adjustments, shape)
        return _whole(outputs), generated


def run_decode(
    structure: Structure,
    shape: StepShape,
    weights: list[jax.Array],
    state: DeviceState,
    generated: Generated,
    inputs: ForwardInputs,
    rows: RowInputs,
    adjustments: AdjustedRows | None,
) -> tuple[StepOutputs, tuple[DeviceState, Generated]]:
    """Several decode steps of sequences with one token each, which are the rows.

    What differs between steps is computed from the step's number: arrays that the loop carried would be copied in each.
    """
    model = structure.model(weights)

    def step(carry: tuple[DeviceState, Generated], number: jax.Array) -> tuple[Any, StepOutputs]:
        state, generated = carry
        own_inputs, own_rows = _inputs_of(inputs, number), _rows_of(rows, number)
        x_BRD, state = _forward(model, state, generated.last, own_inputs, max_queries=1)
        logits_BRV = unembed(x_BRD, model.norm[...], model.lm_head[...], eps=model.config.rms_norm_eps)
        outputs, generated = _sample(logits_BRV, generated, own_rows, adjustments, shape)
        return (state, generated), outputs

    with model.partition.active():
        carry, outputs = jax.lax.scan(step, (_updated(state, inputs), generated), jnp.arange(shape.steps))
        state, generated = carry
        outputs = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 2), outputs)
        return _whole(outputs), (state, generated)


def run_updates(
    partition: Partition, state: DeviceState, updates: jax.Array, sliding_updates: jax.Array
) -> DeviceState:
    """Change the page tables, by more than a step's own updates hold."""
    with partition.active():
        return _with_entries(state, updates, sliding_updates)


def _whole[Tree](tree: Tree) -> Tree:
    return jax.tree.map(lambda x: constrain(x, (None,) * x.ndim), tree)


def _inputs_of(inputs: ForwardInputs, number: jax.Array) -> ForwardInputs:
    """Of a decode step; after the first, it takes each slot's newest token, so many positions on."""
    positions_BT, sequences = jnp.asarray(inputs.positions), inputs.sequences
    lengths_BN = jnp.where(sequences.counts_BN > 0, sequences.lengths_BN + number, 0)
    return dataclasses.replace(
        inputs,
        tokens=jnp.where(number == 0, jnp.asarray(inputs.tokens), -1),
        positions=jnp.where(positions_BT < 0, -1, positions_BT + number),
        sequences=sequences._replace(lengths_BN=lengths_BN),
    )


def _rows_of(rows: RowInputs, number: jax.Array) -> RowInputs:
    return dataclasses.replace(rows, positions=jnp.asarray(rows.positions) + number)


def _forward(
    model: GptOss, state: DeviceState, last_BS: jax.Array, inputs: ForwardInputs, max_queries: int | None
) -> tuple[jax.Array, DeviceState]:
    """The last hidden states [B, T, D] of all tokens, and the state with their keys."""
    tokens_BT, positions_BT, slots_BT = map(jnp.asarray, (inputs.tokens, inputs.positions, inputs.slots))
    tokens_BT = jnp.where(tokens_BT < 0, _take(last_BS, slots_BT), tokens_BT)
    size = state.cache.stores[0].shape[1]
    full, sliding = (
        Addresses(tables, page_of(tables, slots_BT, positions_BT, size))
        for tables in (state.tables, state.sliding_tables)
    )
    sequences = jax.tree.map(jnp.asarray, inputs.sequences)
    kv = StepCache(state.cache, sequences, full, sliding, max_queries)
    x_BTD, kv = model.hidden(tokens_BT, positions_BT, kv)
    return x_BTD, dataclasses.replace(state, cache=kv.cache)


def _updated(state: DeviceState, inputs: ForwardInputs) -> DeviceState:
    """The state with the step's changes of the page tables."""
    return _with_entries(state, jnp.asarray(inputs.updates), jnp.asarray(inputs.sliding_updates))


def _with_entries(state: DeviceState, updates_BU3: jax.Array, sliding_updates_BU3: jax.Array) -> DeviceState:
    def put(tables_BRM: jax.Array, updates_BU3: jax.Array) -> jax.Array:
        slots, entries, pages = updates_BU3[0].T
        return tables_BRM.at[0, slots, entries].set(pages, mode="drop")

    def updated(tables: jax.Array, updates: jax.Array) -> jax.Array:
        args = {"tables_BRM": (tables, TABLES), "updates_BU3": (updates, TABLES)}
        return on_shards(put, args, TABLES, batch=len(tables))

    return dataclasses.replace(
        state,
        tables=updated(state.tables, updates_BU3),
        sliding_tables=updated(state.sliding_tables, sliding_updates_BU3),
    )


def _take(values_BN: jax.Array, index_BR: jax.Array) -> jax.Array:
    """values[b, index[b]], on each rank by itself."""

    def take(values: jax.Array, index: jax.Array) -> jax.Array:
        return jax.vmap(lambda v, i: v[i])(values, index)

    axes: tuple[str | None, ...] = ("batch", *(None,) * (values_BN.ndim - 1))
    args = {"values": (values_BN, axes), "index": (index_BR, ROWS)}
    return on_shards(take, args, axes, batch=len(values_BN))


def _put(values_BS: jax.Array, slots_BR: jax.Array, new_BR: jax.Array) -> jax.Array:
    """values[b, slots[b]] = new[b] on each rank by itself; slots past the last are dropped."""

    def put(values: jax.Array, slots: jax.Array, new: jax.Array) -> jax.Array:
        return jax.vmap(lambda v, s, n: v.at[s].set(n, mode="drop"))(values, slots, new)

    args = {"values": (values_BS, ROWS), "slots": (slots_BR, ROWS), "new": (new_BR, ROWS)}
    return on_shards(put, args, ROWS, batch=len(values_BS))


def _sample(
    logits_BRV: jax.Array,
    generated: Generated,
    inputs: RowInputs,
    adjustments: AdjustedRows | None,
    shape: StepShape,
) -> tuple[StepOutputs, Generated]:
    """A token for each row, which drafts are accepted, and what the next step needs to know of them."""
    slots_BR, positions_BR, drafts_BR, heads_BR = (
        jnp.asarray(x) for x in (inputs.slots, inputs.positions, inputs.drafts, inputs.heads)
    )
    slots = generated.last.shape[1]
    at_BR = jnp.minimum(slots_BR, slots - 1)
    settings = jax.tree.map(lambda x: _take(jnp.asarray(x), at_BR), inputs.settings)
    choose = partial(sample, state=settings, positions_R=positions_BR)
    if adjustments is None:
        tokens_BR = choose(logits_BRV, cuts=shape.features != "plain")
    else:
        tokens_BR = choose(_adjusted(logits_BRV, adjustments, generated, at_BR))
    newest_BR, ends_BR = tokens_BR, None
    if not shape.tokens:
        # A draft is accepted if all before it are and it equals the sampled token: exact for greedy and random rows.
        rows = jnp.arange(drafts_BR.shape[1], dtype=jnp.int32)
        last_BR = jnp.where(tokens_BR == drafts_BR, len(rows), rows)
        ends_BR = jax.lax.cummin(last_BR, axis=1, reverse=True)
        newest_BR = jnp.take_along_axis(tokens_BR, ends_BR, axis=1)
        slots_BR = jnp.where(heads_BR, slots_BR, slots)
    logprobs = None
    if shape.features in ("all", "penalties"):
        top = min(TOP_LOGPROBS, logits_BRV.shape[-1])
        logprobs = Logprobs(*logprobs_of(logits_BRV, tokens_BR, top))
    return StepOutputs(tokens_BR, ends_BR, logprobs), _remember(generated, slots_BR, newest_BR)


def _adjusted(logits_BRV: jax.Array, of: AdjustedRows, generated: Generated, slots_BR: jax.Array) -> jax.Array:
    """The logits with the adjustments of some rows, and the device's token counts for their penalties."""
    rows_BK, by = jnp.asarray(of.rows), of.by
    at_BK = jnp.minimum(rows_BK, slots_BR.shape[1] - 1)
    if generated.counts is None or generated.in_prompt is None or by.penalties is None:
        by = dataclasses.replace(by, penalties=None)
    else:
        slots_BK = jnp.take_along_axis(slots_BR, at_BK, axis=1)
        counts, in_prompt = _take(generated.counts, slots_BK), _take(generated.in_prompt, slots_BK)
        penalties = dataclasses.replace(by.penalties, counts=counts, in_prompt=in_prompt)
        by = dataclasses.replace(by, penalties=penalties)
    adjusted_BKV = adjust(jnp.take_along_axis(logits_BRV, at_BK[..., None], axis=1), by)
    return jax.vmap(lambda logits, rows, new: logits.at[rows].set(new, mode="drop"))(
        logits_BRV, rows_BK, adjusted_BKV
    )


def _remember(generated: Generated, slots_BR: jax.Array, tokens_BR: jax.Array) -> Generated:
    """Keep the newest token of each slot and count it; slots past the last are dropped."""
    generated = dataclasses.replace(generated, last=_put(generated.last, slots_BR, tokens_BR))
    if generated.counts is None:
        return generated

    def count(counts: jax.Array, slots: jax.Array, tokens: jax.Array) -> jax.Array:
        return jax.vmap(lambda c, s, t: c.at[s, t].add(1, mode="drop"))(counts, slots, tokens)

    args = {"counts": (generated.counts, TABLES), "slots": (slots_BR, ROWS), "tokens": (tokens_BR, ROWS)}
    return dataclasses.replace(generated, counts=on_shards(count, args, TABLES, batch=len(slots_BR)))


def _prompt_logprobs(model: GptOss, x_BTD: jax.Array, inputs: ForwardInputs) -> Logprobs:
    """Of the token after each token [B, T], a few positions at a time, since logits are large."""
    next_BT = jnp.maximum(jnp.asarray(inputs.next_tokens), 0)
    some = next(n for n in (64, 32, 16, 8, 4, 2, 1) if x_BTD.shape[1] % n == 0)

    def positions(args: tuple[jax.Array, jax.Array]) -> Logprobs:
        x, tokens = args
        logits = model.unembed(x)
        return Logprobs(*logprobs_of(logits, tokens, min(TOP_LOGPROBS, logits.shape[-1])))

    def split(x: jax.Array) -> jax.Array:
        return x.reshape(len(x), -1, some, *x.shape[2:]).swapaxes(0, 1)

    parts = jax.lax.map(positions, (split(x_BTD), split(next_BT)))
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(*next_BT.shape, *x.shape[3:]), parts)


def seed_key(seed: int) -> np.ndarray:
    """uint32 [2] for a seed of 64 bits."""
    return np.asarray([seed >> 32 & 0xFFFFFFFF, seed & 0xFFFFFFFF], np.uint32)
