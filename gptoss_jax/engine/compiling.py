"""Compilation of the engine's programs: XLA options, threads and Python's garbage collector."""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Callable, Iterator
from contextvars import copy_context

import jax
from jax.sharding import AbstractMesh, Mesh

from gptoss_jax.runtime.xla_options import in_order
from pallas_kernels import current_platform

GRAPHED = ("FUSION", "CUBLAS", "CUBLASLT", "CUSTOM_CALL", "CUDNN", "DYNAMIC_SLICE_FUSION", "CONDITIONAL")
"""The commands that XLA may put into CUDA graphs in every program."""

_others: dict[str, str | bool] = {}


class _Collector:
    """The number of blocks that keep Python's collector disabled, and whether the last one re-enables it."""

    lock = threading.Lock()
    blocks = 0
    enabled = False


def also_compile_with(options: dict[str, str | bool]) -> None:
    """Add XLA options to all later compilations, overriding the project's own; for benchmarks."""
    _others.update(options)


@contextlib.contextmanager
def collected_once() -> Iterator[None]:
    """Disable Python's garbage collector in the block, and collect once at the end of the last such block.

    Tracing steps creates hundreds of thousands of long-lived objects, and collecting them repeatedly takes a fifth of
    the tracing time. Without the final collection, a later one would pause running requests for tens of steps.
    """
    with _Collector.lock:
        if not _Collector.blocks:
            _Collector.enabled = gc.isenabled()
            gc.disable()
        _Collector.blocks += 1
    try:
        yield
    finally:
        with _Collector.lock:
            _Collector.blocks -= 1
            last = not _Collector.blocks
            if last and _Collector.enabled:
                gc.enable()
        if last:
            gc.collect()


def as_in_this_thread[Argument](function: Callable[[Argument], object]) -> Callable[[Argument], object]:
    """A function for other threads that runs with this thread's platform, backend and default device."""
    device = jax.config.jax_default_device
    context = copy_context()

    def run(argument: Argument) -> object:
        with jax.default_device(device):
            # A context cannot be entered by several threads at once.
            return context.copy().run(function, argument)

    return run


def graphs_collectives(mesh: Mesh | None) -> bool:
    """Whether CUDA graphs can include the mesh's collectives: on NVIDIA GPUs of a single process."""
    return mesh is not None and mesh.size > 1 and current_platform(mesh) == "cuda" and not mesh.is_multi_process


def compiler_options(
    mesh: Mesh | AbstractMesh | None, *, collectives: bool = False
) -> dict[str, str | bool] | None:
    """XLA options of a program on a mesh (see `in_order` for None); returns None if there are none.

    On NVIDIA GPUs, loops and branches become part of CUDA graphs. Otherwise the host waits for each condition, 0.7 ms
    per step on an H100, and cannot run ahead. Fusion autotuning with a second code generator is disabled: it takes more
    than a minute for sampling of many rows, and the kernels that matter are this project's own.

    With `collectives`, CUDA graphs include collectives instead of loops, since CUDA rejects loops that contain
    collectives. This suits programs that are launched repeatedly and whose loop lengths the host knows; prompts, whose
    steps run once, become slower. The collectives are NCCL's: with XLA's own, four H100s decode up to 8 % slower.
    """
    options = in_order(mesh) or {}
    if current_platform(mesh) == "cuda":
        options |= {
            "xla_gpu_enable_command_buffer": ",".join((*GRAPHED, "COLLECTIVES" if collectives else "WHILE")),
            "xla_gpu_experimental_enable_fusion_autotuner": False,
        }
        if collectives:
            options["xla_gpu_experimental_use_collective_kernels"] = ""
    return options | _others or None
