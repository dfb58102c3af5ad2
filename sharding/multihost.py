"""Processes on several hosts as one: started together, in agreement, led by process 0, and ended together.

    cluster = start(membership(address, 2, process_id))   # everyone has come
    cluster.agree({"dtype": "bfloat16"})                  # or ClusterError, on every process
    cluster.initialize_jax()                              # jax.devices() are everyone's
    prompt = cluster.broadcast(prompt)                    # process 0's
    cluster.end(0)

Every process keeps a connection to process 0 and a thread that watches it. One that dies or falls silent ends all
others, whatever they are doing: a line on standard error, and exit code 1. `SILENCE_SECONDS` bound how long that
takes. jax's own coordination service runs inside these connections, so one open port on process 0 is enough.
"""

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
from sharding.links import PING_SECONDS, SILENCE_SECONDS, Gone, Link, connect, forward, listen
from sharding.membership import Membership
from sharding.process import (
    exit_late,
    exit_now,
    keep_output_for_python,
    report,
    silence_libraries,
    silence_output,
)

START_SECONDS = 300.0
"""How long processes wait for each other at the start."""

END_SECONDS = 5.0
"""How long a process may take to end once all are to."""

TWICE_SECONDS = 3.0
"""Within which a second Ctrl-C at process 0 means: at once."""

PROTOCOL = 1

_current: Cluster | None = None


def current() -> Cluster | None:
    """The cluster that this process has started, if any."""
    return _current


def start(member: Membership, patience: float = START_SECONDS) -> Cluster:
    """Meet the other processes; returns when all have come.

    Raises ClusterError if they don't within `patience` seconds, or cannot belong together.
    """
    global _current
    if _current is not None:
        raise ClusterError("the processes have been started already")
    _current = Leader(member) if member.process_id == 0 else Follower(member)
    if _current.is_leader:
        keep_output_for_python()
    else:
        silence_output()
    _current.meet(patience)
    return _current


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


class Leader(Cluster):
    """Process 0: it listens, compares, decides and tells the others."""

    def __init__(self, member: Membership) -> None:
        super().__init__(member)
        self._links: dict[int, Link] = {}
        self._inboxes: dict[int, queue.Queue[Any]] = {i: queue.Queue() for i in range(1, member.num_processes)}
        self._all_met = threading.Event()
        self._wrong = ""
        self._lock = threading.Lock()
        self._port = 0

    def meet(self, patience: float) -> None:
        """Wait for the others; see `start`."""
        try:
            server = listen("", self.member.port)
        except OSError as error:
            raise ClusterError(f"{self.member.address}: cannot listen: {error.strerror}") from None
        self._start_thread(self._accept, server)
        if threading.current_thread() is threading.main_thread():
            ours, theirs = socket.socketpair()
            theirs.setblocking(False)
            signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
            self._start_thread(self._watch_interrupts, ours, theirs)
        started = time.monotonic()
        noted = False
        while not self._all_met.wait(0.2):
            waited = time.monotonic() - started
            missing = _listed(set(self._inboxes) - set(self._links))
            if self._wrong:
                raise ClusterError(self._wrong)
            if waited > patience:
                raise ClusterError(f"{missing} did not come to {self.member.address} within {patience:.0f} s")
            if waited > 10 and not noted:
                noted = True
                print(f"waiting at {self.member.address} for {missing}", file=sys.stderr, flush=True)
        if self._wrong:
            raise ClusterError(self._wrong)

    def _accept(self, server: socket.socket) -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            self._start_thread(self._welcome, connection)

    def _welcome(self, connection: socket.socket) -> None:
        link = Link(connection)
        try:
            hello = link.hello()
            process, count, kind = (hello[key] for key in ("process", "num_processes", "kind"))
        except (Gone, KeyError, TypeError):
            # Not one of ours: a port scanner, a health check.
            link.close()
            return
        if kind == "jax":
            with contextlib.suppress(OSError):
                forward(connection, connect("127.0.0.1", self._service_port(), START_SECONDS))
            return
        with self._lock:
            if hello.get("protocol") != PROTOCOL:
                self._refuse(link, f"process {process} runs another version of this program")
            elif count != self.num_processes:
                self._refuse(
                    link, f"--num-processes: process 0 has {self.num_processes}, process {process} has {count}"
                )
            elif process not in self._inboxes or process in self._links:
                self._refuse(link, f"--process-id: {process} is used by two processes")
            else:
                self._links[process] = link
                self._start_thread(self._watch, process, link)
                self._start_thread(_ping, link)
                if len(self._links) == len(self._inboxes):
                    self._all_met.set()

    def _watch_interrupts(self, signals: socket.socket, _kept_open: socket.socket) -> None:
        """Python answers Ctrl-C between computations; a second one soon after the first ends them as well."""
        last = -math.inf
        while number := signals.recv(1):
            if number[0] == signal.SIGINT:
                if time.monotonic() - last < TWICE_SECONDS:
                    self._ending.set()
                    self._tell({"kind": "end", "code": 130, "why": ""}, patience=1)
                    time.sleep(0.5)
                    exit_now(130)
                last = time.monotonic()

    def _refuse(self, link: Link, why: str) -> None:
        with contextlib.suppress(Gone):
            link.send({"kind": "refused", "code": 2, "why": why})
        self._wrong = why

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
        # Where every process fails alike, this one's own report is the better one.
        if not self._ending.wait(END_SECONDS / 2):
            self._end_all(code, f"process {process}: {why}")

    def _on_death(self, process: int, how: str) -> None:
        if not self._ending.is_set():
            self._end_all(1, f"process {process} is gone: {how}")

    def _end_all(self, code: int, why: str) -> NoReturn:
        self._ending.set()
        report(why)
        self._tell({"kind": "stopped", "code": code, "why": why}, patience=1)
        # A connection that is closed with something unread in it may lose what was sent.
        time.sleep(0.5)
        exit_now(code)

    def _tell(self, message: Any, patience: float = SILENCE_SECONDS) -> None:
        for link in list(self._links.values()):
            # The thread that watches the link reports it.
            with contextlib.suppress(Gone):
                link.send(message, patience)

    def agree(self, facts: Mapping[str, Any]) -> None:
        """See Cluster."""
        said: dict[int, Mapping[str, Any]] = {0: facts}
        for process, inbox in self._inboxes.items():
            if (message := inbox.get()) is None:
                time.sleep(START_SECONDS)  # The thread that watches ends the process.
            said[process] = message["facts"]
        verdict = differences(said)
        self._tell({"kind": "verdict", "differences": verdict})
        if verdict:
            raise ClusterError(verdict)

    def broadcast(self, value: Any = None) -> Any:
        """See Cluster."""
        self._tell({"kind": "value", "value": value})
        return value

    def end(self, code: int, reason: str = "") -> None:
        """See Cluster."""
        self._ending.set()
        self._tell({"kind": "end", "code": code, "why": reason}, patience=1)
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


