"""Process 0 of a cluster, which the others connect to: it compares facts, broadcasts values and ends the cluster."""

from __future__ import annotations

import contextlib
import math
import queue
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any, NoReturn

from sharding.errors import ClusterError
from sharding.processes.cluster import END_SECONDS, START_SECONDS, Cluster, ping, unshared
from sharding.processes.handshake import Caller, Kind
from sharding.processes.links import NOTE_SECONDS, SILENCE_SECONDS, Gone, Link, connect, forward, listen
from sharding.processes.membership import Membership
from sharding.processes.process import exit_now, report
from sharding.processes.reception import Reception

DOUBLE_INTERRUPT_SECONDS = 3.0
"""A second Ctrl-C within this time ends all processes at once."""

STRANGERS = 128
"""Connections that may be unauthenticated at a time, besides two for each process."""


class Leader(Cluster):
    """The cluster on process 0."""

    def __init__(self, member: Membership, secret: bytes | None = None) -> None:
        super().__init__(member, secret)
        self._links: dict[int, Link] = {}
        self._inboxes: dict[int, queue.Queue[Any]] = {i: queue.Queue() for i in range(1, member.num_processes)}
        self._all_connected = threading.Event()
        self._error = ""
        self._lock = threading.Lock()
        self._port = 0

    def rendezvous(self, timeout: float) -> None:
        """Accept the connections of the others; see `start`."""
        try:
            server = listen(self.member.host if self.member.is_local else "", self.member.port)
        except OSError as error:
            raise ClusterError(f"{self.member.address}: cannot listen: {error.strerror}") from None
        limit = STRANGERS + 2 * self.num_processes
        self._start_thread(Reception(server, self._secret, limit, self._welcome, self._turn_away).accept)
        if threading.current_thread() is threading.main_thread():
            ours, theirs = socket.socketpair()
            theirs.setblocking(False)
            signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
            self._start_thread(self._watch_interrupts, ours, theirs)
        started = time.monotonic()
        noted = False
        while not self._all_connected.wait(0.2):
            waited = time.monotonic() - started
            missing = _listed(set(self._inboxes) - set(self._links))
            if self._error:
                raise ClusterError(self._error)
            if waited > timeout:
                raise ClusterError(f"{missing} did not connect to {self.member.address} within {timeout:.0f} s")
            if waited > NOTE_SECONDS and not noted:
                noted = True
                print(f"waiting at {self.member.address} for {missing}", file=sys.stderr, flush=True)
        if self._error:
            raise ClusterError(self._error)

    def _welcome(self, connection: socket.socket, caller: Caller) -> None:
        if caller.kind == Kind.JAX:
            with contextlib.suppress(OSError):
                forward(connection, connect("127.0.0.1", self._service_port(), START_SECONDS))
            return
        process, count, link = caller.process, caller.num_processes, Link(connection)
        with self._lock:
            if count != self.num_processes:
                self._refuse(
                    link, f"--num-processes: process 0 has {self.num_processes}, process {process} has {count}"
                )
            elif process not in self._inboxes or process in self._links:
                self._refuse(link, f"--process-id: {process} is used by two processes")
            else:
                self._links[process] = link
                self._start_thread(self._watch, process, link)
                self._start_thread(ping, link)
                if len(self._links) == len(self._inboxes):
                    self._all_connected.set()

    def _turn_away(self, why: str) -> None:
        """End the start of the cluster; later, a process that cannot prove the secret has no effect."""
        self._error = why

    def _watch_interrupts(self, signals: socket.socket, _kept_open: socket.socket) -> None:
        """End all processes at a second Ctrl-C; Python handles the first one only after the current computation."""
        last = -math.inf
        while number := signals.recv(1):
            if number[0] == signal.SIGINT:
                if time.monotonic() - last < DOUBLE_INTERRUPT_SECONDS:
                    self._ending.set()
                    self._send_all({"kind": "end", "code": 130, "why": ""}, timeout=1)
                    time.sleep(0.5)
                    exit_now(130)
                last = time.monotonic()

    def _refuse(self, link: Link, why: str) -> None:
        with contextlib.suppress(Gone):
            link.send({"kind": "refused", "code": 2, "why": why})
        self._error = why

    def _watch(self, process: int, link: Link) -> None:
        try:
            while True:
                message = link.receive()
                if message["kind"] == "failed":
                    self._on_failure(process, message["code"], message["why"])
                elif message["kind"] != "ping":
                    self._inboxes[process].put(message)
        except Gone as gone:
            self._inboxes[process].put(None)
            self._on_death(process, str(gone))

    def _on_failure(self, process: int, code: int, why: str) -> None:
        # If all processes fail in the same way, this process's own error is the clearer one.
        if not self._ending.wait(END_SECONDS / 2):
            self._end_all(code, f"process {process}: {why}")

    def _on_death(self, process: int, how: str) -> None:
        if not self._ending.is_set():
            self._end_all(1, f"process {process} is gone: {how}")

    def _end_all(self, code: int, why: str) -> NoReturn:
        self._ending.set()
        report(why)
        self._send_all({"kind": "stopped", "code": code, "why": why}, timeout=1)
        # Closing a connection with unread data in it may discard data that was sent.
        time.sleep(0.5)
        exit_now(code)

    def _send_all(self, message: Any, timeout: float = SILENCE_SECONDS) -> None:
        for link in list(self._links.values()):
            # The thread that watches the link reports a lost connection.
            with contextlib.suppress(Gone):
                link.send(message, timeout)

    def agree(self, facts: Mapping[str, Any], timeout: float | None = None) -> None:
        """See Cluster."""
        by_process: dict[int, Mapping[str, Any]] = {0: facts}
        deadline = None if timeout is None else time.monotonic() + timeout
        for process, inbox in self._inboxes.items():
            try:
                message = inbox.get(timeout=None if deadline is None else max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise unshared(process, 0, facts) from None
            if message is None:
                time.sleep(START_SECONDS)  # The thread that watches the link ends this process.
            by_process[process] = message["facts"]
        verdict = differences(by_process)
        self._send_all({"kind": "verdict", "differences": verdict})
        if verdict:
            raise ClusterError(verdict)

    def broadcast(self, value: Any = None) -> Any:
        """See Cluster."""
        self._send_all({"kind": "value", "value": value})
        return value

    def end(self, code: int, reason: str = "") -> None:
        """See Cluster."""
        self._ending.set()
        self._send_all({"kind": "end", "code": code, "why": reason}, timeout=1)
        deadline = time.monotonic() + END_SECONDS
        for process in self._links:
            with contextlib.suppress(queue.Empty):
                while (message := self._inboxes[process].get(timeout=max(0.0, deadline - time.monotonic()))) and (
                    message["kind"] != "bye"
                ):
                    pass
        self._leave(code)

    def _service_port(self) -> int:
        with self._lock:
            if not self._port:
                self._port = _free_port()
            return self._port


def differences(by_process: Mapping[int, Mapping[str, Any]]) -> str:
    """The facts that differ between processes, as one line; empty if all agree."""
    lines = []
    for name in dict.fromkeys(name for facts in by_process.values() for name in facts):
        groups: list[tuple[Any, set[int]]] = []
        for process, facts in sorted(by_process.items()):
            value = facts.get(name)
            for known, processes in groups:
                if known == value:
                    processes.add(process)
                    break
            else:
                groups.append((value, {process}))
        if len(groups) > 1:
            lines.append(
                f"{name}: "
                + ", ".join(
                    f"{_listed(p)} {'have' if len(p) > 1 else 'has'} {_shown(value)}" for value, p in groups
                )
            )
    return "; ".join(lines)


def _listed(processes: set[int]) -> str:
    """`process 1`, or `processes 1, 4-7`."""
    runs: list[list[int]] = []
    for process in sorted(processes):
        if runs and process == runs[-1][1] + 1:
            runs[-1][1] = process
        else:
            runs.append([process, process])
    text = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
    return f"process{'es' if len(processes) > 1 else ''} {text}"


def _shown(value: Any) -> str:
    text = "none" if value is None else value if isinstance(value, str) else repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _free_port() -> int:
    with listen("127.0.0.1", 0) as probe:
        return probe.getsockname()[1]
