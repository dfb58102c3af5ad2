import dataclasses
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptoss_jax.engine.adjusting import Adjustments, Penalties, adjust
from gptoss_jax.engine.sampling import SamplingState, logprobs_of, sample
from gptoss_jax.engine.step import seed_key
from gptoss_jax.errors import UsageError
from gptoss_jax.types import SamplingParams

VOCAB, MANY = 40, 640
draw = jax.jit(sample, static_argnums=3)


@cache
def keys(seeds: tuple[int, ...]) -> jax.Array:
    return jnp.asarray(np.stack([seed_key(seed) for seed in seeds]))


def settings(params: list[SamplingParams]) -> SamplingState:
    return SamplingState(
        jnp.asarray([p.temperature for p in params], jnp.float32),
        jnp.asarray([p.top_p for p in params], jnp.float32),
        jnp.asarray([p.top_k for p in params], jnp.int32),
        jnp.asarray([p.min_p for p in params], jnp.float32),
        keys(tuple(p.seed or 0 for p in params)),
    )


def draws(logits: np.ndarray, count: int = 4000, **params: object) -> np.ndarray:
    """How often each token is sampled."""
    one = settings([SamplingParams(**params)])
    state = jax.tree.map(lambda x: jnp.broadcast_to(x, (count, *x.shape[1:])), one)
    state = dataclasses.replace(state, keys=keys(tuple(range(count))))
    tokens = draw(jnp.broadcast_to(jnp.asarray(logits), (count, len(logits))), state, jnp.zeros(count, jnp.int32))
    return np.bincount(tokens, minlength=len(logits)) / count


def expected(logits: np.ndarray, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0):
    """The distribution by definition, in float64."""
    scaled = logits.astype(np.float64) / temperature
    order = np.argsort(-scaled, kind="stable")
    if top_k:
        scaled[order[top_k:]] = -np.inf
    probs = np.exp(scaled - scaled.max())
    probs /= probs.sum()
    before = np.cumsum(probs[order]) - probs[order]
    probs[order[before >= top_p]] = 0
    probs[probs < min_p * probs.max()] = 0
    return probs / probs.sum()


@pytest.mark.parametrize("vocab", [VOCAB, MANY])
@pytest.mark.parametrize(
    "params",
    [
        {},
        *(
            pytest.param(params, marks=pytest.mark.slow)
            for params in ({"temperature": 0.5}, {"top_k": 3}, {"top_p": 0.6}, {"min_p": 0.2})
        ),
        {"top_k": 90},
        {"top_p": 0.1},
        {"temperature": 1.7, "top_k": 12, "top_p": 0.8, "min_p": 0.05},
        {"temperature": 3.0, "top_k": 200, "top_p": 0.7},
    ],
)
def test_draws_follow_the_distribution(params: dict, vocab: int) -> None:
    logits = np.random.default_rng(0).standard_normal(vocab).astype(np.float32) * 2
    probs, count = expected(logits, **params), 4000
    got = draws(logits, count, **params)
    assert not got[probs == 0].any()
    deviation = np.sqrt(probs * (1 - probs) / count)
    assert (np.abs(got - probs) <= 4.5 * deviation + 2 / count).all()


def test_temperature_zero_takes_the_likeliest_beside_requests_that_draw() -> None:
    logits = np.random.default_rng(1).standard_normal((2, VOCAB)).astype(np.float32)
    state = settings([SamplingParams(temperature=0), SamplingParams(temperature=2, seed=3)])
    tokens = draw(jnp.asarray(logits), state, jnp.asarray([5, 5]))
    assert tokens[0] == np.argmax(logits[0])


@given(st.integers(0, 10**9))
def test_only_tokens_kept_by_top_k_top_p_and_min_p_are_sampled(seed: int) -> None:
    """Compares with the definition: top-k, then top-p, then min-p, including ties and masked tokens."""
    rng = np.random.default_rng(seed)
    logits = np.round(
        rng.standard_normal((4, MANY)).astype(np.float32) * rng.choice([0.1, 2, 6]), rng.choice([1, 5])
    )
    for row in logits:
        row[rng.permutation(MANY)[rng.choice([1, 2, 40, 300, MANY, MANY]) :]] = -np.inf
    params = [
        SamplingParams(
            temperature=float(rng.choice([0.3, 1, 2])),
            top_k=int(rng.choice([0, 1, 2, 5, 64, 65, 300, MANY, MANY + 1, 3000])),
            top_p=float(rng.choice([1, 0.05, 0.5, 0.9])),
            min_p=float(rng.choice([0, 0.1, 1])),
            seed=int(rng.integers(2**32)),
        )
        for _ in logits
    ]
    tokens = draw(jnp.asarray(logits), settings(params), jnp.asarray(rng.integers(0, 99, 4), jnp.int32))
    for row, p in enumerate(params):
        scaled = logits[row].astype(np.float64) / p.temperature
        probs = np.exp(scaled - scaled.max())
        if p.top_k:
            probs[scaled < np.sort(scaled)[-min(p.top_k, MANY)]] = 0
        before = np.sum(probs, where=scaled > scaled[tokens[row]]) / probs.sum()
        assert probs[tokens[row]] > 0
        assert before < p.top_p + 1e-5 or p.top_p == 1
        assert probs[tokens[row]] >= p.min_p * (1 - 1e-5)


