"""What XLA is told where weights are drawn and prepared, and where the engine's steps are compiled."""

from __future__ import annotations

from pallas_kernels import current_platform


def copies_in_turn() -> dict[str, str | bool] | None:
    """Options that keep copies of a loop's slices on the stream of all else, for NVIDIA GPUs; None for others.

    XLA would leave them to another stream there. Random weights made so on four H100s, which several processes
    shared, were not the same in all of them (benchmarks/RESULTS.md): these copies are one of the two things there whose
    order was left to streams.
    """
    if current_platform() != "cuda":
        return None
    return {"xla_disable_hlo_passes": "dynamic-slice-copy-fusion-async-wrapper"}
