import io
import os
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

from tests.quick import QUICK

# Set before jax is imported: tests run on the CPU even if the machine has accelerators.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", f"--xla_force_host_platform_device_count=8 {QUICK}")

# Engines of the same shape compile the same programs, so workers share a compile cache.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", tempfile.mkdtemp(prefix="gptoss-jax-tests-"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")

# If the environment disables bytecode files, every command that the tests start recompiles jax's Python sources.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

import jax
import pytest
from hypothesis import HealthCheck, settings

settings.register_profile(
    "default", deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)
settings.load_profile("default")


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Redirect the commands' compile cache from the user's cache directory to one shared by the tests."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(autouse=True, scope="session")
def kept_programs() -> None:
    """Keep the programs of earlier tests: otherwise they go with the last engine that uses them."""
    from gptoss_jax.engine import runner

    runner._PROGRAMS = {}


@pytest.fixture
def jit_options(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The compiler options of each function that a test jits, by function name; they are not passed on to XLA."""
    from gptoss_jax.engine import runner

    jit_options: dict[str, Any] = {}

    def jit(function: Callable[..., Any], compiler_options: Any = None, **options: Any) -> Any:
        named = function.func if isinstance(function, partial) else function
        jit_options[named.__name__] = compiler_options
        return compile_lazily(function, **options)

    compile_lazily = jax.jit
    monkeypatch.setattr(jax, "jit", jit)
    monkeypatch.setattr(runner, "_PROGRAMS", {})
    return jit_options


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """Run a command's main as `python -m` does; returns (exit code, standard output, standard error)."""
    from gptoss_jax.commands.running import run_command

    def run(main, *arguments: str, stdin: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode(errors="surrogateescape"))))
        with pytest.raises(SystemExit) as exit_:
            run_command(lambda: main([str(argument) for argument in arguments]))
        out, err = capsys.readouterr()
        return exit_.value.code or 0, out, err

    return run