class Follower(Cluster):
    """Any other process: it does what process 0 says."""

    def __init__(self, member: Membership) -> None:
        super().__init__(member)
        self._inbox: queue.Queue[Any] = queue.Queue()
        self._link: Link | None = None
        self._forwarder: socket.socket | None = None
        self._left = False

    def meet(self, patience: float) -> None:
        """Wait for the others; see `start`."""
        try:
            connection = connect(self.member.host, self.member.port, patience)
        except OSError as error:
            raise ClusterError(
                f"process 0 does not answer at {self.member.address} within {patience:.0f} s: "
                f"{error.strerror or error}"
            ) from None
        self._link = Link(connection)
        self._link.send(self._hello("control"))
        # Process 0 answers Ctrl-C for all: a terminal that several processes share sends it to each.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        self._start_thread(self._watch, self._link)
        self._start_thread(_ping, self._link)

    def _hello(self, kind: str) -> dict[str, Any]:
        return {
            "kind": kind,
            "protocol": PROTOCOL,
            "process": self.process_id,
            "num_processes": self.num_processes,
        }

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
        # The main thread may be stuck in a computation that process 0 has left.
        time.sleep(END_SECONDS)
        if not self._left:
            exit_now(self.exit_code)

    def agree(self, facts: Mapping[str, Any]) -> None:
        """See Cluster."""
        self._send({"kind": "facts", "facts": dict(facts)})
        message = self._inbox.get()
        if message is None:
            self.end(self.exit_code)
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
        """Tell process 0, which reports to all and ends them."""
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
                network = connect(self.member.host, self.member.port, START_SECONDS)
                Link(network).send(self._hello("jax"))
            except (OSError, Gone):
                local.close()
                continue
            forward(network, local)


def differences(said: Mapping[int, Mapping[str, Any]]) -> str:
    """What processes say differently, as one line; empty if nothing."""
    lines = []
    for name in dict.fromkeys(name for facts in said.values() for name in facts):
        groups: list[tuple[Any, set[int]]] = []
        for process, facts in sorted(said.items()):
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


def _ping(link: Link) -> None:
    with contextlib.suppress(Gone):
        while True:
            link.send({"kind": "ping"})
            time.sleep(PING_SECONDS)


def _free_port() -> int:
    with listen("127.0.0.1", 0) as probe:
        return probe.getsockname()[1]
