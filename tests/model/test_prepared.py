"""Experts in the kernels' layout: bit-exact on any mesh, and the whole model run with interpreted kernels."""

import collections
import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptoss_jax.checkpoints.loading import random_model
from gptoss_jax.engine.engine import Engine
from gptoss_jax.engine.options import EngineOptions
from gptoss_jax.engine.step import Structure
from gptoss_jax.model.gpt_oss import weight_specs
from gptoss_jax.model.mxfp4 import MXFP4Tensor
from gptoss_jax.model.placement import partition_for, place, preparer
from gptoss_jax.model.weights import WeightSpec, abstract_creator, random_creator
from gptoss_jax.types import SamplingParams
from pallas_kernels import use_backend
from pallas_kernels.mxfp4_matmul.gpu_layout import GpuExperts, released
from sharding import on_shards
from tests.engine.schedules import TINY

CONFIG = dataclasses.replace(TINY, intermediate_size=160, max_position_embeddings=128)
AXES = {
    "gate_up_proj": ("experts", "expert_gate_up", "hidden"),
    "down_proj": ("experts", "hidden", "expert_intermediate"),
}


@pytest.mark.parametrize("mesh", [None, "data=2,expert=2,tensor=2", "tensor=8", "expert=4,tensor=2"])
@pytest.mark.parametrize("name", AXES)
def test_prepared_experts_hold_the_released_bits(mesh: str | None, name: str) -> None:
    """Abstract weights must have the same shapes and shardings as real ones."""
    partition = partition_for(CONFIG, mesh)
    [declared] = (s for s in weight_specs(CONFIG) if s.name.endswith(f"layers.1.mlp.experts.{name}"))
    spec = place(declared, partition) if mesh else declared
    where = lambda spec: partition.sharding(spec.axes)  # noqa: E731
    weight = random_creator(jax.random.key(0), sharding=where)(spec)
    with use_backend("triton"):
        prepare = preparer(partition)
        prepared, abstract = prepare(weight, spec), prepare(abstract_creator(sharding=where)(spec), spec)
    assert isinstance(prepared, GpuExperts)
    for real, planned in zip(jax.tree.leaves(prepared), jax.tree.leaves(abstract), strict=True):
        assert (real.shape, real.dtype) == (planned.shape, planned.dtype)
        assert not mesh or real.sharding.is_equivalent_to(planned.sharding, real.ndim)
    with partition.active():
        experts = {"experts": (prepared, prepared.axes(spec.axes))}
        back = jax.jit(lambda: on_shards(released, experts, weight.axes(spec.axes), batch=1))()
    jax.tree.map(np.testing.assert_array_equal, back, weight)


def test_experts_with_scales_too_large_for_the_kernels_stay_unprepared(caplog: pytest.LogCaptureFixture) -> None:
    large = MXFP4Tensor(jnp.zeros((1, 2, 1, 16), jnp.uint8), jnp.full((1, 2, 1), 129, jnp.uint8))
    spec = WeightSpec("w", large.shape, AXES["down_proj"], packed=True)
    with use_backend("triton"):
        assert preparer(partition_for(CONFIG))(large, spec) is large
    assert "w: a scale of 2^2" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [None, pytest.param("expert=2,tensor=2", marks=pytest.mark.long)])
def test_the_whole_model_through_the_kernels(mesh: str | None) -> None:
    """A prompt's logits, and tokens that the engine decodes with its cache; the collectives stay the same."""
    tokens = np.random.default_rng(0).integers(0, 96, (1, 9), dtype=np.int32)
    params = SamplingParams(max_tokens=10, temperature=0)
    options = EngineOptions(
        max_num_seqs=1, page_size=4, long_prefill_token_threshold=16, max_num_batched_tokens=16
    )
    logits, generated, collectives = [], [], []
    for backend in ("reference", "triton"):
        with use_backend(backend):
            own = random_model(CONFIG, mesh, "float32")
            structure, weights = Structure.of(own)
            program = jax.jit(lambda w, t, s=structure: s.model(w)(t)).lower(weights, tokens).compile()
            logits.append(np.asarray(program(weights, tokens)))
            engine = Engine(own, options)
            engine.add("a", tokens[0].tolist(), params)
            events = []
            while engine.unfinished:
                events += engine.step()
        generated.append([event.token_id for event in events])
        collectives.append(collections.Counter(re.findall(r" (all-[a-z]+|reduce-scatter)\(", program.as_text())))
    np.testing.assert_allclose(logits[1], logits[0], rtol=0, atol=1e-4)
    assert generated[1] == generated[0]
    assert collectives[1] == collectives[0]
