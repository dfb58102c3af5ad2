"""The engine gives each request the tokens of the model run on that request alone."""

import dataclasses
import random
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from gptoss_jax.checkpoints.loading import random_model
from gptoss_jax.engine.engine import Engine
from gptoss_jax.engine.memory import cache_budget
from gptoss_jax.engine.options import EngineOptions
from gptoss_jax.engine.outputs import TokenEvent
from gptoss_jax.errors import UsageError
from gptoss_jax.model.config import ModelConfig
from gptoss_jax.model.gpt_oss import GptOss
from gptoss_jax.types import SamplingParams
from pallas_kernels.rotary import to_cache_dtype
from tests.engine import schedules
from tests.engine.schedules import TINY, assert_as_alone, assert_empty, greedy_requests, play, prompts, tiny

OPTIONS = EngineOptions(max_num_seqs=4, page_size=16, long_prefill_token_threshold=16, max_num_batched_tokens=32)


@cache
def engine(options: EngineOptions = OPTIONS, mesh: str | None = None) -> Engine:
    return Engine(tiny() if mesh is None else random_model(TINY, mesh, dtype="float32"), options)


def run(engine: Engine, requests: dict[str, tuple[list[int], SamplingParams]]) -> dict[str, list[int]]:
    for name, (prompt, params) in requests.items():
        engine.add(name, prompt, params)
    return finish(engine, list(requests))


def finish(engine: Engine, names: list[str]) -> dict[str, list[int]]:
    out: dict[str, list[int]] = {name: [] for name in names}
    while engine.unfinished:
        for event in engine.step():
            out[event.request_id].append(event.token_id)
    return out


def greedy(count: int, **more: object) -> SamplingParams:
    return SamplingParams(max_tokens=count, temperature=0, **more)


@cache
def forward():
    return nnx.jit(lambda model, tokens: model(tokens))


def logits_before(model: GptOss, prompt: list[int], tokens: list[int], size: int = 128) -> np.ndarray:
    """The model's logits [tokens, V] from which each token is sampled, computed without the engine."""
    padded = np.zeros((1, size), np.int32)
    padded[0, : len(prompt) + len(tokens)] = prompt + tokens
    return np.asarray(forward()(model, padded)[0, len(prompt) - 1 : len(prompt) + len(tokens) - 1])


def assert_greedy(model: GptOss, prompt: list[int], tokens: list[int]) -> None:
    """Each token is the most likely one after its predecessors, up to near-ties."""
    for row, token in zip(logits_before(model, prompt, tokens), tokens, strict=True):
        assert row[token] >= row.max() - 2e-4


CONFIGS = st.builds(
    lambda head_dim, groups, kv_heads, experts, top_k, window, types: dataclasses.replace(
        TINY,
        head_dim=head_dim,
        num_attention_heads=groups * kv_heads,
        num_key_value_heads=kv_heads,
        num_local_experts=experts,
        num_experts_per_tok=min(top_k, experts),
        sliding_window=window,
        num_hidden_layers=len(types),
        layer_types=tuple(types),
    ),
    st.sampled_from([16, 32, 64]),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(1, 7),
    st.integers(1, 3),
    st.sampled_from([1, 7, 16, 128]),
    st.lists(st.sampled_from(["sliding_attention", "full_attention"]), min_size=1, max_size=3),
)


@pytest.mark.slow
@settings(max_examples=5)
@given(CONFIGS, st.integers(0, 99))
def test_any_shape_decodes_as_a_full_forward_does(config: ModelConfig, seed: int) -> None:
    model = random_model(config, seed=seed, dtype="float32")
    [prompt] = prompts(seed, 1)
    tokens = run(Engine(model, OPTIONS), {"a": (prompt, greedy(12))})["a"]
    assert len(tokens) == 12
    assert_greedy(model, prompt, tokens)


def test_any_schedule_gives_the_tokens_of_the_request_alone() -> None:
    """Random arrivals and cancellations, shared prefixes, and few pages, so that sequences are preempted."""
    shared = schedules.overcommit(Engine(tiny(), schedules.OPTIONS))
    preemptions = []

    @settings(max_examples=8)
    @given(st.integers(0, 10**6))
    def check(seed: int) -> None:
        before, requests = shared.load.preemptions, greedy_requests(seed, 10)
        out, cancelled = play(shared, requests, random.Random(seed))
        assert_empty(shared)
        preemptions.append(shared.load.preemptions - before)
        assert_as_alone(shared, requests, out, cancelled)
        for name, (prompt, params) in requests.items():
            tokens = out[name].get(0, [])
            assert name in cancelled or len(tokens) == params.max_tokens
            assert_greedy(tiny(), prompt, tokens)

    check()
    assert sum(map(bool, preemptions)) > len(preemptions) / 2


