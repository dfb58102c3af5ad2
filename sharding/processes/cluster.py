"""What every process of a cluster has and can do: see `sharding.processes.multihost`."""

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
"""How long processes wait for each other at the start."""

END_SECONDS = 5.0
"""How long a process may take to end once all are to."""

PROTOCOL = 1


class Cluster:
    """The processes that run together, as one of them sees it: see `Leader` and `Follower`."""

    def __init__(self, member: Membership) -> None:
        self.member = member
        self.process_id, self.num_processes = member.process_id, member.num_processes
        self.exit_code = 0
        self._ending = threading.Event()

    @property
    def is_leader(self) -> bool:
        """Whether this is process 0."""
        return self.process_id == 0

    def meet(self, patience: float) -> None:
        """Wait for the others; see `start`."""
        raise NotImplementedError

    def agree(self, facts: Mapping[str, Any]) -> None:
        """Compare facts, JSON values by name, between all processes.

        Raises ClusterError on every process for facts that differ: it names them, the processes and their values.
        """
        raise NotImplementedError

    def broadcast(self, value: Any = None) -> Any:
        """The JSON value that process 0 gives, on every process; on the others, None once process 0 has ended."""
        raise NotImplementedError

    def end(self, code: int, reason: str = "") -> None:
        """Nothing more is to be done: process 0 ends all, with its exit code; so does another one that failed.

        The others report the `reason`. Does not return where `code` is not 0.
        """
        raise NotImplementedError

    def initialize_jax(self) -> None:
        """Make one system of all processes' devices; before any other use of jax's devices."""
        import jax

        # Its service takes SIGTERM for a notice and goes on; here the process is to die of it, and the others with it.
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
            # Gloo greets everyone.
            silence_libraries()

    def _service_port(self) -> int:
        raise NotImplementedError

    def await_cause(self) -> None:
        """After an error of this process: if it is another's death that caused it, that one is reported.

        Returns where none is noticed.
        """
        time.sleep(END_SECONDS)

    def _start_thread(self, target: Any, *args: Any) -> None:
        threading.Thread(target=target, args=args, daemon=True).start()

    def _leave(self, code: int) -> None:
        """End this process: by itself if all is well, else at once, because jax would wait for the others."""
        if code:
            exit_now(code)
        self._start_thread(exit_late, 4 * END_SECONDS, code)


def ping(link: Link) -> None:
    """Tell the other end, as long as it is there, that this process is alive."""
    with contextlib.suppress(Gone):
        while True:
            link.send({"kind": "ping"})
            time.sleep(PING_SECONDS)
