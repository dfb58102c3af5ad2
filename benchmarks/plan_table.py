"""Which released model fits on which slice, as a table: python -m benchmarks.plan_table (extra: aot).

The table is in docs/planner.md; `--short` prints mesh and memory only.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.plan_check import output

GIB = 2**30
MODELS = ("20b", "120b")
SLICES = (
    "v5e:2x2",
    "v5e:2x4",
    "v5e:4x8",
    "v6e:2x2",
    "v6e:4x4",
    "v5p:2x2x2",
    "tpu7x:2x2x1",
    "h100:1x1x1",
    "h100:1x1x8",
    "h200:1x1x1",
)
HEADER = (
    "model",
    "slice",
    "devices",
    "best mesh",
    "weights",
    "KV cache",
    "temporaries and code",
    "of usable GiB",
    "fits",
    "decode: max tok/s",
    "bound by",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--slices", nargs="+", default=SLICES)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--short", action="store_true", help="one row per slice: mesh and memory of each model")
    options = parser.parse_args()

    def plan(model: str, topology: str) -> dict[str, Any]:
        return planned(model, topology, options.batch, options.context)

    if options.short:
        show(["slice", *options.models])
        for topology in options.slices:
            show([f"`{topology}`", *(cell(plan(model, topology)) for model in options.models)])
        return
    show(HEADER)
    for model, topology in itertools.product(options.models, options.slices):
        show(row(model, plan(model, topology)))


def show(cells: Sequence[str]) -> None:
    """Print a row of a Markdown table, and the separator after the header."""
    print("| " + " | ".join(cells) + " |", flush=True)
    if cells[0] in (HEADER[0], "slice"):
        print("|" + "---|" * len(cells))


def planned(model: str, topology: str, batch: int, context: int) -> dict[str, Any]:
    path = Path(__file__).parent.parent / "configs" / f"gpt_oss_{model}.json"
    command = [sys.executable, "-m", "gptoss_jax.plan", "--model", str(path), "--topology", topology, "--json"]
    command += ["--batch", str(batch), "--context", str(context)]
    return json.loads(output(command))


def cell(plan: dict[str, Any]) -> str:
    best = plan["meshes"][0]
    used = f"{best['bytes'] / GIB:.1f} of {best['usable_bytes'] / GIB:.1f} GiB"
    return f"`{mesh_of(best)}`: {used}" if best["fits"] else f"no: {used}"


def mesh_of(mesh_plan: dict[str, Any]) -> str:
    return ",".join(f"{axis}={size}" for axis, size in mesh_plan["mesh"].items() if size > 1) or "data=1"


def row(model: str, plan: dict[str, Any]) -> list[str]:
    best = plan["meshes"][0]
    decode = best["steps"]["decode"]
    held = best["weight_bytes"] + best["cache_bytes"]
    rest = f"{(best['bytes'] - held) / GIB:.1f}" if best["compiled"] else "not compiled"
    used = f"{best['bytes'] / GIB:.1f} of {best['usable_bytes'] / GIB:.1f}"
    speed = [f"{decode['max_tokens_per_second']:.0f}", decode["bound_by"]] if best["fits"] else ["", ""]
    parts = [f"{best[name] / GIB:.1f}" for name in ("weight_bytes", "cache_bytes")]
    fits = "yes" if best["fits"] else "no"
    return [
        model,
        f"`{plan['topology']}`",
        str(plan["devices"]),
        f"`{mesh_of(best)}`",
        *parts,
        rest,
        used,
        fits,
        *speed,
    ]


if __name__ == "__main__":
    main()
