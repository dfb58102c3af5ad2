"""The rows of several_gpus.py as Markdown tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.plan_check import waits_for_host

GIB = 2**30
MEMORY_DIFFERS, TIME_DIFFERS = 0.03, 0.25
"""Shares by which the planner may be off before its figure is marked with a !."""

Row = dict[str, Any]


def tables(rows: Sequence[Row]) -> str:
    """All that the rows know, a section a part, then what failed and why."""
    machines = [row for row in rows if row["part"] == "devices" and "error" not in row]
    lines = [f"{row['devices']} x {row['device']}, jax {row['jax']}" for row in machines]
    for part, (title, make) in SECTIONS.items():
        own = [row for row in _whole(rows) if row["part"] == part and row.keys() - KEYS]
        if own:
            lines += ["", f"## {title}", "", *make(own, machines[-1]["devices"] if machines else 1)]
    if failed := [row for row in rows if "error" in row]:
        lines += ["", "## Not measured", "", *table([[*_case(row), row["part"], row["error"]] for row in failed])]
    return "\n".join(lines)


def _whole(rows: Sequence[Row]) -> list[Row]:
    """The rows, those of speeds with the times of their collectives, which are measured later."""

    def case(row: Row) -> tuple[Any, ...]:
        return tuple(row.get(name) for name in ("model", "mesh", "strategy", "batch"))

    alone = {case(row): row for row in rows if row["part"] == "collectives"}
    return [alone.get(case(row), {}) | row if row["part"] == "speed" else row for row in rows]


KEYS = {"model", "mesh", "strategy", "part", "batch", "step", "error"}
"""What says which row it is; a row of nothing else failed."""


def table(cells: list[list[str]], head: Sequence[str] = ("model", "mesh", "strategy", "part", "why")) -> list[str]:
    """Markdown, of a head and rows."""
    rows = [head, ["---"] * len(head), *cells]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]


def logits(rows: list[Row], _: int) -> list[str]:
    head = (
        *("model", "mesh", "strategy", "one device from float32", "mesh from float32"),
        *("mesh from one device", "bound", "within", "medians over tokens"),
        *("float32: mesh from one device", "median", "tokens unlike"),
    )

    def cells(row: Row) -> list[str]:
        within = "yes" if row["within"] else "NO"
        errors = ("one_from_float32", "from_float32", "from_one")
        figures = [*(_small(row.get(name)) for name in (*errors, "bound")), within]
        medians = [_small(row.get(f"median_{name}")) for name in errors]
        float32 = [_small(row.get(name)) for name in ("float32_from_one", "median_float32_from_one")]
        unlike = f"{row['unlike']} of {row['compared']}" if "unlike" in row else ""
        return [*_case(row), *figures, " / ".join(filter(None, medians)), *float32, unlike]

    notes = [
        "",
        "Relative errors (norms) of logits in bfloat16; float32 is the reference on the same weights, also on the "
        "mesh, and one device computes as many sequences at once as a device of the mesh. Bound: the furthest that one "
        "device is from float32, however many it computes at once. Whether the mesh computes the same is what float32 "
        "tells. A token of it is unlike where a near-tie in routing went to another expert. Random embeddings are "
        "scaled up (LOUDNESS in on_a_mesh.py).",
    ]
    return table([cells(row) for row in rows], head) + notes


def tokens(rows: list[Row], _: int) -> list[str]:
    head = ("mesh", "strategy", "answers", "right", "identical to one device's", "tokens", "alike from the start")

    def cells(row: Row) -> list[str]:
        alike = [_text(row.get("identical")), str(row["tokens"]), _text(row.get("tokens_alike"))]
        return [*_case(row)[1:], str(row["answers"]), str(row["right"]), *alike]

    return table([cells(row) for row in rows], head)


def speed(rows: list[Row], devices: int) -> list[str]:
    head = (
        *(
            "model",
            "mesh",
            "strategy",
            "batch",
            "tok/s",
            "ms/step",
            "device ms",
            "efficiency",
            "collectives",
            "MB",
        ),
        *("least ms", "alone ms", "least of alone", "alone of the step", "prefill tok/s", "efficiency"),
    )
    alone = {(row["model"], row["batch"]): row for row in rows if row.get("collectives") is None}

    def cells(row: Row) -> list[str]:
        one = alone.get((row["model"], row["batch"]))

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
        "Efficiency: against one device in this run, times the devices. Collectives of a decode step: how many the "
        "compiled program has, the bytes of their arrays on a device, the least time of these on the links, and the "
        "time of as many of these sizes alone on the same mesh, one after the other, less that of the same program "
        "without them. A ragged all-to-all counts with its array's spare room, of which it sends nothing.",
        "",
        "### Which strategy is faster",
        "",
    ]
    return table([cells(row) for row in rows], head) + notes + faster(rows)


def faster(rows: list[Row]) -> list[str]:
    """The two strategies side by side, where both were measured."""
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
    return table(cells, head) if cells else ["No mesh was measured with both."]


def _winner(replicated: float, all_to_all: float) -> list[str]:
    name = "replicated" if replicated >= all_to_all else "all-to-all"
    ratio = max(replicated, all_to_all) / min(replicated, all_to_all)
    return [f"{replicated:.0f}", f"{all_to_all:.0f}", f"{name}, {ratio:.2f} x"]


def memory(rows: list[Row], _: int) -> list[str]:
    head = (
        *("model", "mesh", "strategy", "step", "planned GiB", "compiled", "peak used", "differs"),
        *("least ms", "by", "of it links", "expected ms", "took ms", "differs"),
    )

    def cells(row: Row) -> list[str]:
        early = row.get("peak") is not None and row["peak"] == row.get("peak_before")
        waits = "dispatch_seconds" in row and waits_for_host(row)
        return [
            *_case(row),
            row["step"],
            *(_text(row.get(name), "{:.3f}", 1 / GIB) for name in ("planned_bytes", "compiled", "peak")),
            _differs(row.get("bytes_differ"), MEMORY_DIFFERS)
            + (" (peak while weights were made)" if early else ""),
            _ms(row.get("least_seconds")),
            row.get("planned_by", ""),
            _ms(row.get("planned_link_seconds")),
            _ms(row.get("planned_seconds")),
            _ms(row.get("seconds")) + (" (waits for the host)" if waits else ""),
            _differs(None if waits else row.get("seconds_differ"), TIME_DIFFERS),
        ]

    notes = [
        "",
        f"The planner's figures against the fullest device's; ! marks more than {100 * MEMORY_DIFFERS:.0f} % of "
        f"memory or {100 * TIME_DIFFERS:.0f} % of time.",
    ]
    return table([cells(row) for row in rows], head) + notes


def weights(rows: list[Row], _: int) -> list[str]:
    def cells(row: Row) -> list[str]:
        more = row["in_use"] and row["in_use"] / row["held"] - 1
        gib = [_text(row[name], "{:.3f}", 1 / GIB) for name in ("held", "in_use")]
        return [*_case(row), *gib, _differs(more, MEMORY_DIFFERS)]

    return table([cells(row) for row in rows], ("model", "mesh", "strategy", "weights GiB", "in use", "more"))


SECTIONS: dict[str, tuple[str, Callable[[list[Row], int], list[str]]]] = {
    "logits": ("Logits", logits),
    "tokens": ("Greedy tokens of the shipped model", tokens),
    "speed": ("Speed", speed),
    "weights": ("Weights on a device, and what its allocator has in use once they are made", weights),
    "memory": ("The planner", memory),
}


def size_of(mesh: str) -> int:
    """The devices of a mesh's text."""
    size = 1
    for part in mesh.split(",") if "=" in mesh else ():
        size *= int(part.partition("=")[2])
    return size


def _case(row: Row) -> list[str]:
    return [str(row.get(name, "")) for name in ("model", "mesh", "strategy")]


def _text(value: Any, form: str = "{}", scale: float = 1) -> str:
    if value is None:
        return ""
    return form.format(value if scale == 1 else value * scale)


def _ms(seconds: float | None) -> str:
    return _text(seconds, "{:.3f}", 1e3)


def _percent(part: float | None, whole: float | None) -> str:
    return "" if part is None or not whole else f"{100 * part / whole:.0f} %"


def _small(value: float | None) -> str:
    return _text(value, "{:.2e}")


def _differs(share: float | None, allowed: float) -> str:
    return "" if share is None else f"{100 * share:+.1f} %{' !' if abs(share) > allowed else ''}"
