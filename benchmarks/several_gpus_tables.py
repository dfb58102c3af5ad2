"""The rows of several_gpus.py as Markdown tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.plan_check import host_bound

GIB = 2**30
MEMORY_TOLERANCE, TIME_TOLERANCE = 0.03, 0.25
"""Relative errors of the planner above which its figure is marked with a !."""

Row = dict[str, Any]


def tables(rows: Sequence[Row]) -> str:
    """Markdown tables of the rows, one section per part, then the parts that failed with the reasons."""
    machines = [row for row in rows if row["part"] == "devices" and "error" not in row]
    lines = [f"{row['devices']} x {row['device']}, jax {row['jax']}" for row in machines]
    for part, (title, make) in SECTIONS.items():
        own = [row for row in _with_collectives(rows) if row["part"] == part and row.keys() - KEYS]
        if own:
            lines += ["", f"## {title}", "", *make(own, machines[-1]["devices"] if machines else 1)]
    if failed := [row for row in rows if "error" in row]:
        lines += ["", "## Not measured", "", *table([[*_case(row), row["part"], row["error"]] for row in failed])]
    return "\n".join(lines)


def _with_collectives(rows: Sequence[Row]) -> list[Row]:
    """The rows; those of speed are merged with the later rows of their collectives."""

    def case(row: Row) -> tuple[Any, ...]:
        return tuple(row.get(name) for name in ("model", "mesh", "strategy", "batch"))

    alone = {case(row): row for row in rows if row["part"] == "collectives"}
    return [alone.get(case(row), {}) | row if row["part"] == "speed" else row for row in rows]


KEYS = {"model", "mesh", "strategy", "part", "batch", "step", "error"}
"""Fields that identify a row; a row with no other fields has failed."""


def table(
    cells: list[list[str]], head: Sequence[str] = ("model", "mesh", "strategy", "part", "error")
) -> list[str]:
    """Lines of a Markdown table with a header and rows."""
    rows = [head, ["---"] * len(head), *cells]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]


def logits(rows: list[Row], _: int) -> list[str]:
    head = (
        *("model", "mesh", "strategy", "one device vs float32", "mesh vs float32"),
        *("mesh vs one device", "bound", "within bound", "medians over tokens"),
        *("float32: mesh vs one device", "median", "differing tokens"),
    )

    def cells(row: Row) -> list[str]:
        within = "yes" if row["within"] else "NO"
        errors = ("one_from_float32", "from_float32", "from_one")
        figures = [*(_small(row.get(name)) for name in (*errors, "bound")), within]
        medians = [_small(row.get(f"median_{name}")) for name in errors]
        float32 = [_small(row.get(name)) for name in ("float32_from_one", "median_float32_from_one")]
        differing = f"{row['differing']} of {row['compared']}" if "differing" in row else ""
        return [*_case(row), *figures, " / ".join(filter(None, medians)), *float32, differing]

    notes = [
        "",
        "Relative errors (norms) of bfloat16 logits. The float32 reference uses the same weights, and is also computed "
        "on the mesh. One device computes as many sequences at a time as a device of the mesh. The bound is the "
        "largest error of one device against float32, over all batch sizes. Whether the mesh computes the same "
        "function is shown by the float32 columns; a token differs there if a near-tie in routing was resolved "
        "differently. Random embeddings are scaled up (EMBEDDING_RMS in on_a_mesh.py).",
    ]
    return table([cells(row) for row in rows], head) + notes


def tokens(rows: list[Row], _: int) -> list[str]:
    head = ("mesh", "strategy", "answers", "correct", "identical to one device", "tokens", "common prefix")

    def cells(row: Row) -> list[str]:
        compared = [_text(row.get("identical")), str(row["tokens"]), _text(row.get("common_prefix"))]
        return [*_case(row)[1:], str(row["answers"]), str(row["correct"]), *compared]

    return table([cells(row) for row in rows], head)


def speed(rows: list[Row], devices: int) -> list[str]:
    head = (
        *(
            "model",
            "mesh",
            "strategy",
            "batch",
            "decode tok/s",
            "step ms",
            "device ms",
            "efficiency",
            "collectives",
            "MB",
        ),
        *("bound ms", "isolated ms", "bound / isolated", "isolated / step", "prefill tok/s", "efficiency"),
    )
    one_device = {(row["model"], row["batch"]): row for row in rows if row.get("collectives") is None}

    def cells(row: Row) -> list[str]:
        one = one_device.get((row["model"], row["batch"]))

        def efficiency(name: str) -> str:
            return "" if one is None else f"{100 * row[name] / one[name] / size_of(row['mesh']):.0f} %"

        seconds = row.get("collective_alone")
        return [
            *_case(row),
            str(row["batch"]),
            f"{row['rate']:.0f}",
            _ms(row["step"]),
            _ms(row["device_step"]),
            efficiency("rate"),
            _text(row.get("collectives"), "{:.0f}"),
            _text(row.get("collective_bytes"), "{:.2f}", 1e-6),
            _ms(row.get("collective_least")),
            _ms(seconds),
            _percent(row.get("collective_least"), seconds),
            _percent(seconds, row["device_step"]),
            f"{row['prefill_rate']:.0f}",
            efficiency("prefill_rate"),
        ]

    notes = [
        "",
        "Efficiency: throughput relative to one device in this run times the number of devices. Collectives of a "
        "decode step: their number in the compiled program, the bytes of their arrays on a device, the lower bound of "
        "their time on the links, and their isolated time: that of the same collectives back to back on the same mesh, "
        "less that of the same program without them. A ragged all-to-all counts its whole array with unused space.",
        "",
        "### Which strategy is faster",
        "",
    ]
    return table([cells(row) for row in rows], head) + notes + faster(rows)


def faster(rows: list[Row]) -> list[str]:
    """A comparison of the two strategies, where both were measured."""
    head = (
        *("model", "mesh", "batch", "decode: replicated", "all-to-all, tok/s", "faster"),
        *("prefill: replicated", "all-to-all, tok/s", "faster"),
    )
    by_case: dict[tuple[str, str, int], dict[str, Row]] = {}
    for row in rows:
        by_case.setdefault((row["model"], row["mesh"], row["batch"]), {})[row["strategy"]] = row
    cells = []
    for (model, mesh, batch), both in by_case.items():
        if len(both) == 2:
            pairs = [(both["replicated"][name], both["all-to-all"][name]) for name in ("rate", "prefill_rate")]
            cells.append([model, mesh, str(batch), *(cell for pair in pairs for cell in _winner(*pair))])
    return table(cells, head) if cells else ["No mesh was measured with both strategies."]


def _winner(replicated: float, all_to_all: float) -> list[str]:
    name = "replicated" if replicated >= all_to_all else "all-to-all"
    ratio = max(replicated, all_to_all) / min(replicated, all_to_all)
    return [f"{replicated:.0f}", f"{all_to_all:.0f}", f"{name}, {ratio:.2f} x"]


def memory(rows: list[Row], _: int) -> list[str]:
    head = (
        *("model", "mesh", "strategy", "step", "planned GiB", "compiled", "peak used", "difference"),
        *("bound ms", "bound by", "links ms", "expected ms", "measured ms", "difference"),
    )

    def cells(row: Row) -> list[str]:
        early = row.get("peak") is not None and row["peak"] == row.get("peak_before")
        by_host = "dispatch_seconds" in row and host_bound(row)
        return [
            *_case(row),
            row["step"],
            *(_text(row.get(name), "{:.3f}", 1 / GIB) for name in ("planned_bytes", "compiled", "peak")),
            _difference(row.get("bytes_differ"), MEMORY_TOLERANCE)
            + (" (peak while weights were made)" if early else ""),
            _ms(row.get("least_seconds")),
            row.get("planned_by", ""),
            _ms(row.get("planned_link_seconds")),
            _ms(row.get("planned_seconds")),
            _ms(row.get("seconds")) + (" (host-bound)" if by_host else ""),
            _difference(None if by_host else row.get("seconds_differ"), TIME_TOLERANCE),
        ]

    notes = [
        "",
        f"The planner's figures compared with the device that uses most memory; ! marks differences of more than "
        f"{100 * MEMORY_TOLERANCE:.0f} % in memory or {100 * TIME_TOLERANCE:.0f} % in time.",
    ]
    return table([cells(row) for row in rows], head) + notes


def weights(rows: list[Row], _: int) -> list[str]:
    def cells(row: Row) -> list[str]:
        more = row["in_use"] and row["in_use"] / row["held"] - 1
        gib = [_text(row[name], "{:.3f}", 1 / GIB) for name in ("held", "in_use")]
        return [*_case(row), *gib, _difference(more, MEMORY_TOLERANCE)]

    return table([cells(row) for row in rows], ("model", "mesh", "strategy", "weights GiB", "in use", "more"))


SECTIONS: dict[str, tuple[str, Callable[[list[Row], int], list[str]]]] = {
    "logits": ("Logits", logits),
    "tokens": ("Greedy tokens of the shipped model", tokens),
    "speed": ("Speed", speed),
    "weights": ("Weights on a device, and the bytes that its allocator has in use after loading", weights),
    "memory": ("The planner", memory),
}


def size_of(mesh: str) -> int:
    """Number of devices of a mesh string."""
    size = 1
    for part in mesh.split(",") if "=" in mesh else ():
        size *= int(part.partition("=")[2])
    return size


def _case(row: Row) -> list[str]:
    return [str(row.get(name, "")) for name in ("model", "mesh", "strategy")]


def _text(value: Any, template: str = "{}", scale: float = 1) -> str:
    if value is None:
        return ""
    return template.format(value if scale == 1 else value * scale)


def _ms(seconds: float | None) -> str:
    return _text(seconds, "{:.3f}", 1e3)


def _percent(part: float | None, whole: float | None) -> str:
    return "" if part is None or not whole else f"{100 * part / whole:.0f} %"


def _small(value: float | None) -> str:
    return _text(value, "{:.2e}")


def _difference(share: float | None, allowed: float) -> str:
    return "" if share is None else f"{100 * share:+.1f} %{' !' if abs(share) > allowed else ''}"
