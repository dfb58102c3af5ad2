"""Loads a command's model in one process, or in several, where process 0 leads and the others follow."""

from __future__ import annotations

import argparse
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptoss_jax.commands.options import engine_options
from sharding.processes import Cluster, current, follows, start
from sharding.processes.membership import membership
from sharding.processes.secret import cluster_secret

if TYPE_CHECKING:
    from gptoss_jax.model.config import ModelConfig
    from gptoss_jax.serving.client import LLM


def join(command: str, options: argparse.Namespace) -> Callable[[], int] | None:
    """Join the other processes of the command, if any; returns the function that a follower runs instead of it.

    Raises ClusterError if the processes cannot work together, and CheckpointError for an unreadable checkpoint.
    """
    cluster = _meet(command, options)
    if cluster is None:
        return None
    # SIGTERM ends the process at once, and the other processes end with it.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    return (lambda: _follow(cluster, options)) if follows() else None


def _meet(command: str, options: argparse.Namespace) -> Cluster | None:
    """The cluster of processes that run this command; None for a single process."""
    member = membership(options.coordinator_address, options.num_processes, options.process_id)
    if member is None:
        return None
    from gptoss_jax.commands.agreement import agree_on_checkpoint, flags_of, versions

    cluster = start(member, secret=cluster_secret(options.cluster_secret_file))
    cluster.agree(versions() | flags_of(command, options))
    if not cluster.is_leader:
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    agree_on_checkpoint(cluster, options)
    cluster.initialize_jax()
    import jax

    device = jax.local_devices()[0]
    cluster.agree({"device": f"{device.platform}: {device.device_kind}"})
    return cluster


def _lead(cluster: Cluster, options: argparse.Namespace, more: dict[str, Any]) -> LLM:
    """Load the model in all processes, from process 0; calls of its engine are repeated in the others."""
    from gptoss_jax.engine.leading import LeadingEngine

    cluster.broadcast({"load": more})
    llm = _load_over_processes(options, more)
    llm.engine = LeadingEngine(llm.engine, cluster)  # type: ignore[assignment]
    return llm


def _follow(cluster: Cluster, options: argparse.Namespace) -> int:
    """Repeat process 0's engine calls until it ends; returns its exit code."""
    from gptoss_jax.engine import leading

    if (message := cluster.broadcast()) is not None:
        leading.follow(_load_over_processes(options, message["load"], progress=False).engine, cluster)
    return cluster.exit_code


def _load_over_processes(options: argparse.Namespace, more: dict[str, Any], progress: bool | None = None) -> LLM:
    """Load the model over the devices of all processes."""
    import jax

    from gptoss_jax.checkpoints.hub import resolve
    from gptoss_jax.checkpoints.loading import EMBEDDED
    from gptoss_jax.model.config import ModelConfig

    path = resolve(options.model or EMBEDDED)
    mesh = options.mesh or default_mesh(ModelConfig.from_file(path), jax.device_count())
    return _load(options, path, mesh, more, progress)


def default_mesh(config: ModelConfig, devices: int) -> str:
    """The default mesh over all devices: expert parallelism as far as it divides the experts, `tensor` for the rest."""
    expert = math.gcd(config.num_local_experts, devices)
    return f"expert={expert},tensor={devices // expert}"


def _load(
    options: argparse.Namespace,
    path: str | Path,
    mesh: str | None,
    more: dict[str, Any],
    progress: bool | None = None,
) -> LLM:
    from gptoss_jax.serving.client import LLM

    engine = engine_options(options, **more)
    return LLM(path, mesh, options.dtype, engine=engine, warm_up=options.warm_up, progress=progress)


def load_llm(options: argparse.Namespace, **more: Any) -> LLM:
    """Load the model that the flags describe, in all processes of the command."""
    from gptoss_jax.checkpoints.loading import EMBEDDED

    if cluster := current():
        return _lead(cluster, options, more)
    return _load(options, options.model or EMBEDDED, options.mesh, more)