def test_prefix_cache_hits() -> None:
    large = engine()
    prompt = prompts(1, 1)[0] * 3
    first = run(large, {"a": (prompt, greedy(5))})["a"]
    large.add("b", prompt, greedy(5))
    events = []
    while large.unfinished:
        events += large.step()
    assert [event.token_id for event in events] == first
    assert events[0].cached_tokens >= len(prompt) - 2 * OPTIONS.page_size


@pytest.mark.long
@pytest.mark.parametrize("mesh", ["data=2,expert=2,tensor=2", "data=4,tensor=2", "expert=8"])
def test_a_mesh_gives_the_same_tokens(mesh: str) -> None:
    requests = {str(i): (p, greedy(8)) for i, p in enumerate(prompts(5, 6))}
    assert run(engine(mesh=mesh), requests) == run(engine(), requests)


@pytest.mark.parametrize("mesh", ["tensor=4", pytest.param("data=2,expert=2,tensor=2", marks=pytest.mark.slow)])
def test_devices_exchange_data_only_in_compiled_programs(mesh: str) -> None:
    """Neither making weights (`tensor=4` reorders the heads) nor serving copies data from one device to others."""
    params = SamplingParams(max_tokens=3, temperature=1.0, repetition_penalty=1.2, logprobs=2, seed=1)
    with jax.transfer_guard_device_to_device("disallow_explicit"):
        served = Engine(random_model(TINY, mesh, dtype="float32"), OPTIONS)
        found = run(served, {"a": ([3, 1, 4], params), "b": ([1, 5, 9], params)})
    assert [len(tokens) for tokens in found.values()] == [3, 3]


@pytest.mark.slow
def test_a_seed_gives_the_same_tokens_beside_other_requests() -> None:
    [prompt, *others] = prompts(2, 5)
    params = SamplingParams(max_tokens=12, temperature=1.0, top_p=0.9, seed=11)
    alone = run(engine(), {"a": (prompt, params)})["a"]
    crowd = {str(i): (p, SamplingParams(max_tokens=9, temperature=0.7)) for i, p in enumerate(others)}
    assert run(engine(), crowd | {"a": (prompt, params)})["a"] == alone


@pytest.mark.slow
def test_speculative_decoding_gives_the_same_tokens() -> None:
    speculative = engine(dataclasses.replace(OPTIONS, num_speculative_tokens=3))
    requests = {str(i): ((p * 3)[:60], greedy(30)) for i, p in enumerate(prompts(9, 4))}
    requests["s"] = (requests["0"][0], SamplingParams(max_tokens=30, temperature=0.3, seed=5))
    assert run(speculative, requests) == run(engine(), requests)
    assert speculative.load.drafted > 0
    assert speculative.load.accepted > 0


def test_multi_step_decode_gives_the_likeliest_tokens() -> None:
    """As GPUs decode few sequences, but with four steps a launch: sequences end at any of the four."""
    own = engine(dataclasses.replace(OPTIONS, num_decode_steps=4))
    requests = {name: (p, greedy(count)) for name, p, count in zip("abc", prompts(8, 3), (6, 11, 16), strict=True)}
    for name, (prompt, params) in requests.items():
        own.add(name, prompt, params)
    out: dict[str, list[int]] = {name: [] for name in requests}
    calls = 0
    while own.unfinished:
        calls += 1
        for event in own.step():
            out[event.request_id].append(event.token_id)
    for name, (prompt, params) in requests.items():
        assert len(out[name]) == params.max_tokens
        assert_greedy(tiny(), prompt, out[name])
    assert calls < 16
    often = out["c"][6]
    stopped = run(own, {"c": (requests["c"][0], greedy(16, stop_token_ids=[often])), "b": requests["b"]})
    assert stopped == {"c": out["c"][: out["c"].index(often) + 1], "b": out["b"]}
    assert own.load.pages_used == 0


