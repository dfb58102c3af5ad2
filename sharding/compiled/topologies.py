"""Topologies by name, such as `v5e:4x8` or `h100:1x1x8`: device specifications and bandwidths between devices.

The hardware need not be present; jax is imported only to create its device objects.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sharding.errors import ShardingError

if TYPE_CHECKING:
    import jax

DEVICES = Path(__file__).parent / "devices.json"

INSTALL = "pip install 'gptoss-jax[aot]'"

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_WORKER_HOSTNAMES": "localhost",
}
"""Environment variables that keep compilers from probing for hardware; they must be set before jax is imported."""


@dataclasses.dataclass(frozen=True)
class Reached:
    """Measured performance of a device; `bounds.expected_seconds` combines the values to an estimate.

    `layer_seconds` is the overhead of one model layer for launching its kernels, `grouped_seconds` the additional
    overhead if tokens are grouped by expert, and `collective_latency` the overhead of a collective, all in seconds.
    The shares are achieved fractions of the data sheet's rates. `source` describes the measurement.
    """

    layer_seconds: float
    grouped_seconds: float
    memory_share: float
    compute_share: float
    collective_latency: float
    link_share: float
    source: str


@dataclasses.dataclass(frozen=True)
class DeviceFacts:
    """Specifications of a device as JAX sees it; sizes in bytes, rates in bytes or operations per second.

    `usable_bytes` is the memory available to a program. Bandwidths are unidirectional: `link_bandwidth` is that of one
    link of a torus, or of a GPU to the switch of its host, `host_link_bandwidth` that of a GPU to other hosts, and
    `die_link_bandwidth` that between two devices of one chip. `source` cites the numbers' origin. `reached` is None if
    the device has not been measured.
    """

    name: str
    platform: Literal["tpu", "cuda"]
    memory_bytes: int
    usable_bytes: int
    memory_bandwidth: float
    bf16_flops: float
    link_bandwidth: float
    source: str
    devices_per_chip: int = 1
    torus_dimensions: int = 0
    wraps_at_multiples_of: int = 0
    die_link_bandwidth: float = 0.0
    host_link_bandwidth: float = 0.0
    reached: Reached | None = None


@dataclasses.dataclass(frozen=True)
class Topology:
    """Connected devices; `shape` is that of a torus of chips, or (slices, hosts per slice, devices per host)."""

    text: str
    family: str
    shape: tuple[int, ...]
    facts: DeviceFacts

    @property
    def num_devices(self) -> int:
        """The number of devices that JAX sees."""
        return math.prod(self.shape) * self.facts.devices_per_chip

    def devices(self) -> Sequence[jax.Device]:
        """Devices to compile for. Raises ShardingError if the compiler is missing or does not know the topology."""
        module = "libtpu" if self.facts.platform == "tpu" else "jax_plugins.xla_cuda13"
        try:
            found = importlib.util.find_spec(module)
        except ModuleNotFoundError:
            found = None
        if found is None:
            raise ShardingError(f"topology: {self.text}: compiling for it needs {module}: {INSTALL}")
        from jax.experimental import topologies

        try:
            if self.facts.platform == "tpu":
                description = topologies.get_topology_desc(platform="tpu", topology_name=self.text)
            else:
                description = topologies.get_topology_desc(
                    platform="cuda",
                    topology_name=self.family,
                    target_config=_cuda_target(_table()[self.family]),
                    topology="x".join(map(str, self.shape)),
                )
        except Exception as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ShardingError(
                f"topology: {self.text}: expected an existing slice; the compiler reports: {reason}"
            ) from None
        return sorted(description.devices, key=lambda device: device.id)

    def position(self, index: int) -> tuple[int, ...]:
        """The position of `devices()[index]`: its coordinates in `shape`, then its index on the chip."""
        index, on_chip = divmod(index, self.facts.devices_per_chip)
        position = [0] * len(self.shape)
        # On TPUs the first coordinate varies fastest, on GPUs the last one.
        order = range(len(self.shape)) if self.facts.platform == "tpu" else reversed(range(len(self.shape)))
        for dimension in order:
            index, position[dimension] = divmod(index, self.shape[dimension])
        return (*position, on_chip)

    def seconds(self, op: str, num_bytes: float, group: Sequence[int]) -> float:
        """The minimum time of a collective over the devices `group`, for a full array of `num_bytes` per device.

        Each device must receive (n - 1) / n of the array (twice that for an all-reduce, which is a reduce-scatter and
        an all-gather), over all of its links in the dimensions that the group spans. On a torus, an all-to-all is
        instead bound by the bytes that cross the middle of the longest dimension.
        """
        n = len(group)
        if n < 2:
            return 0.0
        bandwidth, longest, links = self._links(group)
        if op == "collective-permute":
            return num_bytes / bandwidth
        received = num_bytes * (n - 1) / n / bandwidth
        if op.endswith("all-to-all") and self.facts.platform == "tpu":
            # Each device sends half of its bytes to the other half of the longest dimension.
            return max(received, num_bytes * longest / 4 / (links * self.facts.link_bandwidth))
        return 2 * received if op == "all-reduce" else received

    def _links(self, group: Sequence[int]) -> tuple[float, int, int]:
        """Bandwidth into a device from the group; size of the longest dimension; links across its middle."""
        positions = [self.position(i) for i in group]
        *spans, on_chip = (len({p[d] for p in positions}) for d in range(len(positions[0])))
        if self.facts.platform == "cuda":
            inside = math.prod(spans[:-1]) == 1
            return (self.facts.link_bandwidth if inside else self.facts.host_link_bandwidth), max(spans), 1
        if max(spans) == 1:
            return self.facts.die_link_bandwidth, on_chip, 1
        links = [self._closed(dimension, span) + 1 for dimension, span in enumerate(spans)]
        total = sum(n for n, span in zip(links, spans, strict=True) if span > 1)
        longest = spans.index(max(spans))
        # Devices of one chip share its links.
        return total * self.facts.link_bandwidth / on_chip, spans[longest] * on_chip, links[longest]

    def _closed(self, dimension: int, span: int) -> bool:
        """Whether a line of chips is a ring: it spans a whole dimension, which wraps around."""
        whole = span > 2 and span == self.shape[dimension]
        return whole and span % self.facts.wraps_at_multiples_of == 0


def families() -> dict[str, DeviceFacts]:
    """The known devices, by the name that a topology begins with."""
    names = {field.name for field in dataclasses.fields(DeviceFacts)}
    facts = {}
    for family, entry in _table().items():
        per_chip = entry.get("devices_per_chip", 1)
        values = {key: value for key, value in entry.items() if key in names}
        for key in ("memory_bytes", "usable_bytes", "memory_bandwidth", "bf16_flops"):
            values[key] = type(entry[key])(entry[key] / per_chip)
        for key in ("memory_bytes", "usable_bytes"):
            values[key] = int(values[key])
        if "reached" in entry:
            values["reached"] = Reached(**entry["reached"])
        facts[family] = DeviceFacts(**values)
    return facts


def parse_topology(text: str) -> Topology:
    """A topology from `v5e:4x8` or `h100:1x1x8`. Raises ShardingError."""
    family, colon, shape = text.strip().lower().partition(":")
    known = families()
    if family not in known or not colon:
        raise ShardingError(
            f"topology: expected NAME:SHAPE such as v5e:4x8 or h100:1x1x8, with a NAME of {', '.join(known)}; "
            f"found {text!r}"
        )
    facts = known[family]
    sizes = shape.split("x")
    meaning = "slices x hosts x devices, such as 1x1x8"
    if facts.platform == "tpu":
        meaning = f"chips along each of {facts.torus_dimensions} dimensions, such as 2x2"
        meaning += "x1" * (facts.torus_dimensions - 2)
    expected = facts.torus_dimensions or 3
    if len(sizes) != expected or not all(s.isascii() and s.isdigit() and 0 < int(s) < 10**5 for s in sizes):
        raise ShardingError(f"topology: {family}: expected {meaning}, found {shape!r}")
    return Topology(f"{family}:{shape}", family, tuple(int(s) for s in sizes), facts)


def prepare_environment() -> None:
    """Set ENVIRONMENT; must be called before the process imports jax."""
    os.environ.update(ENVIRONMENT)


@functools.cache
def _table() -> dict[str, dict[str, Any]]:
    return json.loads(DEVICES.read_text(encoding="utf-8"))


def _cuda_target(entry: dict[str, Any]) -> str:
    """The compiler's description of a GPU, as the text of XLA's GpuTargetConfigProto.

    Limits common to all supported GPUs are from NVIDIA's "CUDA C++ Programming Guide", table "Technical Specifications
    per Compute Capability".
    """
    capability = entry["compute_capability"]
    major, minor = capability.rstrip("a").split(".")
    accelerated = " feature_extension: ACCELERATED_FEATURES" if capability.endswith("a") else ""
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {entry["shared_bytes"] + 1024}
  shared_memory_per_block_optin: {entry["shared_bytes"]}
  threads_per_core_limit: 2048
  core_count: {entry["cores"]}
  fpus_per_core: {64 if major == "8" else 128}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  memory_bandwidth: {int(entry["memory_bandwidth"])}
  l2_cache_size: {entry["l2_bytes"]}
  clock_rate_ghz: {entry["clock_ghz"]}
  device_memory_size: {int(entry["memory_bytes"])}
  cuda_compute_capability {{ major: {major} minor: {minor}{accelerated} }}
  device_vendor: "NVIDIA Corporation"
  name: "{entry["name"]}"
  device_address_bits: 64
  driver_version: "13.0.0"
  runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.12.0"
  device_interconnect_info {{ active_links: {12 if major == "8" else 18} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 12 patch: 0 }}
device_description_str: "{entry["name"]}"
"""
