"""Runs a program as several processes on one or more hosts; process 0 leads, and all end together.

    member = membership(address, 2, process_id)
    cluster = start(member, secret=cluster_secret(file))  # returns once all processes are connected
    cluster.agree({"dtype": "bfloat16"})                  # raises ClusterError on every process if they differ
    cluster.initialize_jax()                              # jax.devices() then lists the devices of all processes
    prompt = cluster.broadcast(prompt)                    # returns process 0's value on every process
    cluster.end(0)

Every process has a connection to process 0 and a thread that watches it. The two ends of a connection first prove to
each other that they have the same secret; connections of other programs are closed. If a process dies or stops
responding, all others end with a line on standard error and exit code 1, even in the middle of a computation;
`SILENCE_SECONDS` bounds the delay. jax's own coordination service is forwarded over the same port, so process 0 needs
only one open port.
"""

from __future__ import annotations

from sharding.errors import ClusterError
from sharding.processes.cluster import START_SECONDS, Cluster
from sharding.processes.follower import Follower
from sharding.processes.leader import Leader
from sharding.processes.membership import Membership
from sharding.processes.process import keep_output_for_python, silence_output
from sharding.processes.secret import missing

_current: Cluster | None = None


def current() -> Cluster | None:
    """The cluster that this process has joined with `start`, or None."""
    return _current


def follows() -> bool:
    """Whether this process is a follower, which repeats the steps of process 0."""
    return _current is not None and not _current.is_leader


def start(member: Membership, timeout: float = START_SECONDS, secret: bytes | None = None) -> Cluster:
    """Connect to the other processes; returns once all are connected.

    `secret` is the same on all processes (see `cluster_secret`); it may be None only if the address is a loopback one.
    Raises ClusterError if they do not connect within `timeout` seconds, or if their settings contradict each other.
    """
    global _current
    if _current is not None:
        raise ClusterError("the processes have been started already")
    if secret is None and not member.is_local:
        raise missing(member.host)
    _current = Leader(member, secret) if member.process_id == 0 else Follower(member, secret)
    if _current.is_leader:
        keep_output_for_python()
    else:
        silence_output()
    _current.rendezvous(timeout)
    return _current
