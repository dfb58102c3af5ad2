"""Makes meshes from text such as `expert=4,tensor=2`, a preset's name, or a `jax.sharding.Mesh`."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np

from sharding.errors import ShardingError

AXES = ("data", "expert", "tensor")
"""The mesh axes, major to minor: `tensor`, which communicates most, connects adjacent devices."""

_INSTALLED = Path(__file__).parent / "meshes"
PRESETS = _INSTALLED if _INSTALLED.is_dir() else Path(__file__).parents[1] / "configs" / "meshes"
"""The directory of mesh presets: package data in an installation, `configs/meshes` in a source checkout."""


def parse_mesh(text: str) -> dict[str, int]:
    """The sizes of all axes, from `axis=size,...` (omitted axes have size 1) or from a preset's name.

    Raises ShardingError.
    """
    if "=" not in text:
        return _preset(text)
    sizes = dict.fromkeys(AXES, 1)
    seen = set()
    for part in text.split(","):
        axis, _, size = part.strip().partition("=")
        if axis not in AXES:
            raise ShardingError(f"mesh: {part.strip()!r}: expected an axis of {', '.join(AXES)}, found {axis!r}")
        if axis in seen:
            raise ShardingError(f"mesh: {axis}: given twice in {text!r}")
        if not re.fullmatch(r"0*[1-9][0-9]{,17}", size):
            raise ShardingError(f"mesh: {axis}: expected a size of 1 or more, found {size!r:.60}")
        seen.add(axis)
        sizes[axis] = int(size)
    return sizes


def _preset(name: str) -> dict[str, int]:
    known = {path.stem: path for path in sorted(PRESETS.glob("*.json"))}
    if name not in known:
        raise ShardingError(f"mesh: expected axis=size,... or a preset ({', '.join(known)}), found {name!r:.60}")
    return dict.fromkeys(AXES, 1) | json.loads(known[name].read_text(encoding="utf-8"))["mesh"]


def make_mesh(
    mesh: str | Mapping[str, int] | jax.sharding.Mesh, devices: Sequence[jax.Device] | None = None
) -> jax.sharding.Mesh:
    """A mesh with the axes `AXES`, over the first of the devices (by default all devices).

    A `jax.sharding.Mesh` may have any of these axes; missing ones are added with size 1. Raises ShardingError for
    other axes, too few devices, or a mesh that uses no device of some process.
    """
    if isinstance(mesh, jax.sharding.Mesh):
        unknown = [axis for axis in mesh.axis_names if axis not in AXES]
        if unknown:
            raise ShardingError(f"mesh: expected axes of {', '.join(AXES)}, found {unknown[0]!r}")
        missing = [axis for axis in AXES if axis not in mesh.axis_names]
        grid = mesh.devices.reshape(mesh.devices.shape + (1,) * len(missing))
        order = [(*mesh.axis_names, *missing).index(axis) for axis in AXES]
        return jax.sharding.Mesh(grid.transpose(order), AXES)
    sizes = parse_mesh(mesh) if isinstance(mesh, str) else dict.fromkeys(AXES, 1) | dict(mesh)
    devices = jax.devices() if devices is None else devices
    needed = math.prod(sizes.values())
    shown = " x ".join(f"{axis}={size}" for axis, size in sizes.items())
    if needed > len(devices):
        raise ShardingError(f"mesh: {shown} needs {needed} devices, found {len(devices)}")
    chosen = devices[:needed]
    idle = {d.process_index for d in devices} - {d.process_index for d in chosen}
    if idle:
        raise ShardingError(f"mesh: {shown} uses {needed} devices, but none of process {min(idle)}")
    return jax.sharding.Mesh(np.asarray(chosen).reshape([sizes[axis] for axis in AXES]), AXES)
