"""The compiled step: some sequences decode, others prefill a chunk, all in one pass through the model.

After the pass tokens are chosen. Both are one program, but where masks say which tokens may come: those depend on the
tokens of the step before, and the pass need not wait until the host has seen them.

A step's tokens are laid out as [B, T]: B parts of the batch, one for each device group that the mesh's batch axes
make (1 on one device), and in each part first the decoding sequences' tokens, then the prefilling ones'.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike

from gptoss_jax.engine.adjusting import Adjustments, adjust
from gptoss_jax.engine.sampling import SamplingMode, SamplingState, logprobs_of, sample
from gptoss_jax.model.gpt_oss import GptOss
from gptoss_jax.model.kv_cache import KVCache, Segments, StepCache
from sharding import Partition, constrain, on_shards

TOP_LOGPROBS = 20
"""How many of the likeliest tokens a step that reports log-probabilities reports."""


@dataclasses.dataclass(frozen=True)
class StepShape:
    """What is compiled: sizes in each part of the batch, and what is computed besides the next tokens.

    Args:
      decodes: sequences that decode, each with its last token and `drafts` guesses of those after it.
      prefills: sequences that prefill, each a chunk of `chunk` tokens.
      pages: pages in a sequence's table.
      rounds: decode steps in a row, when there are no prompts, guesses or masks; the host works once for all of them.
      logprobs: report log-probabilities of new tokens.
      prompt_logprobs: report those of the chunks' tokens.
      adjusted: apply biases to the logits, and penalties and masks where they are needed, too.
      penalised: apply penalties, and count what is generated.
      masked: apply masks; the pass through the model and the choosing are then programs of their own.
      sampling: what tokens are chosen by.
    """

    decodes: int
    prefills: int
    chunk: int
    pages: int
    drafts: int = 0
    rounds: int = 1
    logprobs: bool = False
    prompt_logprobs: bool = False
    adjusted: bool = False
    penalised: bool = False
    masked: bool = False
    sampling: SamplingMode = "greedy"

    @property
    def of_pass(self) -> StepShape:
        """What the pass alone depends on."""
        return dataclasses.replace(
            self, logprobs=False, adjusted=False, penalised=False, masked=False, sampling="greedy"
        )

    @property
    def of_choice(self) -> StepShape:
        """What the choosing alone depends on."""
        return dataclasses.replace(self, chunk=1, pages=0, prompt_logprobs=False)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DeviceState:
    """What stays on the device between steps; `last` int32 [B, slots] is each running sequence's last token.

    `counts` int32 and `in_prompt` bool [B, slots, V] exist once a request has penalties.
    """

    cache: KVCache
    last: jax.Array
    counts: jax.Array | None = None
    in_prompt: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepInputs:
    """What the host says of a step; everything of padding has position -1.

    Args:
      decode: the decoding sequences' segments [B, S, ...].
      decode_positions: int32 [B, S], of their last tokens.
      drafts: int32 [B, S, drafts], -1 for none.
      prefill: the prefilling sequences' segments [B, N, ...].
      prefill_tokens, prefill_positions: int32 [B, N, chunk].
      next_tokens: int32 [B, N, chunk], what follows each prompt token, for its log-probability; -1 for none.
      finishing: bool [B, N], whether the chunk ends its prompt, so that a token is sampled after it.
      sampling: the settings of the S + N sequences.
    """

    decode: Segments
    decode_positions: ArrayLike
    drafts: ArrayLike
    prefill: Segments
    prefill_tokens: ArrayLike
    prefill_positions: ArrayLike
    next_tokens: ArrayLike
    finishing: ArrayLike
    sampling: SamplingState


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Logprobs:
    """Log-probabilities [...] of some tokens, and those and ids [..., TOP_LOGPROBS] of the likeliest instead."""

    chosen: jax.Array
    top: jax.Array
    top_ids: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """What a pass leaves on the device to choose from, with what the choosing needs of the inputs.

    Args:
      logits, positions: float32 [B, R, V] and int32 [B, R], of the R = S (1 + drafts) + N rows to be sampled.
      sampling: their settings.
      drafts: int32 [B, S, drafts].
      slots: int32 [B, S + N], of the sequences.
      choosing: bool [B, S + N], which of them get a token.
      prompt_logprobs: those of the chunks' tokens, [B, N, chunk, ...].
    """

    logits: jax.Array
    positions: jax.Array
    sampling: SamplingState
    drafts: jax.Array
    slots: jax.Array
    choosing: jax.Array
    prompt_logprobs: Logprobs | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepOutputs:
    """New tokens int32: `first` [B, N]; `decoded` [B, S, rounds + drafts], of which the first 1 + `accepted` [B, S]."""

    decoded: jax.Array
    accepted: jax.Array
    first: jax.Array
    decode_logprobs: Logprobs | None
    first_logprobs: Logprobs | None
    prompt_logprobs: Logprobs | None


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


def run_step(
    structure: Structure,
    kind: StepShape,
    weights: list[jax.Array],
    state: DeviceState,
    inputs: StepInputs,
    adjustments: Adjustments | None = None,
) -> tuple[StepOutputs, DeviceState]:
    """One step, with `adjustments` if it is adjusted. Its outputs are whole on every device, its state stays put."""
    model = structure.model(weights)
    with model.partition.active():
        if kind.rounds > 1:
            outputs, state = _rounds(model, kind, state, inputs, adjustments)
        else:
            outputs, state = _one_step(model, kind, state, inputs, adjustments)
        return _whole(outputs), state


def run_pass(
    structure: Structure,
    kind: StepShape,
    weights: list[jax.Array],
    state: DeviceState,
    inputs: StepInputs,
) -> tuple[Rows, DeviceState]:
    """A step up to the rows to choose from; `run_choice` is the rest of it."""
    model = structure.model(weights)
    with model.partition.active():
        return _pass(model, kind, state, inputs)


def run_choice(
    partition: Partition, kind: StepShape, rows: Rows, state: DeviceState, adjustments: Adjustments
) -> tuple[StepOutputs, DeviceState]:
    """The rest of a step after its pass. Outputs and state are as `run_step`'s."""
    with partition.active():
        outputs, state = _choose(kind, state, rows, adjustments)
        return _whole(outputs), state


