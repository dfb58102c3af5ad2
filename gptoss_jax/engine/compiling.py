"""How the engine's programs are compiled."""

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
"""What XLA may put into device graphs of any program."""

_others: dict[str, str | bool] = {}


class _Collector:
    """How many blocks keep Python's collector off, and whether it is to be on after the last."""

    lock = threading.Lock()
    blocks = 0
    enabled = False


def also_compile_with(options: dict[str, str | bool]) -> None:
    """Compile from now on with these options of XLA, too, which precede the project's: to measure what they change."""
    _others.update(options)


@contextlib.contextmanager
def collected_once() -> Iterator[None]:
    """Python's collector waits until the block ends, in whatever thread the last one does, and walks all objects then.

    Tracing steps makes hundreds of thousands of objects that stay: to walk them again and again, for nothing, takes a
    fifth of tracing's time. Those that are left to it would be walked while requests run, which then stand still for as
    long as tens of steps take.
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
    """The function for other threads, with the platform, the backend and the default device that hold in this one."""
    device = jax.config.jax_default_device
    context = copy_context()

    def run(argument: Argument) -> object:
        with jax.default_device(device):
            # A context cannot be entered twice at a time.
            return context.copy().run(function, argument)

    return run


def graphs_collectives(mesh: Mesh | None) -> bool:
    """Whether collectives on the mesh can be in device graphs: on the NVIDIA GPUs of one process."""
    return mesh is not None and mesh.size > 1 and current_platform(mesh) == "cuda" and not mesh.is_multi_process


def compiler_options(
    mesh: Mesh | AbstractMesh | None, *, collectives: bool = False
) -> dict[str, str | bool] | None:
    """What XLA is told beyond its defaults of a program on a mesh (as `in_order`); None for nothing.

    On NVIDIA GPUs, to put loops and branches into device graphs too. Else the host waits for each one's condition,
    0.7 ms a step on an H100, and cannot run ahead. And not to try a second code generator for each of its own kernels:
    for sampling of many rows that takes more than a minute, and what is worth tuning is in kernels of this project.

    With `collectives` they are put there instead of loops, since CUDA refuses a graph of loops with collectives inside:
    for programs that are launched again and again (prompts, whose steps come once, are read slower so), and whose loops
    have lengths that the host knows. They are NCCL's: with XLA's own, four H100s decode up to 8 % slower.
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
