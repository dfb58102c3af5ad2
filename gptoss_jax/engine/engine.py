"""The engine: requests join and leave a batch of slots that one compiled step advances together."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Iterable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from gptoss_jax.engine.params import FinishReason, SamplingParams, TokenLogprobs
from gptoss_jax.engine.sampling import SamplingState, logprobs_of, sample
from gptoss_jax.errors import UsageError
from gptoss_jax.kv_cache import KVCache
from gptoss_jax.model import GptOss

PREFILL_CHUNK = 512
"""Most prompt tokens in one step; shorter prompts are padded to a power of two."""

TOP_LOGPROBS = 20
"""How many of the likeliest tokens a step reports, so that one compiled step serves every request."""


@dataclasses.dataclass
class TokenEvent:
    """A request's next token."""

    request_id: str
    token_id: int
    logprobs: TokenLogprobs | None = None
    finish_reason: FinishReason | None = None


@dataclasses.dataclass
class _Request:
    request_id: str
    prompt: np.ndarray
    params: SamplingParams
    sampling: SamplingState
    max_tokens: int
    stop_ids: frozenset[int]
    token_ids: list[int] = dataclasses.field(default_factory=list)

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.token_ids)


class Engine:
    """Runs requests through a model; one thread at a time.

    `max_batch` requests advance together; the cache grows to the longest of them, up to the model's context.
    `eos_token_ids` end a request; None for the config's.
    """

    def __init__(
        self,
        model: GptOss,
        *,
        max_batch: int = 8,
        kv_dtype: DTypeLike | None = None,
        eos_token_ids: Iterable[int] | None = None,
    ) -> None:
        self.config, self._partition = model.config, model.partition
        self._eos = frozenset(self.config.eos_token_id if eos_token_ids is None else eos_token_ids)
        graph, self._weights = nnx.split(model)
        self._dtype = kv_dtype or model.embed_tokens[...].dtype
        self._waiting: deque[_Request] = deque()
        self._slots: list[_Request | None] = [None] * max_batch
        self._cache: KVCache | None = None
        self._capacity = 0
        self._prefill = jax.jit(partial(_prefill, graph), donate_argnames="cache")
        self._decode = jax.jit(partial(_decode, graph), donate_argnames="cache")

    @property
    def unfinished(self) -> int:
        """Requests that wait or run."""
        return len(self._waiting) + sum(slot is not None for slot in self._slots)

    def add(self, request_id: str, prompt_token_ids: Sequence[int], params: SamplingParams) -> None:
        """Queue a request. Raises UsageError for one that can never run, with the numbers."""
        prompt = np.asarray(prompt_token_ids, np.int64)
        vocab, context = self.config.vocab_size, self.config.max_position_embeddings
        if prompt.size == 0:
            raise UsageError(f"{request_id}: the prompt has no tokens")
        if prompt.min() < 0 or prompt.max() >= vocab:
            bad = prompt[(prompt < 0) | (prompt >= vocab)][0]
            raise UsageError(f"{request_id}: prompt token {bad} is outside the vocabulary of {vocab}")
        room = context - prompt.size
        if room < (params.max_tokens or 1):
            raise UsageError(
                f"{request_id}: {prompt.size} prompt tokens and {params.max_tokens or 1} new ones exceed the "
                f"model's context of {context}"
            )
        stops = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self._eos)
        self._waiting.append(
            _Request(
                request_id,
                prompt.astype(np.int32),
                params,
                SamplingState.of([params]),
                params.max_tokens or room,
                stops,
            )
        )

    def cancel(self, request_id: str) -> bool:
        """Drop a request, waiting or running; False if there is none of that name."""
        for request in self._waiting:
            if request.request_id == request_id:
                self._waiting.remove(request)
                return True
        for slot, running in enumerate(self._slots):
            if running is not None and running.request_id == request_id:
                self._slots[slot] = None
                return True
        return False

    def step(self) -> list[TokenEvent]:
        """Advance: prefill the next waiting request if a slot is free, else decode all running ones."""
        if self._waiting and None in self._slots:
            slot = self._slots.index(None)
            request = self._slots[slot] = self._waiting.popleft()
            return [self._first_token(slot, request)]
        running = [(slot, request) for slot, request in enumerate(self._slots) if request is not None]
        return self._next_tokens(running) if running else []

    def _first_token(self, slot: int, request: _Request) -> TokenEvent:
        cache = self._cache_for(len(request.prompt) + 1)
        for start in range(0, len(request.prompt), PREFILL_CHUNK):
            chunk = request.prompt[start : start + PREFILL_CHUNK]
            padded = min(PREFILL_CHUNK, max(16, _power_of_two(len(chunk))))
            tokens = np.zeros((1, padded), np.int32)
            positions = np.full((1, padded), -1, np.int32)
            tokens[0, : len(chunk)] = chunk
            positions[0, : len(chunk)] = np.arange(start, start + len(chunk))
            result, cache = self._prefill(
                self._weights, cache, tokens, positions, np.int32(slot), request.sampling
            )
        self._cache = cache
        return self._emit(slot, request, result, 0)

    def _next_tokens(self, running: list[tuple[int, _Request]]) -> list[TokenEvent]:
        cache = self._cache_for(max(request.length for _, request in running) + 1)
        tokens = np.zeros(len(self._slots), np.int32)
        positions = np.full(len(self._slots), -1, np.int32)
        for slot, request in running:
            tokens[slot], positions[slot] = request.token_ids[-1], request.length - 1
        idle = SamplingState.of([SamplingParams(temperature=0, seed=0)])
        states = [idle if request is None else request.sampling for request in self._slots]
        sampling = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *states)
        result, self._cache = self._decode(self._weights, cache, tokens, positions, sampling)
        result = jax.device_get(result)
        return [self._emit(slot, request, result, slot) for slot, request in running]

    def _emit(self, slot: int, request: _Request, result: _Sampled, row: int) -> TokenEvent:
        token = int(result.tokens[row])
        request.token_ids.append(token)
        logprobs = None
        if request.params.logprobs is not None:
            top = slice(request.params.logprobs)
            likeliest = dict(
                zip(result.top_ids[row, top].tolist(), result.top_logprobs[row, top].tolist(), strict=True)
            )
            logprobs = TokenLogprobs(token, float(result.logprobs[row]), likeliest)
        finish: FinishReason | None = None
        if token in request.stop_ids:
            finish = "stop"
        elif len(request.token_ids) >= request.max_tokens:
            finish = "length"
        if finish:
            self._slots[slot] = None
        return TokenEvent(request.request_id, token, logprobs, finish)

    def _cache_for(self, length: int) -> KVCache:
        """The cache, grown by doubling so that a sequence of `length` fits."""
        needed = min(max(256, _power_of_two(length)), self.config.max_position_embeddings)
        if self._cache is None:
            self._cache = KVCache.empty(self.config, len(self._slots), needed, self._dtype, self._partition)
            self._capacity = needed
        elif needed > self._capacity:
            self._cache = self._cache.grown(self.config, needed, self._partition)
            self._capacity = needed
        return self._cache


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Sampled:
    tokens: jax.Array
    logprobs: jax.Array
    top_logprobs: jax.Array
    top_ids: jax.Array