@pytest.mark.slow
def test_multi_step_decode_gives_the_same_tokens() -> None:
    multi_step = engine(dataclasses.replace(OPTIONS, num_decode_steps=4))
    requests = {str(i): (p, greedy(5 + 6 * i)) for i, p in enumerate(prompts(8, 5))}
    requests["s"] = (requests["0"][0], SamplingParams(max_tokens=18, temperature=0.7, top_p=0.9, seed=5))
    requests["l"] = (requests["1"][0], SamplingParams(max_tokens=7, temperature=0, logprobs=1))
    penalties = {"repetition_penalty": 1.3, "frequency_penalty": 0.5, "logit_bias": {7: 2.0}}
    requests["p"] = (requests["2"][0], SamplingParams(max_tokens=25, temperature=0, **penalties))
    alone = run(engine(), requests)
    before = multi_step.load.steps
    assert run(multi_step, requests) == alone
    assert multi_step.load.steps > before
    ends = SamplingParams(max_tokens=30, temperature=0, stop_token_ids=[alone["4"][9]])
    stopped = run(multi_step, {"e": (requests["4"][0], ends), "4": requests["4"]})
    assert stopped == {"e": alone["4"][: alone["4"].index(alone["4"][9]) + 1], "4": alone["4"]}
    assert multi_step.load.pages_used == 0


@pytest.mark.parametrize(
    "asked",
    [
        {"logprobs": 2},
        *(
            pytest.param(asked, marks=pytest.mark.slow)
            for asked in ({"presence_penalty": 1.0}, {"min_tokens": 13})
        ),
    ],
)
def test_sampling_options_apply_in_multi_step_decode(asked: dict[str, object]) -> None:
    """A launch of four steps gives the same results as four launches."""
    prompt = prompts(8, 1)[0]
    often = run(engine(), {"a": (prompt, greedy(24))})["a"][6]
    params = greedy(24, stop_token_ids=[often], **asked)

    def events(num_decode_steps: int) -> tuple[list[TokenEvent], int]:
        own = Engine(tiny(), dataclasses.replace(OPTIONS, num_decode_steps=num_decode_steps))
        own.add("a", prompt, params)
        events, calls = [], 0
        while own.unfinished:
            events += own.step()
            calls += 1
        return events, calls

    (alone, calls), (multi_step, fewer_calls) = events(1), events(4)
    assert [event.token_id for event in multi_step] == [event.token_id for event in alone]
    assert fewer_calls < calls
    for got, want in zip(multi_step, alone, strict=True):
        assert (got.logprobs is None) == (want.logprobs is None)
        if got.logprobs and want.logprobs:
            assert got.logprobs.top == pytest.approx(want.logprobs.top, abs=1e-5)


def test_several_completions_share_the_prompt() -> None:
    prompt = prompts(4, 1)[0] * 8
    params = SamplingParams(max_tokens=6, temperature=1.0, seed=3, n=3)
    engine().add("n", prompt, params)
    out: dict[int, list[int]] = {}
    cached: dict[int, int] = {}
    most = 0
    while engine().unfinished:
        for event in engine().step():
            out.setdefault(event.index, []).append(event.token_id)
            cached[event.index] = event.cached_tokens
        most = max(most, engine().load.pages_used)
    # The last token of a prompt is computed for each completion, and with it the page that contains it.
    shared, each = (len(prompt) - 1) // OPTIONS.page_size, -(-(len(prompt) + 6) // OPTIONS.page_size)
    assert cached[1] == cached[2] == shared * OPTIONS.page_size > 0
    assert most <= shared + 3 * (each - shared)
    for index in range(3):
        single = dataclasses.replace(params, n=1, seed=3 + index)
        assert out[index] == run(engine(), {"one": (prompt, single)})["one"]


def test_limits_on_tokens() -> None:
    prompt = prompts(6, 1)[0]
    usual = run(engine(), {"a": (prompt, greedy(10))})["a"]
    stop = usual[3]
    cut = usual[: usual.index(stop) + 1]
    assert run(engine(), {"a": (prompt, greedy(10, stop_token_ids=[stop]))})["a"] == cut
    held = run(engine(), {"a": (prompt, greedy(10, stop_token_ids=[stop], min_tokens=8))})["a"]
    assert stop not in held[:8]
    assert len(held) >= 8
    banned = run(engine(), {"a": (prompt, greedy(10, logit_bias={stop: -100.0}))})["a"]
    assert stop not in banned
    penalised = run(engine(), {"a": (prompt, greedy(30, frequency_penalty=2.0, presence_penalty=2.0))})["a"]
    assert len(set(penalised)) > len(set(run(engine(), {"a": (prompt, greedy(30))})["a"]))


