"""Accepts connections to process 0, and passes on those of processes that have proved that they know the secret."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable

from sharding.errors import ClusterError
from sharding.processes.handshake import Caller, answer
from sharding.processes.links import Gone, close


class Reception:
    """Authenticates each connection in a thread of its own, at most `limit` at a time.

    At the limit, the oldest unauthenticated connection is closed for a new one, so that idle strangers neither use up
    threads nor keep processes out. `admit` gets each authenticated connection, and `refuse` the line about each process
    with another secret or another version; connections of other programs are closed silently.
    """

    def __init__(
        self,
        server: socket.socket,
        secret: bytes | None,
        limit: int,
        admit: Callable[[socket.socket, Caller], None],
        refuse: Callable[[str], None],
    ) -> None:
        self._server, self._secret, self._limit = server, secret, limit
        self._admit, self._refuse = admit, refuse
        self._slots = threading.Semaphore(limit)
        self._pending: dict[socket.socket, None] = {}
        self._lock = threading.Lock()

    def accept(self) -> None:
        """Accept connections until the server is closed; meant to run in a background thread."""
        while True:
            try:
                connection, _ = self._server.accept()
            except OSError:
                if self._server.fileno() < 0:
                    return
                time.sleep(0.1)  # The peer has reset the connection already, or no file descriptors are left.
                continue
            self._make_room()
            with self._lock:
                self._pending[connection] = None
            threading.Thread(target=self._receive, args=(connection,), daemon=True).start()

    def _make_room(self) -> None:
        """Wait for a slot; if there is none, close the oldest connection, whose thread then releases its slot."""
        if self._slots.acquire(blocking=False):
            return
        with self._lock:
            if self._pending:
                oldest = next(iter(self._pending))
                del self._pending[oldest]
                with contextlib.suppress(OSError):
                    oldest.shutdown(socket.SHUT_RDWR)
        self._slots.acquire()

    def _receive(self, connection: socket.socket) -> None:
        if (caller := self._authenticate(connection)) is not None:
            self._admit(connection, caller)

    def _authenticate(self, connection: socket.socket) -> Caller | None:
        try:
            return answer(connection, self._secret, lambda: self._keep(connection))
        except Gone:
            close(connection)
        except ClusterError as error:
            self._refuse(str(error))
            close(connection)
        finally:
            with self._lock:
                self._pending.pop(connection, None)
            self._slots.release()
        return None

    def _keep(self, connection: socket.socket) -> None:
        """Exempt an authenticated connection from being closed for a newer one."""
        with self._lock:
            if connection not in self._pending:
                raise Gone("it was closed for a newer connection")
            del self._pending[connection]
