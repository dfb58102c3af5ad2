"""Tables and figures of the measurements."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from gptoss_jax.benching.start import PHASES, Start

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from gptoss_jax.benching.ceilings import Ceilings
    from gptoss_jax.benching.latency import Latency
    from gptoss_jax.benching.throughput import Percentiles, Throughput


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Lines with right-aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def latency_tables(found: Sequence[Latency], ceilings: Ceilings) -> str:
    """A table of times, one of the work in a step, and one of sampling modes where they were measured."""
    times = [
        [
            "batch",
            "prompt",
            "TTFT p50 ms",
            "TTFT max ms",
            "prefill tok/s",
            "% of floor",
            "step ms",
            "min-max",
            "decode tok/s",
        ]
    ]
    steps = [
        [
            "batch",
            "prompt",
            "GB/step",
            "floor ms",
            "% of floor",
            "device ms",
            "device idle",
            "kernels",
            "kernels/layer",
            "graphs",
            "kernels outside graphs",
        ]
    ]
    for one in found:
        key = [str(one.workload.batch), str(one.workload.prompt_tokens)]
        times.append(
            [
                *key,
                _ms(one.first_token),
                _ms(one.last_first_token),
                f"{one.prefill_rate:.0f}",
                _share(one.prefill_floor_share),
                _ms(one.step),
                "-".join(map(_ms, one.step_spread)),
                f"{one.rate:.1f}",
            ]
        )
        steps.append(
            [
                *key,
                f"{one.step_bytes / 1e9:.3f}",
                _ms(one.floor),
                _share(one.floor_share),
                _ms(one.device_step),
                _share(one.device_idle),
                str(one.kernels),
                f"{one.kernels_per_layer:.1f}",
                *(
                    "" if count is None else f"{count:.2f}"
                    for count in (one.graph_launches, one.kernels_outside_graphs)
                ),
            ]
        )
    tables = [aligned(times), aligned(steps)]
    if modes := list(found[0].sampling):
        sampling = [["batch", *modes]]
        for one in found:
            cells = [
                f"{1e6 * one.sampling[mode]:.0f} us, {_share(one.sampling[mode] / one.step)}" for mode in modes
            ]
            sampling.append([str(one.workload.batch), *cells])
        tables.append("Sampling time, and its share of a step\n" + aligned(sampling))
    notes = [
        f"Floor: {ceilings.copy_bytes / 1e9:.0f} GB/s of a large copy and {ceilings.matmul_flops / 1e12:.2f} TFLOP/s "
        "of a large matrix product, measured in this run; uniform routing is assumed."
    ]
    if any(one.drafted for one in found):
        notes += [f"batch {one.workload.batch}: {_drafts(one.drafted, one.accepted)}" for one in found]
    return "\n\n".join([*tables, "\n".join(notes)])


def throughput_table(one: Throughput) -> str:
    """Rates and counts, then percentiles of the requests' latencies."""
    rows = [["latency, ms", "p50", "p90", "p99"]]
    for name, seconds in _latencies(one):
        rows.append([name, *map(_ms, (seconds.p50, seconds.p90, seconds.p99))])
    lines = [
        f"{one.requests} requests in {one.seconds:.2f} s: {one.output_rate:.1f} output tok/s, {one.total_rate:.1f} "
        f"with prompts, {one.request_rate:.2f} requests/s",
        f"{one.prompt_tokens} prompt and {one.output_tokens} output tokens in {one.steps} steps, {one.max_running} "
        f"requests at once, {one.preemptions} preemptions, {one.compiled_programs} programs compiled, "
        f"{one.compiled_after_warm_up} since the warm-up",
        f"{_share(one.late_launch_share)} of launches came after the device had become idle; "
        f"{_share(one.padding_share)} of the computed tokens were padding",
    ]
    if one.drafted:
        lines.append(_drafts(one.drafted, one.accepted))
    return "\n".join([*lines, "", aligned(rows)])


def _latencies(one: Throughput) -> list[tuple[str, Percentiles]]:
    return [
        ("time to first token", one.first_token),
        ("time per output token", one.per_output_token),
        ("end to end", one.end_to_end),
    ]


def start_table(found: Sequence[Start]) -> str:
    """A table of the seconds of each phase."""
    names = [name.replace("_", " ") for name in PHASES]
    rows = [["seconds", *names, "total", "second request's first token"]]
    for one in found:
        seconds = [*(one.phases[name] for name in PHASES), one.total, one.second_request]
        rows.append([f"{one.compile_cache} compile cache", *(f"{value:.2f}" for value in seconds)])
    return aligned(rows)


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.2f}"


def _share(part: float) -> str:
    return f"{100 * part:.1f}%"


def _drafts(drafted: int, accepted: int) -> str:
    return f"{accepted} of {drafted} draft tokens were accepted ({_share(accepted / max(drafted, 1))})"


def latency_figure(found: Sequence[Latency]) -> Figure:
    """Decode rate and step time over the batch size, with the floor of each."""
    from matplotlib.figure import Figure

    picture = Figure(figsize=(11, 4.2))
    (rates, times) = picture.subplots(1, 2)
    for length in sorted({one.workload.prompt_tokens for one in found}):
        own = sorted(
            (one for one in found if one.workload.prompt_tokens == length), key=lambda one: one.workload.batch
        )
        batches = [one.workload.batch for one in own]
        [line] = rates.plot(batches, [one.rate for one in own], "o-", label=f"prompts of {length}")
        floors = [one.workload.batch / one.floor for one in own]
        rates.plot(batches, floors, "--", color=line.get_color(), label="bound by copy bandwidth")
        times.plot(batches, [1e3 * one.step for one in own], "o-", color=line.get_color(), label="step")
        times.plot(batches, [1e3 * one.floor for one in own], "--", color=line.get_color(), label="floor")
    rates.set_ylabel("tok/s")
    times.set_ylabel("step, ms")
    for axes in (rates, times):
        axes.set_xlabel("batch")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.legend(fontsize="small")
    return picture


def throughput_figure(one: Throughput) -> Figure:
    """Percentiles of the requests' latencies, as bars."""
    from matplotlib.figure import Figure

    picture = Figure(figsize=(11, 3.6))
    all_axes = picture.subplots(1, 3)
    for axes, (name, seconds) in zip(all_axes, _latencies(one), strict=True):
        axes.bar(["p50", "p90", "p99"], [1e3 * value for value in (seconds.p50, seconds.p90, seconds.p99)])
        axes.set_title(name)
        axes.set_ylabel("ms")
    picture.suptitle(f"{one.output_rate:.0f} output tok/s, {one.request_rate:.2f} requests/s")
    return picture


def start_figure(found: Sequence[Start]) -> Figure:
    """The phases of each start, as stacked bars."""
    from matplotlib.figure import Figure

    picture = Figure(figsize=(9, 2.6))
    axes = picture.subplots()
    names, left = [f"{one.compile_cache} cache" for one in found], [0.0] * len(found)
    for phase in PHASES:
        values = [one.phases[phase] for one in found]
        axes.barh(names, values, left=left, label=phase.replace("_", " "))
        left = [a + b for a, b in zip(left, values, strict=True)]
    axes.set_xlabel("seconds")
    axes.legend(fontsize="small", ncols=3)
    return picture
