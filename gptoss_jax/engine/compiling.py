"""How the engine's programs are compiled."""

from __future__ import annotations

from pallas_kernels import current_platform

GRAPHED = ("FUSION", "CUBLAS", "CUBLASLT", "CUSTOM_CALL", "CUDNN", "DYNAMIC_SLICE_FUSION", "CONDITIONAL", "WHILE")


_others: dict[str, str | bool] = {}


def also_compile_with(options: dict[str, str | bool]) -> None:
    """Compile from now on with these options of XLA, too, which precede the project's: to measure what they change."""
    _others.update(options)


def compiler_options() -> dict[str, str | bool] | None:
    """What XLA is told beyond its defaults, None for nothing.

    On NVIDIA GPUs, to put loops and branches into device graphs too. Else the host waits for each one's condition,
    0.7 ms a step on an H100, and cannot run ahead. And not to try a second code generator for each of its own kernels:
    for sampling of many rows that takes more than a minute, and what is worth tuning is in kernels of this project.
    """
    options: dict[str, str | bool] = {}
    if current_platform() == "cuda":
        options = {
            "xla_gpu_enable_command_buffer": ",".join(GRAPHED),
            "xla_gpu_experimental_enable_fusion_autotuner": False,
        }
    return options | _others or None
