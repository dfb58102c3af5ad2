"""The table of hardware counters: reading what ncu prints, and the cases that it profiles."""

import dataclasses
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from benchmarks import counters
from benchmarks.counter_cases import OPS, Call, Shapes
from benchmarks.counters import METRICS, STALL_METRICS, known_metrics, read_csv, run_cases, text_row, with_cases
from benchmarks.kernels import Ragged
from gptoss_jax.model.config import ModelConfig
from pallas_kernels import use_backend

TINY = dataclasses.replace(
    ModelConfig(),
    **{"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_local_experts": 8, "sliding_window": 8},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16},
)
LONG, WAIT = STALL_METRICS["long_scoreboard"], STALL_METRICS["wait"]
# The columns and units of Nsight Compute's raw page, with its messages around them.
RAW = f'''==PROF== Connected to process 71 (/usr/bin/python3.12)
==PROF== Profiling "attention" - 1: 0%....50%....100% - 9 passes
"ID","Process ID","Kernel Name","Block Size","Grid Size","Device","CC","dram__bytes_read.sum","dram__bytes_write.sum",\
"gpu__time_duration.sum","launch__registers_per_thread","launch__shared_mem_per_block_dynamic",\
"launch__shared_mem_per_block_static","{METRICS["tensor"]}","{LONG}","{WAIT}"
"","","","","","","","byte","byte","ns","register/thread","Kbyte/block","byte/block","%","inst","inst"
"0","71","attention","(128, 1, 1)","(8, 1, 33)","0","9.0","9,999","0","1","1","0","0","1","0","0"
"1","71","case_marker","(32, 1, 1)","(2, 1, 1)","0","9.0","128","0","1,500","10","0","0","0","1.5","2.5"
"2","71","attention","(128, 1, 1)","(8, 1, 33)","0","9.0","16,777,216","1,024","12,345.5",\
"168","65.536","16","n/a","8.25","1.5"
"3","71","attention_join","(32, 1, 1)","(64, 1, 1)","0","9.0","1,024","0","2,000","32","0","0","","0","3"
==PROF== Disconnected from process 71
'''


def test_the_raw_page_is_read() -> None:
    kernel = read_csv(RAW.splitlines())[2]
    assert (kernel["kernel"], kernel["block"], kernel["grid"]) == ("attention", [128, 1, 1], [8, 1, 33])
    assert kernel["seconds"] == pytest.approx(12.3455e-6)
    assert (kernel["read"], kernel["written"], kernel["registers"]) == (1 << 24, 1024, 168)
    assert kernel["shared"] == pytest.approx(65536 + 16)
    assert kernel["tensor"] is None
    assert kernel["dram"] is None
    assert (kernel["stalls"]["long_scoreboard"], kernel["stalls"]["barrier"]) == (8.25, None)


def test_kernels_belong_to_the_case_of_the_marker_before_them() -> None:
    cases = [{"case": "first", "floor_seconds": 1.0}, {"case": "second", "floor_seconds": 7e-6}]
    rows = list(with_cases(read_csv(RAW.splitlines()), cases))
    assert [(row["case"], row["kernel"]) for row in rows] == [
        ("second", "attention"),
        ("second", "attention_join"),
    ]
    assert [row["case_seconds"] for row in rows] == pytest.approx([14.3455e-6] * 2)
    words = text_row(rows[0]).split()
    assert words == [
        "attention",
        "8x1x33",
        "128",
        "12.35",
        "16.78",
        "168",
        "65552",
        "long_scoreboard",
        "8.2,",
        "wait",
        "1.5",
    ]


def test_nothing_profiled_gives_no_rows() -> None:
    assert read_csv(["==PROF== Connected to process 71", "==WARNING== No kernels were profiled."]) == []


def test_metrics_that_ncu_does_not_list_are_left_out(tmp_path: Path) -> None:
    ncu = tmp_path / "ncu"
    ncu.write_text("#!/bin/sh\necho 'Device NVIDIA H200'; echo 'sm__warps_active  Counter  warp  # of warps'\n")
    ncu.chmod(0o755)
    kept = known_metrics(str(ncu))
    assert METRICS["occupancy"] in kept
    assert METRICS["registers"] in kept
    assert METRICS["l2"] not in kept
    ncu.write_text("#!/bin/sh\nexit 1\n")
    assert set(known_metrics(str(ncu))) == {*METRICS.values(), *STALL_METRICS.values()}


