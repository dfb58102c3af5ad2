"""Measurements as tables and as pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from gptoss_jax.benching.start import PHASES, Start

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from gptoss_jax.benching.ceilings import Ceilings
    from gptoss_jax.benching.latency import Latency
    from gptoss_jax.benching.throughput import Throughput


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as they need be, to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def latency_tables(found: Sequence[Latency], ceilings: Ceilings) -> str:
    """Time to first token and a step's time, then what a step is made of."""
    times = [
        ["batch", "prompt", "first token ms", "last", "prefill tok/s", "of floor", "ms/step", "min-max", "tok/s"]
    ]
    steps = [
        [
            "batch",
            "prompt",
            "GB/step",
            "floor ms",
            "reached",
            "device ms",
            "waits",
            "kernels",
            "a layer",
            "graphs",
            "alone",
        ]
    ]
    for one in found:
        key = [str(one.case.batch), str(one.case.prompt_tokens)]
        times.append(
            [
                *key,
                _ms(one.first_token),
                _ms(one.last_first_token),
                f"{one.prefill_rate:.0f}",
                _share(one.prefill_reached),
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
                _share(one.reached),
                _ms(one.device),
                _share(one.waits),
                str(one.kernels),
                f"{one.kernels_a_layer:.1f}",
                *("" if count is None else f"{count:.2f}" for count in (one.graphs, one.lone_kernels)),
            ]
        )
    parts = [aligned(times), aligned(steps)]
    if ways := list(found[0].sampling):
        sampling = [["batch", *ways]]
        for one in found:
            shares = [f"{1e6 * one.sampling[way]:.0f} us, {_share(one.sampling[way] / one.step)}" for way in ways]
            sampling.append([str(one.case.batch), *shares])
        parts.append("Choosing tokens, and its share of a step\n" + aligned(sampling))
    notes = [
        f"Floor: {ceilings.copy_bytes / 1e9:.0f} GB/s of a large copy, {ceilings.matmul_flops / 1e12:.2f} TFLOP/s of a "
        f"large matrix product, measured in this run; routing counted as uniform."
    ]
    if any(one.drafted for one in found):
        notes += [f"batch {one.case.batch}: {_guesses(one.drafted, one.accepted)}" for one in found]
    return "\n\n".join([*parts, "\n".join(notes)])


def throughput_table(one: Throughput) -> str:
    """Rates, then what requests saw."""
    rows = [["ms", "p50", "p90", "p99"]]
    for name, of in (("first token", one.first_token), ("a token", one.between_tokens), ("whole", one.whole)):
        rows.append([name, *map(_ms, (of.p50, of.p90, of.p99))])
    lines = [
        f"{one.requests} requests in {one.seconds:.2f} s: {one.output_rate:.1f} output tok/s, {one.total_rate:.1f} "
        f"with prompts, {one.request_rate:.2f} requests/s",
        f"{one.prompt_tokens} prompt and {one.output_tokens} output tokens in {one.steps} steps, {one.most_running} "
        f"requests at once, {one.preemptions} pre-emptions, {one.compiled} compiles",
        f"{_share(one.late)} of launches found the device waiting for the host",
    ]
    if one.drafted:
        lines.append(_guesses(one.drafted, one.accepted))
    return "\n".join([*lines, "", aligned(rows)])


def start_table(found: Sequence[Start]) -> str:
    """Seconds of each phase."""
    names = [name.replace("_", " ") for name in PHASES]
    rows = [["seconds", *names, "total", "again, first token"]]
    for one in found:
        seconds = [*(one.phases[name] for name in PHASES), one.total, one.again]
        rows.append([f"{one.compile_cache} compile cache", *(f"{value:.2f}" for value in seconds)])
    return aligned(rows)


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.2f}"


def _share(part: float) -> str:
    return f"{100 * part:.1f}%"


def _guesses(drafted: int, accepted: int) -> str:
    return f"{accepted} of {drafted} guessed tokens stood ({_share(accepted / max(drafted, 1))})"


def latency_figure(found: Sequence[Latency]) -> Figure:
    """Tokens a second and a step's time over the batch, beside the floor."""
    from matplotlib.figure import Figure

    picture = Figure(figsize=(11, 4.2))
    (rates, times) = picture.subplots(1, 2)
    for length in sorted({one.case.prompt_tokens for one in found}):
        own = sorted((one for one in found if one.case.prompt_tokens == length), key=lambda one: one.case.batch)
        batches = [one.case.batch for one in own]
        [line] = rates.plot(batches, [one.rate for one in own], "o-", label=f"prompts of {length}")
        floors = [one.case.batch / one.floor for one in own]
        rates.plot(batches, floors, "--", color=line.get_color(), label="if memory were the only bound")
        times.plot(batches, [1e3 * one.step for one in own], "o-", color=line.get_color(), label="step")
        times.plot(batches, [1e3 * one.floor for one in own], "--", color=line.get_color(), label="floor")
    rates.set_ylabel("tok/s")
    times.set_ylabel("ms a step")
    for axes in (rates, times):
        axes.set_xlabel("batch")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.legend(fontsize="small")
    return picture


def throughput_figure(one: Throughput) -> Figure:
    """What requests saw, as bars."""
    from matplotlib.figure import Figure

    picture = Figure(figsize=(11, 3.6))
    all_axes = picture.subplots(1, 3)
    parts = (("first token", one.first_token), ("a token", one.between_tokens), ("whole request", one.whole))
    for axes, (name, of) in zip(all_axes, parts, strict=True):
        axes.bar(["p50", "p90", "p99"], [1e3 * value for value in (of.p50, of.p90, of.p99)])
        axes.set_title(name)
        axes.set_ylabel("ms")
    picture.suptitle(f"{one.output_rate:.0f} output tok/s, {one.request_rate:.2f} requests/s")
    return picture


def start_figure(found: Sequence[Start]) -> Figure:
    """The phases one after the other."""
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
