"""Writes Orbax checkpoints with orbax-checkpoint, with one tensor in memory at a time."""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gptoss_jax.checkpoints.safetensors_file import DTYPES, TensorInfo, show
from gptoss_jax.errors import CheckpointError

try:
    import orbax.checkpoint as ocp
except ImportError as error:
    raise CheckpointError(f"Orbax checkpoints need the package orbax-checkpoint: {error}") from None

WRITE_CHUNK_BYTES = 2 << 20
"""Chunk size, the minimum size of a read: small relative to an expert, so that sharded reads waste little."""

DATA_FILE_BYTES = 256 << 20
"""Size of a data file, which Orbax holds in memory until it is full."""

# The end of TensorStore's error messages.
_OS_ERROR = re.compile(r"\[os_error_code='(\d+)'\]")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress Orbax's logging of exceptions that it also raises."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)


class _Lazy:
    """An array that is created when it is written."""

    def __init__(self, info: TensorInfo, make: Callable[[str], np.ndarray]) -> None:
        self.shape, self.dtype, self.nbytes = info.shape, DTYPES[info.dtype], info.nbytes
        self.size = int(np.prod(info.shape, dtype=np.int64))
        self.make = lambda: make(info.name)


class _LazyHandler(ocp.type_handlers.NumpyHandler):
    """Creates and writes one array at a time; Orbax by itself would hold all of them in memory."""

    def __init__(self) -> None:
        super().__init__(deepcopy_host_arrays=False)

    async def serialize(
        self, values: Sequence[Any], infos: Sequence[Any], args: Sequence[Any] | None = None
    ) -> Sequence[Any]:
        """Write the values and wait for them."""
        for value, info, arg in zip(values, infos, args or [ocp.SaveArgs()] * len(values), strict=True):
            commits = await super().serialize([value.make()], [info], [arg])
            # A pending commit keeps its array alive.
            while commits:
                commits.pop().result()
        return []


def write_orbax(directory: Path, tensors: Sequence[TensorInfo], make: Callable[[str], np.ndarray]) -> None:
    """Write a new directory of arrays. `make` creates each by its name, one at a time in memory.

    Raises OSError if the directory cannot be written, and any exception of `make`.
    """
    failures: list[BaseException] = []

    def recorded(name: str) -> np.ndarray:
        try:
            return make(name)
        except BaseException as error:
            failures.append(error)
            raise

    registry = ocp.type_handlers.create_type_handler_registry(
        (_Lazy, _LazyHandler()), (jax.Array, ocp.type_handlers.ArrayHandler())
    )
    tree = {info.name: _Lazy(info, recorded) for info in tensors}
    save_args = {
        info.name: ocp.SaveArgs(
            chunk_byte_size=WRITE_CHUNK_BYTES,
            # A chunk of stacked experts holds whole experts or a part of one.
            shard_axes=(0,) if len(info.shape) > 2 else (),
        )
        for info in tensors
    }
    handler = ocp.PyTreeCheckpointHandler(use_compression=False, type_handler_registry=registry)
    args = ocp.args.PyTreeSave(tree, save_args=save_args, ocdbt_target_data_file_size=DATA_FILE_BYTES)
    try:
        with _quiet(), ocp.Checkpointer(handler) as checkpointer:
            checkpointer.save(directory.absolute(), args=args)
    except Exception as error:
        if failures:
            raise failures[0] from None
        found = _OS_ERROR.search(str(error))
        if found:
            raise OSError(int(found[1]), os.strerror(int(found[1]))) from None
        if isinstance(error, OSError):
            raise
        raise OSError(show(str(error).strip().partition("\n")[0])) from None
