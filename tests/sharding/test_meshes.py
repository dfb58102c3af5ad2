"""Every mesh of 8 virtual devices gives a single device's logits, with no more collectives than needed."""

import collections
import dataclasses
import itertools
import re
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from jax.typing import DTypeLike

import sharding.experts
from gptoss_jax.checkpoints.loading import EMBEDDED, load_model
from gptoss_jax.engine.engine import Engine
from gptoss_jax.engine.options import EngineOptions
from gptoss_jax.engine.outputs import TokenEvent
from gptoss_jax.model.config import ModelConfig
from gptoss_jax.model.gpt_oss import GptOss
from gptoss_jax.model.placement import partition_for, place
from gptoss_jax.model.weights import WeightSpec
from gptoss_jax.types import SamplingParams
from pallas_kernels.mxfp4_matmul import reference
from sharding import (
    BATCH_OVER_EXPERTS,
    Partition,
    ShardingError,
    ShardingRules,
    make_mesh,
    parse_mesh,
    run_experts,
)
from sharding.heads import ZERO, HeadLayout
from tests.quick import OPTIMISED

P1 = Path(__file__).parents[1] / "golden" / "P1"
MESHES = [
    f"data={d},expert={e},tensor={8 // d // e}"
    for d, e in itertools.product((1, 2, 4, 8), repeat=2)
    if 8 % (d * e) == 0
]
SEVERAL_MESHES = [f"data={d},expert={e},tensor={8 // d // e}" for d, e in ((2, 2), (1, 8), (1, 1))]
SOME_MESHES = [
    pytest.param(mesh, marks=() if quick else pytest.mark.slow if several else pytest.mark.long)
    for mesh in MESHES
    for quick, several in ((mesh == SEVERAL_MESHES[0], mesh in SEVERAL_MESHES),)
]
"""All meshes; the default test run takes one of them, and the slow run several."""
QUICK_MESHES = [pytest.param(mesh, marks=() if mesh == SEVERAL_MESHES[0] else pytest.mark.slow) for mesh in MESHES]
"""All meshes; the default test run takes the one of all three axes."""
COLLECTIVES = r" (all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute)(?:-start)?\("


@cache
def tokens(vocab: int, batch: int = 8, length: int = 20) -> np.ndarray:
    return np.random.default_rng(0).integers(0, vocab, (batch, length), dtype=np.int32)


@cache
def expected(path: Path, batch: int = 8) -> np.ndarray:
    return compiled(load_model(path, dtype="float32"), batch)[1]


@cache
def allowed(path: Path) -> np.ndarray:
    """The tolerance of each token's logits [B, T, 1]: 1e-4 or, for ill-conditioned tokens, three times the change of
    one device's logits when its weights are perturbed by one rounding."""
    rng = np.random.default_rng(5)

    def rounded(x: jax.Array) -> jax.Array:
        return (
            x * (1 + rng.choice([-1, 0, 1], x.shape).astype(np.float32) * 2.0**-24) if x.dtype == np.float32 else x
        )

    model = load_model(path, dtype="float32")
    graph, state = nnx.split(model)
    moved = compiled(nnx.merge(graph, jax.tree.map(rounded, state)))[1] - expected(path)
    return np.maximum(1e-4, 3 * np.abs(moved).max(-1, keepdims=True))


def compiled(model: GptOss, batch: int = 8):
    graph, state = nnx.split(model)
    step = jax.jit(lambda s, t: nnx.merge(graph, s)(t))
    inputs = tokens(model.config.vocab_size, batch)
    # The tests' default disables optimizations; this compiles with XLA's own default.
    program = step.lower(state, inputs).compile(compiler_options=OPTIMISED)
    return program.as_text(), np.asarray(program(state, inputs))


