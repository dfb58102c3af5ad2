"""The prompts, lengths and arrival times of a load."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
import tiktoken

from gptoss_jax.benching.load_metrics import METRICS
from gptoss_jax.benching.requests import WORDS, arrival_times, random_ids, random_requests, random_text
from gptoss_jax.commands.load_flags import LATENCIES
from tools.goldens.o200k import install


def rng() -> np.random.Generator:
    return np.random.default_rng(7)


def test_a_word_is_a_token(tmp_path: Path) -> None:
    install(tmp_path)
    tokenizer = tiktoken.get_encoding("o200k_harmony")
    assert len(set(WORDS)) == len(WORDS)
    for word in WORDS:
        assert len(tokenizer.encode(word)) == len(tokenizer.encode(f"a {word}")) - 1 == 1
    [one] = random_requests(rng(), random_text(rng()), 1, 300, 5, prefix_len=100)
    assert isinstance(one.prompt, str)
    assert len(tokenizer.encode(one.prompt)) == one.input_tokens == 400


def test_prompts_share_the_prefix_and_nothing_else() -> None:
    generator = rng()
    first, second, third = random_requests(generator, random_ids(generator, 50), 3, 40, 9, prefix_len=30)
    for one in (first, second, third):
        assert isinstance(one.prompt, list)
        assert (len(one.prompt), one.input_tokens, one.output_tokens) == (70, 70, 9)
        assert one.prompt[:30] == first.prompt[:30]
        assert all(0 <= token < 50 for token in one.prompt)
    assert first.prompt[30:] != second.prompt[30:] != third.prompt[30:]


def test_lengths_are_uniform_in_the_range() -> None:
    generator = rng()
    found = random_requests(generator, random_ids(generator, 9), 2000, 10, 100, range_ratio=0.25)
    inputs, outputs = [one.input_tokens for one in found], [one.output_tokens for one in found]
    assert set(inputs) == set(range(7, 14))
    assert (min(outputs), max(outputs)) == (75, 125)
    assert np.mean(outputs) == pytest.approx(100, abs=1.5)


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 16.0])
def test_gaps_follow_a_gamma_distribution(burstiness: float) -> None:
    """A gamma distribution of shape k has a coefficient of variation of 1 / sqrt(k): 1 for a Poisson process."""
    times = arrival_times(rng(), 20_000, rate=50.0, burstiness=burstiness)
    assert times[-1] == pytest.approx(400)
    gaps = np.diff(times)
    assert min(gaps) >= 0
    assert np.mean(gaps) == pytest.approx(0.02, rel=0.01)
    assert np.std(gaps) / np.mean(gaps) == pytest.approx(1 / math.sqrt(burstiness), rel=0.05)


def test_arrival_times_at_the_limits() -> None:
    assert arrival_times(rng(), 3, math.inf) == [0, 0, 0]
    assert arrival_times(rng(), 2, 4.0, 1e-12)[-1] == pytest.approx(0.5)
    assert arrival_times(rng(), 5, 2.0) == arrival_times(rng(), 5, 2.0)


def test_flags_and_reports_know_the_same_latencies() -> None:
    assert tuple(METRICS) == LATENCIES
    assert all(re.fullmatch("[a-z0-9]+", name) for name in LATENCIES)
