"""The processes of a cluster other than process 0, which leads them."""

from __future__ import annotations

import contextlib
import queue
import signal
import socket
import threading
import time
from collections.abc import Mapping
from typing import Any

from sharding.errors import ClusterError
from sharding.processes.cluster import END_SECONDS, START_SECONDS, Cluster, ping, unshared
from sharding.processes.handshake import Caller, Kind, call
from sharding.processes.links import Gone, Link, connect, forward, listen
from sharding.processes.membership import Membership
from sharding.processes.process import exit_now, report


class Follower(Cluster):
    """The cluster on a process other than process 0."""

    def __init__(self, member: Membership, secret: bytes | None = None) -> None:
        super().__init__(member, secret)
        self._inbox: queue.Queue[Any] = queue.Queue()
        self._link: Link | None = None
        self._forwarder: socket.socket | None = None
        self._left = False

    def rendezvous(self, timeout: float) -> None:
        """Connect to process 0; see `start`."""
        try:
            connection = self._call(Kind.CONTROL, timeout)
        except (OSError, Gone) as error:
            raise ClusterError(
                f"process 0 does not answer at {self.member.address} within {timeout:.0f} s: "
                f"{getattr(error, 'strerror', None) or error}"
            ) from None
        self._link = Link(connection)
        # Process 0 handles Ctrl-C for all processes; a shared terminal sends it to each of them.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        self._start_thread(self._watch, self._link)
        self._start_thread(ping, self._link)

    def _call(self, kind: Kind, timeout: float) -> socket.socket:
        """Connect to process 0, each end authenticated. Raises OSError, Gone and ClusterError."""
        caller = Caller(kind, self.process_id, self.num_processes)
        return connect(
            self.member.host,
            self.member.port,
            timeout,
            lambda connection: call(connection, self.member.address, caller, self._secret),
        )

    def _watch(self, link: Link) -> None:
        try:
            while (message := link.receive())["kind"] not in ("end", "stopped", "refused"):
                if message["kind"] != "ping":
                    self._inbox.put(message)
        except Gone as gone:
            if not self._ending.is_set():
                report(f"process 0 is gone: {gone}")
                exit_now(1)
            return
        self.exit_code = message["code"]
        if message["why"]:
            report(message["why"])
        self._ending.set()
        if message["kind"] != "end":
            exit_now(self.exit_code)
        self._inbox.put(None)
        # The main thread may be blocked in a computation with process 0, which has ended.
        time.sleep(END_SECONDS)
        if not self._left:
            exit_now(self.exit_code)

    def agree(self, facts: Mapping[str, Any], timeout: float | None = None) -> None:
        """See Cluster."""
        self._send({"kind": "facts", "facts": dict(facts)})
        message = self._inbox.get()
        if message is None:
            self.end(self.exit_code)
        elif message["kind"] != "verdict":
            raise unshared(0, self.process_id, facts)
        elif message["differences"]:
            raise ClusterError(message["differences"])

    def broadcast(self, value: Any = None) -> Any:
        """See Cluster."""
        message = self._inbox.get()
        return None if message is None else message["value"]

    def end(self, code: int, reason: str = "") -> None:
        """See Cluster."""
        if not self._ending.is_set():
            self._fail(code, reason)
            code = self.exit_code or code
        self._left = True
        self._send({"kind": "bye"})
        self._leave(code)

    def _fail(self, code: int, reason: str) -> None:
        """Report the failure to process 0, which ends all processes."""
        if self._link is not None:
            self._send({"kind": "failed", "code": code, "why": reason})
            if self._ending.wait(2 * END_SECONDS):
                return
        report(reason)
        exit_now(code)

    def _send(self, message: Any) -> None:
        assert self._link is not None
        with contextlib.suppress(Gone):
            self._link.send(message)

    def _service_port(self) -> int:
        if self._forwarder is None:
            self._forwarder = listen("127.0.0.1", 0)
            self._start_thread(self._forward, self._forwarder)
        return self._forwarder.getsockname()[1]

    def _forward(self, server: socket.socket) -> None:
        while True:
            local, _ = server.accept()
            try:
                network = self._call(Kind.JAX, START_SECONDS)
            except (OSError, Gone, ClusterError):
                local.close()
                continue
            forward(network, local)
