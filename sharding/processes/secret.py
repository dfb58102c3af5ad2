"""The secret that the processes of a cluster share, from a file or an environment variable."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from sharding.errors import ClusterError

FLAG = "--cluster-secret-file"
VARIABLE = "GPTOSS_JAX_CLUSTER_SECRET"
MIN_BYTES, MAX_BYTES = 16, 4096


def cluster_secret(file: Path | None) -> bytes | None:
    """The secret in `file`, or else in the environment variable; None if neither is given.

    White space around the secret does not count, so a final newline makes no difference. Raises ClusterError for a file
    that cannot be read or that other users can access, and for a secret that is too short or too long.
    """
    if file is not None:
        return _checked(f"{FLAG}: {file}", _read(file))
    if (value := os.environb.get(VARIABLE.encode())) is not None:
        return _checked(VARIABLE, value)
    return None


def missing(host: str) -> ClusterError:
    """The error of processes that have no secret but meet at `host`, which is not a loopback address."""
    return ClusterError(
        f"{FLAG}: expected a secret that all processes share, because other hosts can connect to {host}; make one with "
        f"`(umask 077; head -c 32 /dev/urandom | base64 >FILE)` and copy FILE to every host, or set {VARIABLE}"
    )


def _read(file: Path) -> bytes:
    try:
        with file.open("rb") as stream:
            mode = stat.S_IMODE(os.fstat(stream.fileno()).st_mode)
            if mode & 0o077:
                raise ClusterError(
                    f"{FLAG}: {file}: expected a file that only its owner can access, found mode {mode:04o}; "
                    "run chmod 600 on it"
                )
            return stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise ClusterError(f"{FLAG}: {file}: {error.strerror}") from None


def _checked(where: str, text: bytes) -> bytes:
    if len(text) > MAX_BYTES:
        raise ClusterError(f"{where}: expected a secret of at most {MAX_BYTES} bytes, found more")
    if len(secret := text.strip()) < MIN_BYTES:
        raise ClusterError(f"{where}: expected a secret of at least {MIN_BYTES} bytes, found {len(secret)}")
    return secret
