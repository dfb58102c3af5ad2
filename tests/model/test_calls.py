"""Direct calls of the model, alone and inside a caller's JAX transformations and meshes."""

import gc
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from gptoss_jax.checkpoints.loading import random_model
from gptoss_jax.model.config import ModelConfig
from gptoss_jax.model.gpt_oss import GptOss
from pallas_kernels import backend, platform, routing, use_backend
from sharding import make_mesh

MESHES = [None, "data=2,expert=2,tensor=2"]
TOKENS = np.arange(12, dtype=np.int32).reshape(2, 6)
TINY = ModelConfig(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    num_local_experts=4,
    num_experts_per_tok=2,
    sliding_window=4,
    layer_types=("sliding_attention", "full_attention"),
    max_position_embeddings=4096,
    eos_token_id=(),
)
DIFFERENTIATED = nnx.All(
    nnx.Param, nnx.Not(nnx.Any(nnx.PathContains("gate_up_proj"), nnx.PathContains("down_proj")))
)
"""All parameters except the packed experts."""


class Work(Counter[str]):
    """Counts of JAX's traces and compilations since the last clear()."""

    EVENTS = {  # noqa: RUF012
        "/jax/core/compile/jaxpr_trace_duration": "traced",
        "/jax/core/compile/backend_compile_duration": "compiled",
    }

    def of(self, function: Callable[[], Any]) -> Self:
        """The counts of one call; empty if it neither traced nor compiled."""
        self.clear()
        jax.block_until_ready(function())
        return self


@pytest.fixture
def work() -> Iterator[Work]:
    counts = Work()

    def listen(event: str, seconds: float, **_: Any) -> None:
        if event in Work.EVENTS:
            counts[Work.EVENTS[event]] += 1

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield counts
    jax.monitoring.unregister_event_duration_listener(listen)


@cache
def model(mesh: str | None = None, seed: int = 0) -> GptOss:
    """A shared model, which tests must not modify."""
    return random_model(TINY, mesh, "float32", seed=seed)


def loss(model: GptOss) -> jax.Array:
    return -jnp.mean(jax.nn.log_softmax(model(TOKENS))[..., 7])


def gradient(model: GptOss) -> nnx.State:
    return nnx.grad(loss, argnums=nnx.DiffState(0, DIFFERENTIATED))(model)


def moved(model: GptOss, direction: nnx.State) -> GptOss:
    """A copy of the model with `direction` added to its differentiated weights."""
    graph, some, rest = nnx.split(model, DIFFERENTIATED, ...)
    return nnx.merge(graph, jax.tree.map(jnp.add, some, direction), rest)


@pytest.mark.parametrize("mesh", MESHES)
def test_a_shape_compiles_once(mesh: str | None, work: Work) -> None:
    first, twin = model(mesh), model(mesh, seed=1)
    tokens = TOKENS[:, :5]
    on_device = jnp.asarray(tokens)
    assert work.of(lambda: first(tokens))["compiled"] > 0
    # JAX compiles how an array is spread over devices.
    first(on_device)
    for again in (tokens, on_device):
        assert not work.of(lambda again=again: first(again))
        assert not work.of(lambda again=again: twin(again))
    assert np.abs(first(tokens) - twin(tokens)).max() > 0.1


@pytest.mark.parametrize("mesh", MESHES)
def test_jit_of_a_caller_gives_the_same(mesh: str | None, work: Work) -> None:
    own, expected = model(mesh), model(mesh)(TOKENS)
    graph, state = nnx.split(own)
    program = jax.jit(lambda state, tokens: nnx.merge(graph, state)(tokens))
    np.testing.assert_array_equal(program(state, TOKENS), expected)
    assert not work.of(lambda: program(state, TOKENS))
    lifted = nnx.jit(lambda model, tokens: model(tokens))
    np.testing.assert_array_equal(lifted(own, TOKENS), expected)
    assert not work.of(lambda: lifted(own, TOKENS))


def test_jit_of_a_closure_over_the_model() -> None:
    own = model()
    for program in (jax.jit(lambda tokens: own(tokens)), jax.jit(lambda tokens: own(TOKENS))):
        np.testing.assert_allclose(program(TOKENS), own(TOKENS), rtol=0, atol=1e-5)