def test_log_probabilities_are_those_of_a_full_forward() -> None:
    prompt = prompts(7, 1)[0] * 2
    engine().add("a", prompt, greedy(5, logprobs=3, prompt_logprobs=2))
    events = []
    while engine().unfinished:
        events += engine().step()
    tokens = [event.token_id for event in events]
    padded = np.zeros((1, 128), np.int32)
    padded[0, : len(prompt) + 5] = prompt + tokens
    expected = np.asarray(jax.nn.log_softmax(forward()(tiny(), padded)[0]))
    for index, event in enumerate(events):
        row = expected[len(prompt) + index - 1]
        assert event.logprobs is not None
        assert event.logprobs.logprob == pytest.approx(row[event.token_id], abs=1e-4)
        assert len(event.logprobs.top) == 3
    of_prompt = events[0].prompt_logprobs
    assert of_prompt is not None
    assert of_prompt[0] is None
    assert [at.token_id for at in of_prompt[1:]] == prompt[1:]
    got = [at.logprob for at in of_prompt[1:]]
    np.testing.assert_allclose(got, expected[np.arange(len(prompt) - 1), prompt[1:]], atol=1e-4)


SMALL = dataclasses.replace(
    OPTIONS, page_size=4, kv_cache_memory=75_000, long_prefill_token_threshold=8, max_num_batched_tokens=8
)
"""A cache of 44 pages, that is, 176 tokens."""


def events_of(requests: list[tuple[list[int], SamplingParams]]) -> list[TokenEvent]:
    """The results of requests that do not fit in the cache together."""
    small = schedules.overcommit(Engine(tiny(), SMALL))
    for name, (prompt, params) in enumerate(requests):
        small.add(str(name), prompt, params)
    events = []
    while small.unfinished:
        events += small.step()
    assert small.load.preemptions > 0
    return events


@pytest.mark.slow
def test_a_prompt_is_scored_once_though_its_prefill_is_interrupted() -> None:
    """The first request runs out of pages while the second one's prompt holds all but three."""
    prompt = [random.Random(1).randrange(96) for _ in range(155)]
    events = events_of([([1, 2, 3, 4], greedy(140)), (prompt, greedy(5, prompt_logprobs=1))])
    [scored] = [event.prompt_logprobs for event in events if event.prompt_logprobs]
    assert [at and at.token_id for at in scored] == [None, *prompt[1:]]


@pytest.mark.slow
def test_prefix_hits_after_preemption_do_not_count_as_cached() -> None:
    rng = random.Random(9)
    events = events_of([([i, *(rng.randrange(96) for _ in range(40))], greedy(40)) for i in range(12)])
    assert {event.cached_tokens for event in events} == {0}


@pytest.mark.parametrize("dtype", ["bfloat16", "float8"])
def test_smaller_caches_stay_close(dtype: str) -> None:
    """Where a less precise cache gives another token, both tokens had similar logits."""
    prompt = prompts(8, 1)[0]
    tokens = run(Engine(tiny(), dataclasses.replace(OPTIONS, kv_cache_dtype=dtype)), {"a": (prompt, greedy(1))})[
        "a"
    ]
    logits = np.asarray(forward()(tiny(), jnp.asarray([prompt + [0] * (128 - len(prompt))]))[0, len(prompt) - 1])
    assert logits[tokens[0]] > logits.max() - 0.5


def test_keys_past_the_range_of_float8_stay_numbers() -> None:
    kept = to_cache_dtype(jnp.asarray([1e4, -1e4, 0.5]), jnp.float8_e4m3fn)
    assert kept.tolist() == [448.0, -448.0, 0.5]


