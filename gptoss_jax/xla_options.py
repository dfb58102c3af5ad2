"""What XLA is told wherever this project compiles programs with loops."""

from __future__ import annotations

from pallas_kernels import current_platform


def copies_in_turn() -> dict[str, str | bool] | None:
    """Options that keep copies of a loop's slices on the stream of all else; None where XLA does that anyway.

    On NVIDIA GPUs it would leave them to another stream. Weights made so on four H100s, which several processes shared,
    were not the same in all of them (benchmarks/RESULTS.md). That such a copy, as of an expert's scales, is overtaken
    by the next one's data is suspected: nothing else there was left to chance.
    """
    if current_platform() != "cuda":
        return None
    return {"xla_disable_hlo_passes": "dynamic-slice-copy-fusion-async-wrapper"}
