"""Creates a directory atomically: it appears once it is complete, or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from gptoss_jax.errors import CheckpointError


@contextlib.contextmanager
def new_directory(directory: str | Path) -> Iterator[Path]:
    """A temporary directory that becomes `directory` when the block ends without an exception.

    `directory` must not exist or must be empty. The temporary directory is hidden and beside it; those that killed
    processes left behind are removed. Raises CheckpointError, also for an OSError inside the block.
    """
    directory = Path(directory).absolute()
    try:
        if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
            raise CheckpointError(f"{directory}: expected a new or empty directory, found it in use")
        directory.parent.mkdir(parents=True, exist_ok=True)
        for stale in directory.parent.glob(f".{glob.escape(directory.name)}.partial-*"):
            with _locked(stale) as locked:
                if locked:
                    shutil.rmtree(stale, ignore_errors=True)
        partial = directory.parent / f".{directory.name}.partial-{uuid.uuid4().hex[:8]}"
        partial.mkdir()
        with _locked(partial):
            try:
                yield partial
                os.replace(partial, directory)
            except BaseException:
                _remove(partial)
                raise
    except OSError as error:
        raise CheckpointError(f"{directory}: cannot be written: {error.strerror or error}") from None


def _remove(directory: Path) -> None:
    """Remove a directory in which the threads of a writer may still create files."""
    gone_since = None
    for _ in range(100):
        shutil.rmtree(directory, ignore_errors=True)
        now = time.monotonic()
        gone_since = None if directory.exists() else gone_since or now
        if gone_since is not None and now - gone_since > 0.2:
            return
        time.sleep(0.05)


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[bool]:
    """Try to lock a directory for the duration of the block or the process; yields whether that succeeded."""
    try:
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        yield False
        return
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free = True
        except OSError:  # Held by a running process, or the file system has no locks.
            free = False
        yield free
    finally:
        os.close(fd)
