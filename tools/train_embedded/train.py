"""The training loop: batches from worker processes, AdamW, and saved checkpoints."""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import multiprocessing
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from gptoss_jax.checkpoints.writer import save_weights
from gptoss_jax.model.config import ModelConfig, RopeConfig
from gptoss_jax.model.gpt_oss import weight_specs
from gptoss_jax.text.tokenizer import Tokenizer
from tools.train_embedded.tokens import Batch, make_worker_batch, train_tokenizer, use_tokenizer
from tools.train_embedded.trainee import (
    PackedRows,
    Parameters,
    Trainee,
    initial_parameters,
    packed_names,
    rounding_creator,
    saving_creator,
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """Training settings. `minutes` limits the time of training and shortens its schedule accordingly."""

    output: Path
    steps: int = 4500
    minutes: float = math.inf
    rows: int = 96
    length: int = 640
    learning_rate: float = 2e-3
    warmup: int = 300
    weight_decay: float = 0.05
    balance: float = 0.01
    seed: int = 0
    vocab_size: int = 1024
    layers: int = 6
    workers: int = 4
    save_every_minutes: float = 3.0


class State(NamedTuple):
    """Master weights and the optimiser's moments."""

    parameters: Parameters
    optimiser: optax.OptState


def model_config(tokenizer: Tokenizer, layers: int) -> ModelConfig:
    """A small gpt-oss with every mechanism of the released models, including 128-key windows and YaRN."""
    stops = ("<|return|>", "<|call|>")
    return ModelConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=256,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        num_local_experts=8,
        num_experts_per_tok=2,
        layer_types=tuple(("sliding_attention", "full_attention")[i % 2] for i in range(layers)),
        max_position_embeddings=4096,
        rope=RopeConfig(),
        eos_token_id=tuple(tokenizer.encode_special(name) for name in stops),
    )


def train(settings: Settings) -> None:
    """Train the tokenizer and the model, and write both to `settings.output`."""
    settings.output.mkdir(parents=True, exist_ok=True)
    train_tokenizer(settings.output / "tokenizer.json", settings.vocab_size, 20_000, settings.seed)
    tokenizer = Tokenizer.from_dir(settings.output)
    config = model_config(tokenizer, settings.layers)
    parameters = initial_parameters(config, settings.seed)
    size = sum(p.size for p in parameters.values())
    print(f"{size / 1e6:.2f} M parameters on {jax.devices()[0].device_kind}", flush=True)
    optimiser = optimiser_of(settings)
    state = State(parameters, optimiser.init(parameters))
    step_fn = jax.jit(functools.partial(train_step, config, settings.balance, optimiser), donate_argnums=0)
    start = saved = time.monotonic()
    losses: list[jax.Array] = []
    for step, batch in enumerate(batches(settings, tokenizer)):
        now = time.monotonic()
        if step == 1:  # The first step includes compilation, which the schedule excludes.
            start = now
        progress = max(step / settings.steps, (now - start) / 60 / settings.minutes)
        if progress >= 1:
            break
        state, metrics = step_fn(state, batch, learning_rate(settings, step, progress))
        losses.append(metrics)
        if step % 50 == 0 or step == 5:
            _report(step, progress, now - start, losses, settings)
            losses = losses[-1:]
        if now - saved > 60 * settings.save_every_minutes:
            save(settings.output, config, state.parameters)
            saved = now
    save(settings.output, config, state.parameters)


def _report(step: int, progress: float, seconds: float, metrics: list[jax.Array], settings: Settings) -> None:
    loss, accuracy, balance = jnp.mean(jnp.stack(metrics), axis=0)
    rate = step * settings.rows * settings.length / max(seconds, 1e-9)
    print(
        f"step {step:5d}  {progress:6.1%}  {seconds:5.0f} s  loss {loss:.4f}  next token {accuracy:.4f}  "
        f"balance {balance:.3f}  {rate / 1e3:.0f} k tokens/s",
        flush=True,
    )


def learning_rate(settings: Settings, step: int, progress: float) -> float:
    """Linear warm-up and cosine decay to 0 as progress goes from 0 to 1."""
    warm = min(1.0, (step + 1) / settings.warmup)
    return settings.learning_rate * warm * (0.5 + 0.5 * math.cos(math.pi * progress))


def optimiser_of(settings: Settings) -> optax.GradientTransformation:
    """AdamW without the learning rate, which `train_step` applies; weight decay only for matrices."""
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(b1=0.9, b2=0.95, eps=1e-8),
        optax.add_decayed_weights(
            settings.weight_decay,
            mask=lambda tree: {name: p.ndim > 1 and "bias" not in name for name, p in tree.items()},
        ),
    )


def train_step(
    config: ModelConfig,
    balance: float,
    optimiser: optax.GradientTransformation,
    state: State,
    batch: Batch,
    rate: jax.Array,
) -> tuple[State, jax.Array]:
    """One update; the metrics are [loss, accuracy on learned tokens, load-balancing loss]."""
    loss = functools.partial(loss_of, config, balance)
    (_, metrics), gradients = jax.value_and_grad(loss, has_aux=True)(state.parameters, batch)
    updates, moments = optimiser.update(gradients, state.optimiser, state.parameters)
    parameters = jax.tree.map(lambda p, u: p - rate * u, state.parameters, updates)
    return State(parameters, moments), metrics


def loss_of(
    config: ModelConfig, balance: float, parameters: Parameters, batch: Batch
) -> tuple[jax.Array, jax.Array]:
    """Cross entropy of the learned tokens plus the weighted load-balancing loss, and the metrics."""
    floats = dataclasses.replace(config, quantization=None)
    model = Trainee(floats, rounding_creator(parameters, packed_names(config)))
    tokens_BT, positions_BT, segments_BT, learned_BT = map(jnp.asarray, batch)
    x_BTD, _ = model.hidden(tokens_BT, positions_BT, PackedRows(segments_BT))
    logits_BTV = model.unembed(x_BTD[:, :-1])
    learned_BT, targets_BT = learned_BT[:, 1:], tokens_BT[:, 1:]
    count = jnp.maximum(learned_BT.sum(), 1)
    each_BT = optax.softmax_cross_entropy_with_integer_labels(logits_BTV, targets_BT)
    loss = jnp.sum(each_BT * learned_BT) / count
    right = jnp.sum((logits_BTV.argmax(-1) == targets_BT) & learned_BT) / count
    uneven = model.balance()
    return loss + balance * uneven, jnp.stack([loss, right, uneven])


def batches(settings: Settings, tokenizer: Tokenizer) -> Iterator[Batch]:
    """An endless iterator of batches, which depend on the seed but not on the number of workers."""
    ahead = 4 * settings.workers
    # Forking a process with jax's threads can deadlock.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(settings.workers, context, use_tokenizer, (settings.output,)) as pool:
        waiting: collections.deque[Future[Batch]] = collections.deque()
        step = 0
        try:
            while True:
                while len(waiting) < ahead:
                    seed = (settings.seed, 1 + step)
                    waiting.append(pool.submit(make_worker_batch, seed, settings.rows, settings.length))
                    step += 1
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def save(directory: Path, config: ModelConfig, parameters: Parameters) -> None:
    """Replace the checkpoint in `directory`, which contains the tokenizer, by a new one."""
    fresh = directory.with_name(f"{directory.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    save_weights(fresh, config, weight_specs(config), saving_creator(parameters))
    shutil.copy(directory / "tokenizer.json", fresh)
    shutil.rmtree(directory)
    fresh.rename(directory)