@pytest.mark.parametrize("mesh", QUICK_MESHES)
def test_every_factorisation_gives_the_same_logits_and_no_more_collectives(mesh: str) -> None:
    model = load_model(P1, mesh, "float32")
    text, logits = compiled(model)
    assert (np.abs(logits - expected(P1)) <= allowed(P1)).all()
    counts = collections.Counter(re.findall(COLLECTIVES, text))
    sizes, layers = parse_mesh(mesh), model.config.num_hidden_layers
    # One all-reduce per layer for attention's output and one for the experts', and one for the embedding.
    attention = layers if sizes["tensor"] > 1 else 0
    experts = layers if sizes["tensor"] * sizes["expert"] > 1 else 0
    embedding = 1 if sizes["tensor"] * sizes["expert"] > 1 else 0
    assert counts == collections.Counter({"all-reduce": attention + experts + embedding})


@pytest.mark.parametrize("mesh", [m for m in QUICK_MESHES if "expert=1" not in str(m.values[0])])
def test_all_to_all_gives_the_same_logits(mesh: str) -> None:
    model = load_model(P1, mesh, "float32", rules=BATCH_OVER_EXPERTS)
    text, logits = compiled(model)
    assert (np.abs(logits - expected(P1)) <= allowed(P1)).all()
    counts = collections.Counter(re.findall(COLLECTIVES, text))
    # Per layer, all-to-alls of ids, rows and results; one all-gather of the last hidden states for the logits.
    assert counts["all-to-all"] == 3 * model.config.num_hidden_layers
    assert counts["all-gather"] <= 1


@pytest.mark.parametrize(
    "rules",
    [
        pytest.param(ShardingRules(), id="replicated", marks=pytest.mark.slow),
        pytest.param(BATCH_OVER_EXPERTS, id="all-to-all", marks=pytest.mark.slow),
    ],
)
def test_batches_that_do_not_divide(rules: ShardingRules) -> None:
    _, logits = compiled(load_model(P1, "data=2,expert=4", "float32", rules=rules), batch=3)
    np.testing.assert_allclose(logits, expected(P1, 3), rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh",
    [mesh if mesh == SEVERAL_MESHES[0] else pytest.param(mesh, marks=pytest.mark.long) for mesh in MESHES],
)
def test_the_embedded_model(mesh: str) -> None:
    model = load_model(EMBEDDED, mesh, "float32")
    _, logits = compiled(model, batch=3)
    np.testing.assert_allclose(logits, expected(EMBEDDED, 3), rtol=0, atol=1e-4)
    assert_same_tokens_and_logprobs(decoded(model), decoded_on_one_device(EMBEDDED))


@pytest.mark.slow
@pytest.mark.parametrize("mesh", SOME_MESHES)
def test_decoding_the_golden_tokens(mesh: str) -> None:
    ours = decoded(load_model(P1, mesh, "float32"))
    assert_same_tokens_and_logprobs(ours, decoded_on_one_device(P1))
    with np.load(P1 / "golden.npz") as golden:
        assert [event.token_id for event in ours["golden"]] == golden["greedy1_tokens"].tolist()


@cache
def decoded_on_one_device(path: Path) -> dict[str, list[TokenEvent]]:
    return decoded(load_model(path, dtype="float32"))


def decoded(model: GptOss) -> dict[str, list[TokenEvent]]:
    """Greedy decoding of three sequences of different lengths, whose number divides over no mesh."""
    engine = Engine(model, EngineOptions(max_num_seqs=8, page_size=8))
    with np.load(P1 / "golden.npz") as golden:
        prompts = {"golden": golden["greedy1_prompt"], "a": [1], "b": golden["greedy1_prompt"][:5]}
        steps = len(golden["greedy1_tokens"])
    for name, prompt in prompts.items():
        params = SamplingParams(max_tokens=steps, temperature=0, ignore_eos=True, logprobs=20)
        engine.add(name, list(prompt), params)
    events: dict[str, list[TokenEvent]] = {name: [] for name in prompts}
    while engine.unfinished:
        for event in engine.step():
            events[event.request_id].append(event)
    return events


