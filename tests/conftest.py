import io
import os
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

# Before jax is imported: tests run on the CPU, whatever else the machine has.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Most of the time goes into compiling small programs that run once or twice: a quarter of it into making them fast.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0")

# Engines of the same shape compile the same programs, in every worker: one of them is enough.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", tempfile.mkdtemp(prefix="gptoss-jax-tests-"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")

# Where an image's environment forbids to keep bytecode, each of the many commands that tests start compiles jax anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

import jax
import pytest
from hypothesis import HealthCheck, settings

from gptoss_jax.commands.running import run_command
from gptoss_jax.engine import runner

settings.register_profile(
    "default", deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)
settings.load_profile("default")


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Commands keep compiled programs in the user's cache directory; tests share one of their own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(autouse=True, scope="session")
def kept_programs() -> None:
    """Engines share their programs as long as there are any; here those of earlier tests stay, too."""
    runner._PROGRAMS = {}


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What XLA is told of the functions that a test compiles, by their names; XLA itself is not told."""
    told: dict[str, Any] = {}

    def jit(function: Callable[..., Any], compiler_options: Any = None, **options: Any) -> Any:
        named = function.func if isinstance(function, partial) else function
        told[named.__name__] = compiler_options
        return compile_lazily(function, **options)

    compile_lazily = jax.jit
    monkeypatch.setattr(jax, "jit", jit)
    monkeypatch.setattr(runner, "_PROGRAMS", {})
    return told


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """Runs a command's main as `python -m` does: (exit code, standard output, standard error)."""

    def run(main, *arguments: str, stdin: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
        with pytest.raises(SystemExit) as exit_:
            run_command(lambda: main([str(argument) for argument in arguments]))
        out, err = capsys.readouterr()
        return exit_.value.code or 0, out, err

    return run