def test_each_backend_is_traced_once(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    def least_likely(
        x_TD: jax.Array, norm_D: jax.Array, weight_ED: jax.Array, bias_E: jax.Array, **rest: Any
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        del rest["interpret"]
        return routing.reference.route(x_TD, norm_D, -weight_ED, -bias_E, **rest)

    monkeypatch.setattr(backend, "_platforms", dict(backend._platforms))
    monkeypatch.setattr(routing, "_BACKENDS", (backend.Backend("least_likely", frozenset(), least_likely),))
    expected = model()(TOKENS)
    with use_backend("least_likely"):
        other = model()(TOKENS)
        assert not work.of(lambda: model()(TOKENS))
    assert np.abs(other - expected).max() > 0.1
    assert not work.of(lambda: model()(TOKENS))
    np.testing.assert_array_equal(model()(TOKENS), expected)


@pytest.mark.parametrize("mesh", MESHES)
def test_changed_weights_are_seen(mesh: str | None, work: Work) -> None:
    own = random_model(TINY, mesh, "float32")
    before = np.asarray(own(TOKENS))
    own.lm_head[...] = own.lm_head[...] * 2
    assert not work.of(lambda: own(TOKENS))
    np.testing.assert_array_equal(own(TOKENS), 2 * before)
    own.lm_head = nnx.Param(own.lm_head[...] / 2)
    np.testing.assert_array_equal(own(TOKENS), before)


def test_a_deleted_model_leaves_no_weights() -> None:
    own = random_model(TINY, dtype="float32")
    own(TOKENS)
    gradient(own)
    weights = [weakref.ref(weight) for weight in jax.tree.leaves(nnx.state(own))]
    del own
    gc.collect()
    assert not any(weight() is not None for weight in weights)


def test_gradient_equals_finite_difference() -> None:
    found = gradient(model())
    for part in ("embed_tokens", "norm", "router", "sinks", "q_proj", "o_proj", "lm_head"):
        of_part = jax.tree.map_with_path(
            lambda path, g, part=part: g if f"'{part}'" in jax.tree_util.keystr(path) else jnp.zeros_like(g), found
        )
        length = float(optax.tree.norm(of_part))
        assert length > 1e-2, part
        step = jax.tree.map(lambda g, length=length: g * 2e-3 / length, of_part)
        rise = loss(moved(model(), step)) - loss(moved(model(), jax.tree.map(jnp.negative, step)))
        assert float(rise) == pytest.approx(4e-3 * length, rel=2e-2), part


@pytest.mark.parametrize("mesh", [None, pytest.param(MESHES[1], marks=pytest.mark.slow)])
def test_gradients_compile_once_and_equal_those_of_one_device(mesh: str | None, work: Work) -> None:
    found, expected = gradient(model(mesh)), gradient(model())
    assert not work.of(lambda: gradient(model(mesh)))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=0, atol=1e-5), found, expected)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=0, atol=1e-5), nnx.jit(gradient)(model(mesh)), expected)


@pytest.mark.parametrize(
    "context",
    [
        pytest.param(partial(jax.make_mesh, (2, 2, 2), ("data", "expert", "tensor")), id="explicit"),
        pytest.param(partial(jax.make_mesh, (8,), ("x",)), id="other"),
        pytest.param(partial(make_mesh, MESHES[1]), id="own"),
    ],
)
def test_a_mesh_in_context_changes_nothing(context: Callable[[], jax.sharding.Mesh]) -> None:
    for own in (model(), model(MESHES[1])):
        expected = own(TOKENS)
        with jax.set_mesh(context()):
            np.testing.assert_array_equal(own(TOKENS), expected)


def test_a_mesh_in_context_of_a_callers_jit() -> None:
    expected = model(MESHES[1])(TOKENS)
    with jax.set_mesh(jax.make_mesh((2, 2, 2), ("data", "expert", "tensor"))):
        np.testing.assert_array_equal(nnx.jit(lambda model: model(TOKENS))(model(MESHES[1])), expected)


def test_calls_run_in_order(jit_options: dict[str, Any]) -> None:
    with platform("cuda"), use_backend("reference"):
        model()(TOKENS[:, :4])
    assert jit_options["gpt_oss"] == {"xla_gpu_enable_pdl": False}


def test_calls_inside_transformations_have_no_options() -> None:
    """JAX would reject the XLA options of the platform in force here, so the calls must pass none."""
    expected, slope = model()(TOKENS), gradient(model())
    with platform("cuda"), use_backend("reference"):
        np.testing.assert_array_equal(model()(TOKENS), expected)
        np.testing.assert_allclose(jax.jit(lambda: model()(TOKENS))(), expected, rtol=0, atol=1e-5)
        jax.tree.map(partial(np.testing.assert_allclose, rtol=0, atol=1e-5), gradient(model()), slope)