def assert_same_tokens_and_logprobs(ours: dict[str, list[TokenEvent]], alone: dict[str, list[TokenEvent]]) -> None:
    for name, events in alone.items():
        assert [event.token_id for event in ours[name]] == [event.token_id for event in events]
        for event, wanted in zip(ours[name], events, strict=True):
            assert event.logprobs is not None
            assert wanted.logprobs is not None
            likeliest = event.logprobs.top.keys() & wanted.logprobs.top.keys()
            # The last few of the top 20 may be tied with tokens outside it.
            assert len(likeliest) >= 18
            for token in likeliest:
                assert event.logprobs.top[token] == pytest.approx(wanted.logprobs.top[token], abs=1e-4)


expert_mlp = partial(reference.expert_mlp, swiglu_limit=7.0)


def random_experts(
    rng: np.random.Generator, experts: int, hidden: int, inner: int, dtype: DTypeLike
) -> list[jax.Array]:
    """gate_up, its bias, down and its bias."""
    shapes = [(experts, 2 * inner, hidden), (experts, 2 * inner), (experts, hidden, inner), (experts, hidden)]
    return [jnp.asarray(rng.standard_normal(shape) / 8, dtype) for shape in shapes]


@pytest.mark.parametrize(
    ("dispatch", "few_rows"), [("replicated", 0), ("all_to_all", 0), ("all_to_all", sharding.experts.FEW_ROWS)]
)
@pytest.mark.parametrize("routing", ["one", "random"])
@pytest.mark.parametrize("experts", [8, 5])
def test_no_token_is_dropped_whatever_the_routing(
    dispatch: str, few_rows: int, routing: str, experts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The exchange takes several rounds, or one with buffers for all rows."""
    monkeypatch.setattr(sharding.experts, "FEW_ROWS", few_rows)
    rng = np.random.default_rng(1)
    hidden, inner, count = 32, 64, 33
    x = jnp.asarray(rng.standard_normal((count, hidden)), jnp.float32)
    ids = (
        np.zeros((count, 2), np.int32)
        if routing == "one"
        else rng.integers(0, experts, (count, 2), dtype=np.int32)
    )
    weights = jnp.asarray(rng.random((count, 2)), jnp.float32)
    arrays = random_experts(rng, experts, hidden, inner, jnp.float32)
    padded = [jnp.pad(a, [(0, -experts % 4)] + [(0, 0)] * (a.ndim - 1)) for a in arrays]
    alone = expert_mlp(x, ids, weights, *arrays)
    rules = ShardingRules(batch=("data", "expert"), dispatch=dispatch)
    with Partition(make_mesh("expert=4,tensor=2"), rules).active():
        together = jax.jit(partial(run_experts, expert_mlp))(x, ids, weights, *padded)
    np.testing.assert_allclose(together, alone, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("mesh", "batch", "tokens", "travels"),
    [
        ("expert=8", ("data", "expert"), 128, True),
        ("expert=8", ("data", "expert"), 120, False),
        ("expert=8", ("data",), 128, False),
        ("expert=4,tensor=2", ("data", "expert"), 2048, False),
    ],
)
def test_auto_dispatch_chooses_all_to_all_for_many_tokens_and_devices(
    mesh: str, batch: tuple[str, ...], tokens: int, travels: bool
) -> None:
    arrays = random_experts(np.random.default_rng(0), 8, 32, 64, jnp.float32)
    x, ids = jnp.zeros((tokens, 32)), jnp.zeros((tokens, 2), jnp.int32)
    with Partition(make_mesh(mesh), ShardingRules(batch=batch)).active():
        traced = jax.make_jaxpr(partial(run_experts, expert_mlp))(x, ids, jnp.ones((tokens, 2)), *arrays)
    assert ("all_to_all" in str(traced)) == travels


@pytest.mark.parametrize("mesh", ["expert=2,tensor=4", "expert=4,tensor=2", "expert=8"])
@pytest.mark.parametrize(
    ("dispatch", "few_rows"), [("replicated", 0), ("all_to_all", 0), ("all_to_all", sharding.experts.FEW_ROWS)]
)
def test_bfloat16_error_on_a_mesh(
    mesh: str, dispatch: str, few_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exchanged rows are rounded once more, except partial sums: at most 1.24 times one device's error, measured."""
    monkeypatch.setattr(sharding.experts, "FEW_ROWS", few_rows)
    rng = np.random.default_rng(1)
    count, hidden, inner, experts, k = 64, 64, 128, 8, 4
    ids = rng.integers(0, experts, (count, k), dtype=np.int32)
    weights = jnp.asarray(rng.dirichlet(np.ones(k), count), jnp.float32)
    x = jnp.asarray(rng.standard_normal((count, hidden)), jnp.bfloat16)
    arrays = random_experts(rng, experts, hidden, inner, jnp.bfloat16)
    exact = expert_mlp(x.astype(jnp.float32), ids, weights, *(a.astype(jnp.float32) for a in arrays))
    alone = expert_mlp(x, ids, weights, *arrays)
    with Partition(make_mesh(mesh), ShardingRules(batch=("data", "expert"), dispatch=dispatch)).active():
        together = jax.jit(partial(run_experts, expert_mlp))(x, ids, weights, *arrays)
    assert jnp.linalg.norm(together - exact) <= 1.3 * jnp.linalg.norm(alone - exact)


@given(st.integers(1, 9), st.integers(1, 8), st.integers(1, 16))
def test_heads_divide_over_any_degree(num_kv: int, group: int, degree: int) -> None:
    layout = HeadLayout.of(num_kv * group, num_kv, degree)
    q, kv = layout.q_sources, layout.kv_sources
    assert len(q) % degree == len(kv) % degree == len(q) % len(kv) == 0
    assert sorted(head for head in q if head != ZERO) == list(range(num_kv * group))
    share = len(q) // len(kv)
    for place_, head in enumerate(q):
        assert head == ZERO or kv[place_ // share] == head // group


def test_invalid_rules_and_indivisible_sizes_are_rejected_by_name() -> None:
    with pytest.raises(ShardingError, match=r"w: experts and expert_gate_up .* 'tensor'"):
        ShardingRules(experts=("tensor",)).spec(("experts", "expert_gate_up", "hidden"), "w")
    config = ModelConfig.from_file(P1)
    partition = partition_for(dataclasses.replace(config, vocab_size=510), "tensor=8")
    with pytest.raises(ShardingError, match="lm_head: vocab of 510 does not divide over expert=1 x tensor=8"):
        place(WeightSpec("lm_head", (510, 64), ("vocab", "hidden")), partition)
    for fields in ({"vocab": ("pipeline",)}, {"vocab": "expert"}, {"dispatch": "sometimes"}):
        with pytest.raises(ShardingError, match=f"rules: {next(iter(fields))}: expected"):
            ShardingRules(**fields)
    with pytest.raises(ShardingError, match="no logical axis"):
        ShardingRules().mesh_axes("headz")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("expert=0", "expert"),
        ("pipe=2", "pipe"),
        ("expert=2,expert=2", "twice"),
        ("nowhere", "nowhere"),
        ("", "preset"),
        ("x" * 300, "a preset .8-experts, .*found 'xxx"),
        ("../meshes/8-experts", "preset"),
        ("expert=" + "1" * 5000, "expected a size of 1 or more, found '111"),
    ],
)
def test_invalid_meshes_are_rejected(text: str, named: str) -> None:
    with pytest.raises(ShardingError, match=named):
        parse_mesh(text)


def test_presets_and_jax_meshes_are_accepted() -> None:
    assert parse_mesh("8-experts") == {"data": 1, "expert": 8, "tensor": 1}
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()).reshape(4, 2), ("tensor", "data"))
    assert dict(make_mesh(mesh).shape) == {"data": 2, "expert": 1, "tensor": 4}
    with pytest.raises(ShardingError, match="needs 16 devices, found 8"):
        make_mesh("expert=16")
