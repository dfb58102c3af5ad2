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

from sharding.errors import ClusterError
from sharding.processes.cluster import START_SECONDS, Cluster
from sharding.processes.follower import Follower
from sharding.processes.leader import Leader
from sharding.processes.membership import Membership
from sharding.processes.process import keep_output_for_python, silence_output

_current: Cluster | None = None


def current() -> Cluster | None:
    """The cluster that this process has started, if any."""
    return _current


def follows() -> bool:
    """Whether this process only repeats what process 0 does."""
    return _current is not None and not _current.is_leader


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