def _whole(outputs: StepOutputs) -> StepOutputs:
    return jax.tree.map(lambda x: constrain(x, (None,) * x.ndim), outputs)


def _rounds(
    model: GptOss, kind: StepShape, state: DeviceState, inputs: StepInputs, adjustments: Adjustments | None
) -> tuple[StepOutputs, DeviceState]:
    """Decode steps one after the other: each takes the tokens that the one before left on the device."""
    type Decoded = tuple[jax.Array, Logprobs | None]

    def one(carry: tuple[DeviceState, jax.Array], _: None) -> tuple[tuple[DeviceState, jax.Array], Decoded]:
        state, positions_BS = carry
        now = dataclasses.replace(inputs, decode_positions=positions_BS)
        outputs, state = _one_step(model, kind, state, now, adjustments)
        decoded = jax.tree.map(lambda x: x[:, :, 0], (outputs.decoded, outputs.decode_logprobs))
        return (state, jnp.where(positions_BS < 0, -1, positions_BS + 1)), decoded

    first_BS = jnp.asarray(inputs.decode_positions)
    (state, _), by_round = jax.lax.scan(one, (state, first_BS), None, length=kind.rounds)
    decoded_BSr, logprobs = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 2), by_round)
    accepted_BS = jnp.full_like(first_BS, kind.rounds - 1)
    no_first_BN = jnp.zeros((len(first_BS), 0), jnp.int32)
    return StepOutputs(decoded_BSr, accepted_BS, no_first_BN, logprobs, None, None), state


def _one_step(
    model: GptOss, kind: StepShape, state: DeviceState, inputs: StepInputs, adjustments: Adjustments | None = None
) -> tuple[StepOutputs, DeviceState]:
    rows, state = _pass(model, kind, state, inputs)
    return _choose(kind, state, rows, adjustments)


def _pass(model: GptOss, kind: StepShape, state: DeviceState, inputs: StepInputs) -> tuple[Rows, DeviceState]:
    """Through the model, up to logits."""
    tokens_BT, positions_BT = _tokens(state, inputs, kind)
    kv = StepCache(state.cache, (inputs.decode, inputs.prefill), (1 + kind.drafts, kind.chunk))
    x_BTD, kv = model.hidden(tokens_BT, positions_BT, kv)
    x_BRD, positions_BR = _rows_to_sample(x_BTD, positions_BT, kind)
    rows = Rows(
        logits=model.unembed(x_BRD),
        positions=positions_BR,
        sampling=jax.tree.map(lambda x: _by_row(jnp.asarray(x), kind), inputs.sampling),
        drafts=jnp.asarray(inputs.drafts),
        slots=jnp.concatenate([inputs.decode.slots, inputs.prefill.slots], axis=1),
        choosing=jnp.concatenate([jnp.asarray(inputs.decode_positions) >= 0, inputs.finishing], axis=1),
        prompt_logprobs=_prompt_logprobs(model, x_BTD, inputs, kind) if kind.prompt_logprobs else None,
    )
    return rows, dataclasses.replace(state, cache=kv.cache)