@pytest.mark.parametrize("cuts", [False, True])
def test_equal_logits_are_sampled_equally_at_any_temperature(cuts: bool) -> None:
    alike = [3, 9, 11, 18]
    logits = jnp.full((2000, MANY), -10.0).at[:, jnp.asarray(alike)].set(20.0)
    state = settings([SamplingParams(temperature=1e-6, seed=seed) for seed in range(2000)])
    counts = np.bincount(draw(logits, state, jnp.zeros(2000, jnp.int32), cuts), minlength=MANY)[alike]
    assert counts.sum() == 2000
    # The expected count is 500, with a standard deviation of 19.
    assert (abs(counts - 500) < 100).all()


def test_nan_logits_terminate() -> None:
    state = settings([SamplingParams(top_p=0.9, top_k=3)] * 2)
    tokens = draw(jnp.asarray([[jnp.nan] * VOCAB, [-jnp.inf] * VOCAB]), state, jnp.zeros(2, jnp.int32))
    assert ((tokens >= 0) & (tokens < VOCAB)).all()


def test_sampling_without_cuts_agrees_where_it_applies() -> None:
    logits = jnp.asarray(np.random.default_rng(4).standard_normal((50, VOCAB)), jnp.float32)
    params = [SamplingParams(temperature=1.3 * (seed % 3), min_p=0.02, seed=seed) for seed in range(50)]
    state, positions = settings(params), jnp.arange(50, dtype=jnp.int32)
    tokens = draw(logits, state, positions, False)
    np.testing.assert_array_equal(tokens, draw(logits, state, positions, True))
    np.testing.assert_array_equal(tokens[::3], jnp.argmax(logits, axis=-1)[::3])


@given(st.integers(0, 2**64 - 1), st.integers(0, 100), st.sampled_from([1, 6]))
def test_a_seed_gives_the_same_token_in_any_batch(seed: int, position: int, others: int) -> None:
    rng = np.random.default_rng(others)
    logits = rng.standard_normal((others + 1, VOCAB)).astype(np.float32)
    params = [SamplingParams(seed=seed)] + [
        SamplingParams(temperature=float(rng.random() * 2)) for _ in range(others)
    ]
    positions = jnp.asarray([position, *rng.integers(0, 100, others)], jnp.int32)
    together = draw(jnp.asarray(logits), settings(params), positions)[0]
    alone = draw(jnp.asarray(logits[:1]), settings(params[:1]), positions[:1])[0]
    assert together == alone


@pytest.mark.parametrize("vocab", [VOCAB, MANY, 41])
def test_logprobs_are_those_of_the_logits(vocab: int) -> None:
    logits = np.random.default_rng(2).standard_normal((3, vocab)).astype(np.float32)
    chosen, top, ids = logprobs_of(jnp.asarray(logits), jnp.asarray([1, 2, 3]), 5)
    all_ = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    np.testing.assert_allclose(chosen, all_[[0, 1, 2], [1, 2, 3]], rtol=1e-5)
    np.testing.assert_array_equal(ids, np.argsort(-logits, axis=-1)[:, :5])
    np.testing.assert_allclose(top, np.sort(all_, axis=-1)[:, ::-1][:, :5], rtol=1e-5)


def test_penalties_biases_and_masks_by_definition() -> None:
    rng = np.random.default_rng(3)
    logits = rng.standard_normal((2, VOCAB)).astype(np.float32)
    counts, in_prompt = rng.integers(0, 3, (2, VOCAB)), rng.random((2, VOCAB)) < 0.3
    allowed = rng.random((2, VOCAB)) < 0.7
    words = np.packbits(np.pad(allowed, ((0, 0), (0, 24))), axis=1, bitorder="little").view(np.uint32)
    biases = jnp.asarray([[3, VOCAB], [4, 5]]), jnp.asarray([[2.0, 9.0], [-1.0, 1.0]])
    factors = jnp.asarray([1.3, 0.8]), jnp.asarray([0.5, -0.5]), jnp.asarray([0.1, 0.2])
    penalties = Penalties(*factors, jnp.asarray(counts), jnp.asarray(in_prompt))
    by = Adjustments(*biases, penalties, jnp.asarray(words))
    expected = logits.astype(np.float64)
    for row, token in np.ndindex(logits.shape):
        if in_prompt[row, token] or counts[row, token]:
            factor = [1.3, 0.8][row]
            expected[row, token] *= 1 / factor if expected[row, token] > 0 else factor
        expected[row, token] -= [0.1, 0.2][row] * counts[row, token] + [0.5, -0.5][row] * (counts[row, token] > 0)
    expected[0, 3] += 2
    expected[1, 4] -= 1
    expected[1, 5] += 1
    free = adjust(jnp.asarray(logits), Adjustments(*biases, penalties))
    np.testing.assert_allclose(free, expected, rtol=1e-5, atol=1e-6)
    expected[~allowed] = -np.inf
    np.testing.assert_allclose(adjust(jnp.asarray(logits), by), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -1.0),
        ("temperature", float("inf")),
        ("temperature", "hot"),
        ("temperature", 10**400),
        ("temperature", float("nan")),
        ("ignore_eos", "no"),
        ("top_p", 0.0),
        ("top_k", -2),
        ("min_p", 2.0),
        ("max_tokens", 0),
        ("seed", -1),
        ("seed", 2**64),
        ("logprobs", 21),
        ("stop", [""]),
        ("stop_token_ids", [-1]),
    ],
)
def test_values_out_of_range_are_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(UsageError, match=field):
        SamplingParams(**{field: value})


def test_more_tokens_cannot_be_needed_than_are_allowed() -> None:
    assert SamplingParams(max_tokens=3, min_tokens=3).min_tokens == 3
    assert SamplingParams(min_tokens=10**6).max_tokens is None
    with pytest.raises(UsageError, match="min_tokens: expected at most max_tokens of 3, found 4"):
        SamplingParams(max_tokens=3, min_tokens=4)
