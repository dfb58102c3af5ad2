"""Which backend computes an op: tried in order, the plain-JAX reference last.

The platform is decided when the op is traced: that of a `platform` block, else of the devices of the mesh in
context, else of the default device. A program that is compiled ahead of time for other hardware than the host's
is therefore traced inside `platform("cuda")` or `platform("tpu")`, or under `jax.set_mesh` of the target's mesh.
What a traced function has picked stays picked in its compiled form: enter these blocks around the first call.
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
_told: set[tuple[str, str, str]] = set()
_platforms: dict[str, frozenset[str]] = {}


@dataclasses.dataclass(frozen=True)
class Backend:
    """A way to compute an op on some platforms.

    `function` takes the op's arguments and `interpret`, which is True where the hardware is absent, and raises
    NotImplementedError, with the reason, for what it does not cover.
    """

    name: str
    platforms: frozenset[str]
    function: Callable[..., Any]

    def __post_init__(self) -> None:
        _platforms[self.name] = backend_platforms(self.name) | self.platforms


class _Setting:
    """Sets a context variable at once; as a context manager, until the end of the block."""

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
    """Compute every op by this backend: "auto" for the platform's, "reference", or a name such as "triton".

    Works as a setter, and as a context manager that restores what was set before. An op that has no backend of
    the name picks as under "auto"; one whose named backend does not cover the arguments raises.
    """
    return _Setting(_forced_backend, name)


def backend_names() -> list[str]:
    """What `use_backend` can be told: "auto", "reference", and the backends of the ops that have been imported."""
    return ["auto", "reference", *sorted(_platforms)]


def backend_platforms(name: str) -> frozenset[str]:
    """The platforms whose hardware runs the backend of a name; none for "auto" and "reference"."""
    return _platforms.get(name, frozenset())


def platform(name: Platform) -> _Setting:
    """Trace for this platform, whatever the host has; a setter and a context manager as `use_backend` is."""
    return _Setting(_forced_platform, name)


def forced_backend() -> str:
    """What `use_backend` has set."""
    return _forced_backend.get()


def dispatch_settings() -> tuple[str, str | None]:
    """What `use_backend` and `platform` have set, for functions that keep what they trace: they need one for each."""
    return _forced_backend.get(), _forced_platform.get()


def current_platform(mesh: Mesh | AbstractMesh | None = None) -> str:
    """The platform that ops are traced for; with a mesh, on its devices."""
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
    """Compute `op` by the named backend, or by the first one of the platform that covers the arguments.

    A named backend whose hardware is absent is interpreted. Falling back to the reference on an accelerator is
    logged as a warning, once for each op and reason, but for platforms of `plain_on`, whose compiler needs no kernel
    to do the op well.
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
        _say_once(op, where, "; ".join(reasons) or "no backend for this platform", args)
    return reference(*args, **kwargs)


def _traced_once(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a backend's function, which alike layers then trace and lower once for all of them: that is slow."""
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


def _say_once(op: str, where: str, reason: str, args: tuple[Any, ...]) -> None:
    if (op, where, reason) in _told:
        return
    _told.add((op, where, reason))
    shapes = ", ".join(f"{x.dtype}{list(x.shape)}" for x in jax.tree.leaves(args))
    _logger.warning("%s runs as its slow reference on %s (%s); arguments %s", op, where, reason, shapes)