def _choose(
    kind: StepShape, state: DeviceState, rows: Rows, adjustments: Adjustments | None
) -> tuple[StepOutputs, DeviceState]:
    """From logits to tokens, and what the next step needs to know of them."""
    logits_BRV = rows.logits
    if kind.adjusted:
        assert adjustments is not None
        logits_BRV = adjust(logits_BRV, _by_rows(adjustments, state, rows, kind))
    sampled_BR = sample(logits_BRV, rows.sampling, rows.positions, kind.sampling)
    outputs = _outputs(kind, rows, sampled_BR)
    return outputs, _next_state(state, rows, outputs, kind)


def _tokens(state: DeviceState, inputs: StepInputs, kind: StepShape) -> tuple[jax.Array, jax.Array]:
    """Tokens and positions int32 [B, T] of the whole step."""
    last_BS1 = _take(state.last, jnp.asarray(inputs.decode.slots))[..., None]
    drafts_BSd = jnp.asarray(inputs.drafts)
    decoded_BSd = jnp.concatenate([last_BS1, jnp.maximum(drafts_BSd, 0)], axis=-1)
    start_BS1 = jnp.asarray(inputs.decode_positions)[..., None]
    later_BSd = jnp.where(drafts_BSd >= 0, start_BS1 + 1 + jnp.arange(kind.drafts), -1)
    positions_BSd = jnp.concatenate([start_BS1, later_BSd], axis=-1)
    parts = len(start_BS1)
    join = partial(jnp.concatenate, axis=1)
    return (
        join([decoded_BSd.reshape(parts, -1), jnp.asarray(inputs.prefill_tokens).reshape(parts, -1)]),
        join([positions_BSd.reshape(parts, -1), jnp.asarray(inputs.prefill_positions).reshape(parts, -1)]),
    )


def _take(values_BN: jax.Array, index_BR: jax.Array) -> jax.Array:
    """values[b, index[b]], each part of the batch by itself."""

    def take(values: jax.Array, index: jax.Array) -> jax.Array:
        return jax.vmap(lambda v, i: v[i])(values, index)

    axes: tuple[str | None, ...] = ("batch", *(None,) * (values_BN.ndim - 1))
    args = {"values": (values_BN, axes), "index": (index_BR, ("batch", None))}
    return on_shards(take, args, axes, batch=len(values_BN))


def _rows_to_sample(x_BTD: jax.Array, positions_BT: jax.Array, kind: StepShape) -> tuple[jax.Array, jax.Array]:
    """Hidden states and positions of all decoding tokens, then of each chunk's last."""
    decodes = kind.decodes * (1 + kind.drafts)
    chunks_BNC = positions_BT[:, decodes:].reshape(len(positions_BT), kind.prefills, kind.chunk)
    last_BN = jnp.argmax(chunks_BNC, axis=-1) + decodes + jnp.arange(kind.prefills) * kind.chunk
    index_BR = jnp.concatenate([jnp.broadcast_to(jnp.arange(decodes), (len(last_BN), decodes)), last_BN], axis=1)
    return _take(x_BTD, index_BR), _take(positions_BT, index_BR)


def _by_row(per_sequence: jax.Array, kind: StepShape) -> jax.Array:
    """[B, S + N, ...] of the sequences -> [B, R, ...] of the rows that are sampled."""
    decodes = jnp.repeat(per_sequence[:, : kind.decodes], 1 + kind.drafts, axis=1)
    return jnp.concatenate([decodes, per_sequence[:, kind.decodes :]], axis=1)


def _by_rows(of: Adjustments, state: DeviceState, rows: Rows, kind: StepShape) -> Adjustments:
    """Of the sequences -> of the rows, with the device's counts."""
    if of.penalties is not None:
        assert state.counts is not None
        assert state.in_prompt is not None
        counts, in_prompt = _take(state.counts, rows.slots), _take(state.in_prompt, rows.slots)
        penalties = dataclasses.replace(of.penalties, counts=counts, in_prompt=in_prompt)
        of = dataclasses.replace(of, penalties=penalties)
    return jax.tree.map(lambda x: _by_row(jnp.asarray(x), kind), of)


