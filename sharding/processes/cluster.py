"""The interface that all processes of a cluster share; see `sharding.processes`."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Mapping
from typing import Any

from sharding.errors import ClusterError
from sharding.processes.links import PING_SECONDS, Gone, Link
from sharding.processes.membership import Membership
from sharding.processes.process import exit_late, exit_now, silence_libraries

START_SECONDS = 300.0
"""Default time to wait for the other processes at startup."""

END_SECONDS = 5.0
"""Time that a process has to exit after the cluster ends."""


class Cluster:
    """A cluster from the view of one of its processes; `Leader` and `Follower` implement it."""

    def __init__(self, member: Membership, secret: bytes | None = None) -> None:
        self.member = member
        self._secret = secret
        self.process_id, self.num_processes = member.process_id, member.num_processes
        self.exit_code = 0
        self._ending = threading.Event()

    @property
    def is_leader(self) -> bool:
        """Whether this is process 0."""
        return self.process_id == 0

    def rendezvous(self, timeout: float) -> None:
        """Connect to the other processes; see `start`."""
        raise NotImplementedError

    def agree(self, facts: Mapping[str, Any], timeout: float | None = None) -> None:
        """Compare facts, a mapping of names to JSON values, between all processes.

        If facts differ, raises ClusterError on every process, naming the facts, the processes and their values; also if
        a process has nothing to compare within `timeout` seconds.
        """
        raise NotImplementedError

    def broadcast(self, value: Any = None) -> Any:
        """The JSON value that process 0 passes, on every process; None on the others once process 0 has ended."""
        raise NotImplementedError

    def end(self, code: int, reason: str = "") -> None:
        """End the cluster with an exit code, on process 0 or on a process that failed.

        The other processes report the `reason`. Does not return unless `code` is 0.
        """
        raise NotImplementedError

    def initialize_jax(self) -> None:
        """Initialize jax over the devices of all processes; must precede any other use of jax's devices."""
        import jax

        # The preemption service would catch SIGTERM, which must end this process and so the cluster.
        jax.config.update("jax_enable_preemption_service", False)
        try:
            jax.distributed.initialize(
                f"127.0.0.1:{self._service_port()}",
                self.num_processes,
                self.process_id,
                local_device_ids=list(self.member.local_device_ids),
                cluster_detection_method="deactivate",
                coordinator_bind_address=f"127.0.0.1:{self._service_port()}",
                initialization_timeout=int(START_SECONDS),
                shutdown_timeout_seconds=int(END_SECONDS),
            )
        except RuntimeError as error:
            raise ClusterError(f"jax.distributed: {error}") from error
        if jax.default_backend() == "cpu":
            # Gloo prints a line for every connection.
            silence_libraries()

    def _service_port(self) -> int:
        raise NotImplementedError

    def await_cause(self) -> None:
        """After an error, wait until the death of another process that may have caused it is detected and reported.

        Returns if none is detected within `END_SECONDS`.
        """
        time.sleep(END_SECONDS)

    def _start_thread(self, target: Any, *args: Any) -> None:
        threading.Thread(target=target, args=args, daemon=True).start()

    def _leave(self, code: int) -> None:
        """Exit: after an error at once, because jax's shutdown would wait for the others; else within a time limit."""
        if code:
            exit_now(code)
        self._start_thread(exit_late, 4 * END_SECONDS, code)


def unshared(process: int, other: int, facts: Mapping[str, Any]) -> ClusterError:
    """The error if only the second of two processes has facts to compare."""
    described = ", ".join(f"{name}: {value}" for name, value in facts.items())
    return ClusterError(f"process {process} does not have the same as process {other}: {described}")


def ping(link: Link) -> None:
    """Send heartbeats until the connection is lost."""
    with contextlib.suppress(Gone):
        while True:
            link.send({"kind": "ping"})
            time.sleep(PING_SECONDS)
