"""Which released model fits which slice, as the README's table: python benchmarks/plan_table.py (extra: aot)."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

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
    "decode: tok/s at most",
    "bound by",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--slices", nargs="+", default=SLICES)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--context", type=int, default=8192)
    options = parser.parse_args()
    print("| " + " | ".join(HEADER) + " |\n|" + "---|" * len(HEADER))
    for model in options.models:
        for topology in options.slices:
            plan = planned(model, topology, options.batch, options.context)
            print("| " + " | ".join(row(model, plan)) + " |", flush=True)


def planned(model: str, topology: str, batch: int, context: int) -> dict[str, Any]:
    path = Path(__file__).parent.parent / "configs" / f"gpt_oss_{model}.json"
    command = [sys.executable, "-m", "gptoss_jax.plan", "--model", str(path), "--topology", topology, "--json"]
    command += ["--batch", str(batch), "--context", str(context)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def row(model: str, plan: dict[str, Any]) -> list[str]:
    best = plan["meshes"][0]
    decode = best["steps"]["decode"]
    mesh = ",".join(f"{axis}={size}" for axis, size in best["mesh"].items() if size > 1) or "data=1"
    held = best["weight_bytes"] + best["cache_bytes"]
    rest = f"{(best['bytes'] - held) / GIB:.1f}" if best["compiled"] else "not compiled"
    used = f"{best['bytes'] / GIB:.1f} of {best['usable_bytes'] / GIB:.1f}"
    speed = [f"{decode['most_tokens_per_second']:.0f}", decode["bound_by"]] if best["fits"] else ["", ""]
    parts = [f"{best[name] / GIB:.1f}" for name in ("weight_bytes", "cache_bytes")]
    fits = "yes" if best["fits"] else "no"
    return [model, f"`{plan['topology']}`", str(plan["devices"]), f"`{mesh}`", *parts, rest, used, fits, *speed]


if __name__ == "__main__":
    main()