def calls(op: str, chunk: int = 16) -> Iterator[Call]:
    return OPS[op](TINY, Shapes([3], [40], chunk=chunk, earlier=(21,)))


@pytest.fixture(scope="module")
def attention_calls() -> dict[str, Call]:
    return {call.name: call for call in calls("attention")}


@pytest.mark.parametrize(
    "ops", [["rotary"], pytest.param(["attention", "expert_mlp", "linear", "route"], marks=pytest.mark.slow)]
)
def test_cases_run_on_any_backend(ops: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels that are profiled are those after the marker, once everything is compiled."""
    log: list[str] = []
    monkeypatch.setattr(counters, "mark", lambda index: log.append(f"mark {index}"))

    @contextmanager
    def collecting() -> Iterator[None]:
        log.append("start")
        yield
        log.append("stop")

    lines = io.StringIO()
    with use_backend("reference"):
        run_cases((call for op in ops for call in calls(op, chunk=2)), lines, collecting)
    cases = [json.loads(line) for line in lines.getvalue().splitlines()]
    assert len({case["case"] for case in cases}) == len(cases) >= 2
    assert all(case["floor_seconds"] > 0 for case in cases)
    assert log == [entry for i in range(len(cases)) for entry in (f"mark {i}", "start", f"mark {i}", "stop")]


def test_the_marker_of_a_case_has_its_number_of_blocks() -> None:
    gpu = AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=gpu)):
        x = jax.ShapeDtypeStruct((16,), jnp.int32)
        text = counters._marker.trace(x, 7).lower(lowering_platforms=("cuda",)).as_text()
    assert "grid_x = 7 : i32, grid_y = 1 : i32" in text
    assert f'name = "{counters.MARKER}"' in text


def test_no_case_is_of_zeros(attention_calls: dict[str, Call]) -> None:
    for call in attention_calls.values():
        for x in jax.tree.leaves(call.args):
            assert x.dtype == jnp.int32 or np.std(np.asarray(x, np.float32)) > 0.5, call.name


def test_the_floor_counts_each_key_once(attention_calls: dict[str, Call]) -> None:
    """Four heads of queries, and two of keys and values in bfloat16, all 16 wide."""
    row, queries = 2 * 2 * 16 * 2, 2 * 4 * 16 * 2
    decode = attention_calls["attention decode N=3 S=40 window=None"]
    assert decode.bytes == 3 * (40 * row + queries)
    assert decode.flops == 3 * 4 * 4 * 16 * 40
    full = attention_calls["attention prompt T=16 after 21 window=None"]
    assert full.flops == 4 * 4 * 16 * sum(p + 1 for p in range(21, 37))
    sliding = attention_calls["attention prompt T=16 after 21 window=8"]
    assert sliding.bytes == (7 + 16) * row + 16 * queries
    assert sliding.flops == 4 * 4 * 16 * 16 * 8
    drafts = attention_calls["attention decode N=3 T=4 S=908 window=8"]
    assert drafts.bytes == 3 * ((7 + 4) * row + 4 * queries)


@pytest.mark.parametrize("window", [None, 40])
def test_the_pages_of_sequences_are_their_own(window: int | None) -> None:
    """Sequences have the pages of the keys that their queries see, and tables are at least as wide as the engine's."""
    layout, pages = Ragged([1, 70, 2], [300, 100, 33], window).layout()
    tables = np.asarray(layout.page_tables_RM)
    assert tables.shape == (3, 64)
    blocks = [(0, 10), (0, 4), (0, 2)] if window is None else [(260 // 32, 10), (0, 4), (0, 2)]
    used = np.concatenate([tables[n, first:end] for n, (first, end) in enumerate(blocks)])
    assert sorted(used.tolist()) == list(range(pages))
    assert layout.starts_N.tolist() == [0, 1, 71]