def _sampled(logits_BV: jax.Array, sampling: SamplingState, positions_B: jax.Array) -> _Sampled:
    tokens_B = sample(logits_BV, sampling, positions_B)
    top = min(TOP_LOGPROBS, logits_BV.shape[-1])
    return _Sampled(tokens_B, *logprobs_of(logits_BV, tokens_B, top))


def _prefill(
    graph: nnx.GraphDef[GptOss],
    weights: nnx.State,
    cache: KVCache,
    tokens_1T: jax.Array,
    positions_1T: jax.Array,
    slot: jax.Array,
    sampling: SamplingState,
) -> tuple[_Sampled, KVCache]:
    """Run a chunk of one slot's prompt; a chunk at position 0 starts from an empty slot."""
    model = nnx.merge(graph, weights)
    own = cache.slot(slot, keep=positions_1T[0, 0] > 0)
    x_1TD, own = model.hidden(tokens_1T, positions_1T, own)
    last = jnp.sum(positions_1T >= 0) - 1
    result = _sampled(model.unembed(x_1TD[:, last]), sampling, positions_1T[:, last])
    return result, cache.with_slot(slot, own)


def _decode(
    graph: nnx.GraphDef[GptOss],
    weights: nnx.State,
    cache: KVCache,
    tokens_B: jax.Array,
    positions_B: jax.Array,
    sampling: SamplingState,
) -> tuple[_Sampled, KVCache]:
    """Run one token of every slot; idle slots have position -1."""
    model = nnx.merge(graph, weights)
    x_B1D, cache = model.hidden(tokens_B[:, None], positions_B[:, None], cache)
    return _sampled(model.unembed(x_B1D[:, 0]), sampling, positions_B), cache


def _power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()
