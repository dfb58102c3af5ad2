"""Determines the processes of a cluster, from flags or from the cluster environments that jax detects."""

from __future__ import annotations

import dataclasses
import ipaddress
import os
from typing import Any

from sharding.errors import ClusterError

MAX_PROCESSES = 1 << 16


@dataclasses.dataclass(frozen=True)
class Membership:
    """The place of this process in a cluster.

    Process 0 listens at `address` (HOST:PORT), to which the others connect. `local_device_ids` are the devices of this
    process; () means all visible devices.
    """

    address: str
    num_processes: int
    process_id: int
    local_device_ids: tuple[int, ...] = ()

    @property
    def host(self) -> str:
        """The host of process 0."""
        return self.address.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        """The port on which process 0 listens."""
        return int(self.address.rpartition(":")[2])

    @property
    def is_local(self) -> bool:
        """Whether process 0 has a loopback address, which only processes of its own host can reach."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


def membership(
    coordinator_address: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> Membership | None:
    """The membership given by the three values, or detected by jax if all are None; None for a single process.

    jax detects TPU pods, Slurm steps, Open MPI and indexed Kubernetes Jobs. `num_processes=1` disables the detection.
    Raises ClusterError for values that contradict each other.
    """
    values = {
        "--coordinator-address": coordinator_address,
        "--num-processes": num_processes,
        "--process-id": process_id,
    }
    if all(value is None for value in values.values()):
        return _detected()
    if num_processes is not None and num_processes < 1:
        raise ClusterError(f"--num-processes: expected 1 or more, found {num_processes}")
    if num_processes is not None and num_processes > MAX_PROCESSES:
        raise ClusterError(f"--num-processes: expected {MAX_PROCESSES} or fewer, found {num_processes}")
    if num_processes == 1 and process_id in (None, 0):
        return None
    missing = [name for name, value in values.items() if value is None]
    if missing:
        given = " and ".join(name for name, value in values.items() if value is not None)
        raise ClusterError(f"{given}: expected {' and '.join(missing)} as well")
    assert coordinator_address is not None
    assert num_processes is not None
    assert process_id is not None
    _check_address(coordinator_address)
    if not 0 <= process_id < num_processes:
        raise ClusterError(
            f"--process-id: expected 0 to {num_processes - 1} (--num-processes {num_processes}), found {process_id}"
        )
    return Membership(coordinator_address, num_processes, process_id)


def _check_address(address: str) -> None:
    host, _, port = address.rpartition(":")
    if not (host and port.isascii() and port.isdigit() and 0 < int(port) < 65536):
        raise ClusterError(f"--coordinator-address: expected HOST:PORT, found {address!r}")


def _detected() -> Membership | None:
    # jax has no public API to find out whether `jax.distributed.initialize()` would detect a cluster.
    from jax._src.clusters import ClusterEnv, K8sCluster

    for kind in ClusterEnv._cluster_types:
        # jax detects a cluster in any pod, but only the pods of an indexed Job have process ids.
        if issubclass(kind, K8sCluster) and "JOB_COMPLETION_INDEX" not in os.environ:
            continue
        if kind.opt_in_only_method or not kind.is_env_present():
            continue
        try:
            return _detected_by(kind)
        except (RuntimeError, ValueError, KeyError, OSError) as error:
            raise ClusterError(
                f"{kind.name or kind.__name__}: the cluster was detected, but not its processes: {error}; "
                "give --coordinator-address, --num-processes and --process-id, or --num-processes 1 alone"
            ) from error
    return None


def _detected_by(kind: Any) -> Membership | None:
    count = kind.get_process_count()
    if count == 1:
        return None
    port = os.environ.get("JAX_COORDINATOR_PORT")
    address = os.environ.get("JAX_COORDINATOR_ADDRESS") or kind.get_coordinator_address(
        timeout_secs=300, override_coordinator_port=port
    )
    return Membership(address, count, kind.get_process_id(), _own_devices(kind))


def _own_devices(kind: Any) -> tuple[int, ...]:
    """One device per process if a launcher started several on each host, as in jax; else () for all."""
    from jax._src.cloud_tpu_init import running_in_cloud_tpu_vm

    if ids := os.environ.get("JAX_LOCAL_DEVICE_IDS"):
        return tuple(int(part) for part in ids.split(","))
    local_id = kind.get_local_process_id()
    if running_in_cloud_tpu_vm or local_id is None or _one_process_a_host():
        return ()
    return (local_id,)


def _one_process_a_host() -> bool:
    # jax itself would give such a process only the first device of its host.
    tasks, nodes = os.environ.get("SLURM_NTASKS"), os.environ.get("SLURM_STEP_NUM_NODES")
    return os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1" or (tasks is not None and tasks == nodes)