@pytest.mark.slow
@pytest.mark.parametrize("guesses", [0, pytest.param(2, marks=pytest.mark.long)])
def test_nothing_compiles_after_warm_up(guesses: int) -> None:
    options = dataclasses.replace(
        OPTIONS,
        max_num_seqs=1,
        page_size=512,
        long_prefill_token_threshold=32,
        num_speculative_tokens=guesses,
        num_decode_steps=4,
    )
    warm = Engine(tiny(), options)
    count = warm.warm_up(progress=False)
    assert warm.load.programs == count
    params = SamplingParams(max_tokens=4, temperature=0.5, seed=1)
    requests = {"a": (prompts(1, 1)[0], greedy(4)), "b": ([1, 2, 3], params), "c": ([5], greedy(3))}
    run(warm, requests)
    run(warm, {"repeats": ((prompts(9, 1)[0] * 3)[:60], greedy(30))})
    assert (warm.load.drafted > 0) == (guesses > 0)
    assert warm.load.programs == count


@pytest.mark.parametrize(
    ("prompt", "params", "named"),
    [
        ([], greedy(1), "prompt: expected at least one token, found none"),
        ([96], greedy(1), "96"),
        ([1] * 500, greedy(20), "512"),
        ([1], greedy(1, stop_token_ids=[99]), "99"),
    ],
)
def test_requests_that_can_never_run_are_rejected(prompt: list[int], params: SamplingParams, named: str) -> None:
    with pytest.raises(UsageError, match=named):
        engine().add("a", prompt, params)
    with pytest.raises(UsageError, match=named) as caught:
        engine().check(prompt, params)
    assert "request" not in str(caught.value)
    assert engine().unfinished == 0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_num_seqs", "8"),
        ("max_num_seqs", None),
        ("page_size", 1.5),
        ("long_prefill_token_threshold", True),
        ("max_num_batched_tokens", 2**31),
        ("kv_cache_memory", "1e9"),
        ("kv_cache_dtype", ["float8"]),
        ("enable_prefix_caching", "no"),
        ("num_speculative_tokens", None),
        ("max_model_len", 0),
        ("gpu_memory_utilization", 0),
        ("gpu_memory_utilization", 1.5),
        ("kernels", 5),
        ("kernels", "triton"),
    ],
)
def test_options_of_wrong_types_are_rejected_by_name(field: str, value: object) -> None:
    with pytest.raises(UsageError, match=f"^{field}: .*") as caught:
        EngineOptions(**{field: value})
    assert "found" in str(caught.value)


def test_a_too_small_cache_is_rejected_with_the_numbers() -> None:
    with pytest.raises(UsageError, match="kv_cache_memory: 1000 bytes"):
        Engine(tiny(), dataclasses.replace(OPTIONS, kv_cache_memory=1000))


def test_max_model_len_bounds_prompt_and_output_together() -> None:
    short = Engine(tiny(), dataclasses.replace(OPTIONS, max_model_len=20))
    with pytest.raises(UsageError, match="10 prompt tokens and 11 new tokens exceed max_model_len of 20"):
        short.add("a", [1] * 10, greedy(11))
    requests = {"a": ([1] * 10, SamplingParams(temperature=0, ignore_eos=True))}
    assert len(run(short, requests)["a"]) == 10
    with pytest.raises(UsageError, match=r"^max_model_len: expected at most the model's 512, found 513$"):
        Engine(tiny(), dataclasses.replace(OPTIONS, max_model_len=513))


@dataclasses.dataclass
class Card:
    """A device that reports its memory like JAX's GPU devices."""

    platform = device_kind = "gpu"
    limit: int
    used: int

    def memory_stats(self) -> dict[str, int]:
        return {"bytes_limit": self.limit, "bytes_in_use": self.used}


def test_cache_budget() -> None:
    card, mib = Card(1000 << 20, 400 << 20), 1 << 20
    assert cache_budget(card, 123, None) == 123
    assert cache_budget(card, None, None) == 510 * mib  # 0.85 of the 600 MiB that are free
    assert cache_budget(card, None, 0.9) == 500 * mib
    with pytest.raises(UsageError, match=r"^gpu_memory_utilization: expected a fraction larger than the weights"):
        cache_budget(card, None, 0.4)
    with pytest.raises(UsageError, match=r"^gpu_memory_utilization: expected a device that reports its memory"):
        cache_budget(jax.local_devices()[0], None, 0.9)
    with pytest.raises(
        UsageError, match=r"^gpu_memory_utilization: expected this or kv_cache_memory, found both$"
    ):
        EngineOptions(kv_cache_memory=1, gpu_memory_utilization=0.5)
