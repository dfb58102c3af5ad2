"""Backend selection: an op's backends are tried in order, and the plain-JAX reference is the fallback.

The platform is determined when the op is traced: it is that of an enclosing `platform` block, else of the devices of
the mesh in context, else of the default device. A program that is compiled ahead of time for other hardware must
therefore be traced inside `platform("cuda")` or `platform("tpu")`, or under `jax.set_mesh` of the target's mesh.
A compiled function keeps the backends that were selected while it was traced, so enter these blocks around the first
call.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Sequence
from contextvars import ContextVar, Token
from types import TracebackType
from typing import Any, Literal, Self

import jax
from jax.sharding import AbstractMesh, Mesh

Platform = Literal["cpu", "cuda", "rocm", "tpu"]

_logger = logging.getLogger(__name__)
_forced_backend: ContextVar[str] = ContextVar("forced_backend", default="auto")
_forced_platform: ContextVar[str | None] = ContextVar("forced_platform", default=None)
_warned: set[tuple[str, str, str]] = set()
_platforms: dict[str, frozenset[str]] = {}


@dataclasses.dataclass(frozen=True)
class Backend:
    """An implementation of an op for some platforms.

    `function` takes the op's arguments and `interpret`, which is True where the hardware is absent. It raises
    NotImplementedError, with the reason, for arguments that it does not support.
    """

    name: str
    platforms: frozenset[str]
    function: Callable[..., Any]

    def __post_init__(self) -> None:
        _platforms[self.name] = backend_platforms(self.name) | self.platforms


class _Setting:
    """Sets a context variable immediately; as a context manager, restores it at the end of the block."""

    def __init__(self, variable: ContextVar[Any], value: Any) -> None:
        self._variable = variable
        self._token: Token[Any] = variable.set(value)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._variable.reset(self._token)


def use_backend(name: str) -> _Setting:
    """Select the backend of every op: "auto" for the platform's, "reference", or a name such as "triton".

    Works as a setter, and as a context manager that restores the previous setting. Ops without a backend of this name
    select one as under "auto". An op whose named backend does not support the arguments raises NotImplementedError.
    """
    return _Setting(_forced_backend, name)


def backend_names() -> list[str]:
    """The names that `use_backend` accepts: "auto", "reference", and the backends of the ops imported so far."""
    return ["auto", "reference", *sorted(_platforms)]


def backend_platforms(name: str) -> frozenset[str]:
    """The platforms on which the named backend runs natively; empty for "auto" and "reference"."""
    return _platforms.get(name, frozenset())


def platform(name: Platform) -> _Setting:
    """Trace for this platform instead of the host's; a setter and a context manager like `use_backend`."""
    return _Setting(_forced_platform, name)


def forced_backend() -> str:
    """The name set by `use_backend`."""
    return _forced_backend.get()


def dispatch_settings() -> tuple[str, str | None]:
    """What `use_backend` and `platform` have set, for functions that keep what they trace: they need one for each."""
    return _forced_backend.get(), _forced_platform.get()


def current_platform(mesh: Mesh | AbstractMesh | None = None) -> str:
    """The platform that ops are traced for; `mesh` replaces the mesh in context."""
    forced = _forced_platform.get()
    if forced is not None:
        return forced
    device = (jax.sharding.get_abstract_mesh() if mesh is None else mesh.abstract_mesh).abstract_device
    if device is not None and device.platform != "gpu":
        return device.platform
    if device is not None:
        return "rocm" if device.device_kind.startswith("AMD") else "cuda"
    default = jax.config.jax_default_device
    if default is None or isinstance(default, str):
        default = jax.local_devices(backend=default)[0]
    if default.platform != "gpu":
        return default.platform
    return "rocm" if "rocm" in default.client.platform_version else "cuda"


def dispatch[Result](
    op: str,
    backends: Sequence[Backend],
    reference: Callable[..., Result],
    *args: Any,
    backend: str | None = None,
    plain_on: frozenset[str] = frozenset(),
    **kwargs: Any,
) -> Result:
    """Compute `op` with the named backend, or with the first of the platform's that supports the arguments.

    A named backend is interpreted where its hardware is absent. A fallback to the reference on an accelerator is
    logged as a warning, once per op and reason. Platforms in `plain_on` are exempt: their compiler needs no kernel to
    compute the op well. Raises ValueError if the op has no backend of the name given by `backend`.
    """
    where = current_platform()
    name = backend or _forced_backend.get()
    if name == "reference":
        return reference(*args, **kwargs)
    named = [candidate for candidate in backends if candidate.name == name]
    if backend not in (None, "auto") and not named:
        raise ValueError(f"{op} has no backend {name!r}: {[b.name for b in backends]} or 'reference'")
    if named:
        return named[0].function(*args, interpret=where not in named[0].platforms, **kwargs)
    reasons = []
    for candidate in backends:
        if where in candidate.platforms:
            try:
                return _traced_once(candidate.function, args, kwargs)
            except NotImplementedError as reason:
                reasons.append(f"{candidate.name}: {reason}")
    if where not in {"cpu", *plain_on}:
        _warn_once(op, where, "; ".join(reasons) or "no backend for this platform", args)
    return reference(*args, **kwargs)


def _traced_once(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a backend's function under `jit`, so that layers with equal shapes trace and lower it only once."""
    arrays = {name: value for name, value in kwargs.items() if isinstance(value, jax.Array)}
    static = tuple((name, value) for name, value in kwargs.items() if name not in arrays)
    return _compiled(function, static, args, arrays)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _compiled(
    function: Callable[..., Any],
    static: tuple[tuple[str, Any], ...],
    args: tuple[Any, ...],
    arrays: dict[str, jax.Array],
) -> Any:
    return function(*args, interpret=False, **dict(static), **arrays)


def _warn_once(op: str, where: str, reason: str, args: tuple[Any, ...]) -> None:
    if (op, where, reason) in _warned:
        return
    _warned.add((op, where, reason))
    shapes = ", ".join(f"{x.dtype}{list(x.shape)}" for x in jax.tree.leaves(args))
    _logger.warning("%s falls back to its slow reference on %s (%s); arguments %s", op, where, reason, shapes)
