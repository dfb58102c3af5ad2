"""Metrics of fixed outcomes, worked out by hand."""

import pytest

from gptoss_jax.benching.load import Outcome
from gptoss_jax.benching.load_metrics import (
    details,
    is_good,
    latencies,
    peak_concurrency,
    peak_output_rate,
    summary,
    table,
)
from gptoss_jax.benching.requests import Request

REQUEST = Request([1, 2, 3], 3, 9)


def outcome(started: float, times: list[float], **fields: object) -> Outcome:
    return Outcome(REQUEST, started, times, ended=times[-1] if times else 0.0, **fields)  # type: ignore[arg-type]


FAST = outcome(10.0, [10.25, 10.5, 11.25], input_tokens=8, output_tokens=5)
"""Two tokens in some event: TTFT 250, TPOT 1000 / 4, gaps of 250 and 750, E2EL 1250 ms."""
SLOW = outcome(10.5, [11.5, 12.0])
"""No usage: TTFT 1000, TPOT 500, a gap of 500, E2EL 1500 ms; 3 tokens in, 2 out."""
SINGLE = outcome(12.0, [12.5], input_tokens=4, output_tokens=1)
"""One token: TTFT and E2EL 500 ms."""
FAILED = outcome(10.0, [10.1, 10.2], error="dropped")
ALL = [FAST, SLOW, SINGLE, FAILED]


def test_latencies_of_a_request() -> None:
    assert latencies(FAST) == {"ttft": [0.25], "tpot": [0.25], "itl": [0.25, 0.75], "e2el": [1.25]}
    assert latencies(SLOW) == {"ttft": [1.0], "tpot": [0.5], "itl": [0.5], "e2el": [1.5]}
    assert latencies(SINGLE) == {"ttft": [0.5], "tpot": [], "itl": [], "e2el": [0.5]}


def test_summary() -> None:
    found = summary(ALL, 4.0, percentiles=[50, 99.9], goodput={"ttft": 500.0, "e2el": 1250.0})
    assert found == {
        "duration": 4.0,
        "completed": 3,
        "failed": 1,
        "total_input_tokens": 15,
        "total_output_tokens": 8,
        "request_throughput": 0.75,
        "request_goodput": 0.5,
        "output_throughput": 2.0,
        "total_token_throughput": 5.75,
        # FAST's three events, of 5 / 3 tokens each, are at 0.25, 0.5 and 1.25 s, SLOW's at 1.5 and 2, SINGLE's at 2.5.
        "max_output_tokens_per_s": pytest.approx(10 / 3),
        "max_concurrent_requests": 2,
        "mean_ttft_ms": pytest.approx(1750 / 3),
        "median_ttft_ms": 500.0,
        # Deviations of -1000/3, 1250/3 and -250/3 from the mean.
        "std_ttft_ms": pytest.approx((((1000 / 3) ** 2 + (1250 / 3) ** 2 + (250 / 3) ** 2) / 3) ** 0.5),
        "p50_ttft_ms": 500.0,
        # Linear interpolation at 0.999 * 2 of the way from the second to the third value.
        "p99.9_ttft_ms": pytest.approx(500 + 0.998 * 500),
        "mean_tpot_ms": 375.0,
        "median_tpot_ms": 375.0,
        "std_tpot_ms": 125.0,
        "p50_tpot_ms": 375.0,
        "p99.9_tpot_ms": pytest.approx(250 + 0.999 * 250),
        "mean_itl_ms": 500.0,
        "median_itl_ms": 500.0,
        "std_itl_ms": pytest.approx((2 / 3) ** 0.5 * 250),
        "p50_itl_ms": 500.0,
        "p99.9_itl_ms": pytest.approx(500 + 0.998 * 250),
        "mean_e2el_ms": pytest.approx(3250 / 3),
        "median_e2el_ms": 1250.0,
        "std_e2el_ms": pytest.approx((((500 / 3) ** 2 + (1250 / 3) ** 2 + (1750 / 3) ** 2) / 3) ** 0.5),
        "p50_e2el_ms": 1250.0,
        "p99.9_e2el_ms": pytest.approx(1250 + 0.998 * 250),
    }


@pytest.mark.parametrize(
    ("goodput", "good"),
    [
        ({"ttft": 250.0}, [True, False, False]),
        ({"tpot": 250.0}, [True, False, True]),
        # The longest gap counts.
        ({"itl": 749.0}, [False, True, True]),
        ({"e2el": 1499.0}, [True, False, True]),
        ({"ttft": 1000.0, "itl": 500.0}, [False, True, True]),
    ],
)
def test_goodput_counts_requests_within_all_limits(goodput: dict[str, float], good: list[bool]) -> None:
    assert [is_good(latencies(one), goodput) for one in (FAST, SLOW, SINGLE)] == good


def test_peaks() -> None:
    assert peak_concurrency([]) == 0
    assert peak_output_rate([]) == 0
    # One ends when the other starts.
    assert peak_concurrency([outcome(0, [1.0]), outcome(1.0, [2.0])]) == 1
    assert (
        peak_concurrency([outcome(0, [1.0]), outcome(0.5, [2.0]), outcome(0.9, [3.0]), outcome(1.5, [4.0])]) == 3
    )


def test_without_measurements_there_are_no_latencies() -> None:
    found = summary([FAILED], 1.0)
    assert (found["completed"], found["failed"], found["request_goodput"]) == (0, 1, None)
    assert found["mean_ttft_ms"] is found["p99_itl_ms"] is None
    assert "Mean TTFT (ms):                          n/a" in table(found, ["ttft"], [99])


def test_the_table_has_the_layout_of_vllm() -> None:
    found = summary(ALL, 4.0, ["ttft"], [99.0], {"ttft": 500.0}) | {"max_concurrency": 8, "request_rate": 2.5}
    assert table(found, ["ttft"], [99.0]).splitlines() == [
        "============ Serving Benchmark Result ============",
        "Successful requests:                     3",
        "Failed requests:                         1",
        "Maximum request concurrency:             8",
        "Request rate configured (RPS):           2.50",
        "Benchmark duration (s):                  4.00",
        "Total input tokens:                      15",
        "Total generated tokens:                  8",
        "Request throughput (req/s):              0.75",
        "Request goodput (req/s):                 0.50",
        "Output token throughput (tok/s):         2.00",
        "Peak output token throughput (tok/s):    3.33",
        "Peak concurrent requests:                2",
        "Total token throughput (tok/s):          5.75",
        "---------------Time to First Token----------------",
        "Mean TTFT (ms):                          583.33",
        "Median TTFT (ms):                        500.00",
        "P99 TTFT (ms):                           990.00",
        "==================================================",
    ]


def test_details_are_in_the_order_of_the_requests() -> None:
    found = details([SLOW, SINGLE, FAILED, FAST])
    assert found["start_times"] == [10.0, 10.0, 10.5, 12.0]
    assert found["errors"] == ["dropped", "", "", ""]
    assert found["ttfts"] == [0.0, 0.25, 1.0, 0.5]
    assert found["itls"] == [[], [0.25, 0.75], [0.5], []]
    assert found["output_lens"] == [0, 5, 2, 1]
    assert found["input_lens"] == [3, 8, 3, 4]