def _outputs(kind: StepShape, rows: Rows, sampled_BR: jax.Array) -> StepOutputs:
    parts, decodes = len(sampled_BR), kind.decodes * (1 + kind.drafts)

    def decode_part(x: jax.Array) -> jax.Array:
        return x[:, :decodes].reshape(parts, kind.decodes, 1 + kind.drafts, *x.shape[2:])

    decoded_BSd, first_BN = decode_part(sampled_BR), sampled_BR[:, decodes:]
    # A draft is accepted if all before it are and it equals the sampled token: exact in every sampling mode.
    stands_BSd = decoded_BSd[..., :-1] == rows.drafts
    accepted_BS = jnp.sum(jnp.cumprod(stands_BSd.astype(jnp.int32), axis=-1), axis=-1)
    if not kind.logprobs:
        return StepOutputs(decoded_BSd, accepted_BS, first_BN, None, None, rows.prompt_logprobs)
    logprobs = Logprobs(*logprobs_of(rows.logits, sampled_BR, min(TOP_LOGPROBS, rows.logits.shape[-1])))
    decode_logprobs = jax.tree.map(decode_part, logprobs)
    first_logprobs = jax.tree.map(lambda x: x[:, decodes:], logprobs)
    return StepOutputs(decoded_BSd, accepted_BS, first_BN, decode_logprobs, first_logprobs, rows.prompt_logprobs)


def _prompt_logprobs(model: GptOss, x_BTD: jax.Array, inputs: StepInputs, kind: StepShape) -> Logprobs:
    """Of the token after each of the chunks' tokens, a few positions at a time: logits are large."""
    x_BND = x_BTD[:, kind.decodes * (1 + kind.drafts) :]
    next_BN = jnp.asarray(inputs.next_tokens).reshape(len(x_BND), -1)
    some = next(n for n in (64, 32, 16, 8, 4, 2, 1) if x_BND.shape[1] % n == 0)

    def positions(args: tuple[jax.Array, jax.Array]) -> Logprobs:
        x, tokens = args
        logits = model.unembed(x)
        return Logprobs(*logprobs_of(logits, jnp.maximum(tokens, 0), min(TOP_LOGPROBS, logits.shape[-1])))

    def split(x: jax.Array) -> jax.Array:
        return x.reshape(len(x), -1, some, *x.shape[2:]).swapaxes(0, 1)

    parts = jax.lax.map(positions, (split(x_BND), split(next_BN)))
    return jax.tree.map(
        lambda x: x.swapaxes(0, 1).reshape(len(x_BND), kind.prefills, kind.chunk, *x.shape[3:]), parts
    )


def _next_state(state: DeviceState, rows: Rows, outputs: StepOutputs, kind: StepShape) -> DeviceState:
    """Remember each sequence's last token, and count what it generated."""
    newest_BS = jnp.take_along_axis(outputs.decoded, outputs.accepted[..., None], axis=-1)[..., 0]
    tokens_BN = jnp.concatenate([newest_BS, outputs.first], axis=1)
    # A chunk's sequence and an idle row may name the same slot, so what is not chosen must not be written.
    slots_BN = jnp.where(rows.choosing, rows.slots, state.last.shape[1])

    def put(last: jax.Array, slots: jax.Array, tokens: jax.Array) -> jax.Array:
        return jax.vmap(lambda l, s, t: l.at[s].set(t, mode="drop"))(last, slots, tokens)

    def count(last: jax.Array, slots: jax.Array, tokens: jax.Array) -> jax.Array:
        return jax.vmap(lambda l, s, t: l.at[s, t].add(1, mode="drop"))(last, slots, tokens)

    index = {"slots": (slots_BN, ("batch", None)), "tokens": (tokens_BN, ("batch", None))}
    last = on_shards(put, {"last": (state.last, ("batch", None)), **index}, ("batch", None), batch=len(slots_BN))
    state = dataclasses.replace(state, last=last)
    if kind.penalised:
        assert state.counts is not None
        axes = ("batch", None, None)
        counts = on_shards(count, {"last": (state.counts, axes), **index}, axes, batch=len(slots_BN))
        state = dataclasses.replace(state, counts=counts)
    return state


def seed_key(seed: int) -> np.ndarray:
    """uint32 [2] for a seed of 64 bits."""
    return np.asarray([seed >> 32 & 0xFFFFFFFF, seed & 0xFFFFFFFF], np.uint32)
