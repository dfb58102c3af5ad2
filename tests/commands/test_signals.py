"""SIGINT and SIGTERM end a command at any moment, with the right exit code and nothing left behind."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gptoss_jax.commands import signals


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_during_garbage_collection_is_not_lost(number: signal.Signals, code: int) -> None:
    # The tests' parent process may ignore SIGINT, as a shell does for background processes.
    program = f"""
import gc, os, signal, time
from gptoss_jax.commands.running import run_command
from gptoss_jax.commands.signals import Terminated

signal.signal(signal.SIGINT, signal.default_int_handler)

def once(phase, info):
    gc.callbacks.remove(once)
    os.kill(os.getpid(), {int(number)})
    time.sleep(0.1)

def main():
    gc.callbacks.append(once)
    gc.collect()
    time.sleep(60)

run_command(main)
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30)
    assert ended.returncode == code
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_sigterm_leaves_no_partial_files(tmp_path: Path, number: signal.Signals, code: int) -> None:
    program = f"""
import signal, time
from gptoss_jax.commands.running import run_command
from gptoss_jax.commands.signals import Terminated
from gptoss_jax.checkpoints.new_directory import new_directory

signal.signal(signal.SIGINT, signal.default_int_handler)

def main():
    with new_directory({str(tmp_path / "out")!r}):
        print("begun", flush=True)
        time.sleep(60)

run_command(main)
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    process.send_signal(number)
    assert process.wait(30) == code
    assert not list(tmp_path.iterdir())


INTERRUPTIBLE = (
    sys.executable,
    "-c",
    "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "runpy.run_module('gptoss_jax.generate', run_name='__main__', alter_sys=True)",
)
"""`python -m gptoss_jax.generate` with SIGINT enabled, which a shell ignores in background processes."""


MOMENTS = (0.3, 1.0, 2.5, 5.0)
"""Seconds after the start: while modules are imported, weights loaded, steps compiled, tokens generated."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "seconds", [*MOMENTS, *(pytest.param(0.6 + 0.4 * i, marks=pytest.mark.long) for i in range(16))]
)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("times", [1, 2])
def test_a_signal_at_any_moment_ends_a_command(number: int, code: int, seconds: float, times: int) -> None:
    arguments = ("--raw", "--max-new-tokens", "4000", "x")
    process = subprocess.Popen(
        [*INTERRUPTIBLE, *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    for wait in (seconds, 0.01)[:times]:
        time.sleep(wait)
        process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("number", "code"),
    [
        pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow),
    ],
)
def test_a_signal_does_not_wait_for_running_computations(tmp_path: Path, number: int, code: int) -> None:
    """XLA's threads abort the process if they are still running at interpreter exit."""
    lines = "".join(f'{{"prompt": "What is {i} + {i}?", "ignore_eos": true}}\n' for i in range(8))
    (tmp_path / "in.jsonl").write_text('{"prompt": "hi", "max_tokens": 1}\n' + lines)
    results = tmp_path / "out.jsonl"
    process = subprocess.Popen(
        [
            *(*INTERRUPTIBLE, "--batch", tmp_path / "in.jsonl"),
            *("--output", results, "--max-new-tokens", "3000"),
        ],
        stderr=subprocess.PIPE,
        text=True,
    )
    while process.poll() is None and not (results.exists() and results.read_bytes().endswith(b"\n")):
        time.sleep(0.05)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert "Traceback" not in err
    assert "terminate called" not in err
    assert [json.loads(line)["id"] for line in results.read_text().splitlines()] == [1]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_that_a_library_drops_is_sent_again(number: int, code: int) -> None:
    """In some places jaxlib silently drops exceptions raised by the Python functions that it calls."""
    program = f"""
import os, signal, time
from gptoss_jax.commands.running import run_command
from gptoss_jax.commands.signals import Terminated

signal.signal(signal.SIGINT, signal.default_int_handler)
library = {{"__name__": "jax._src", "os": os}}
exec('''
def drop(number):
    try:
        os.kill(os.getpid(), number)
    except BaseException:
        pass
''', library)

def main():
    library["drop"]({int(number)})
    time.sleep(60)

run_command(main)
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30)
    assert ended.returncode == code
    assert "Traceback" not in ended.stderr


def test_a_handled_interrupt_is_not_raised_again() -> None:
    program = """
import os, signal, time
from gptoss_jax.commands.running import run_command
from gptoss_jax.commands.signals import Terminated

signal.signal(signal.SIGINT, signal.default_int_handler)

def main():
    try:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)
    except KeyboardInterrupt:
        pass
    time.sleep(0.5)
    print("went on")

run_command(main)
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "went on\n", "")


@pytest.mark.parametrize("raised", ["KeyboardInterrupt", "Terminated(143)"])
def test_a_signal_wrapped_in_a_library_error_sets_the_exit_code(raised: str) -> None:
    program = f"""
from gptoss_jax.commands.running import run_command
from gptoss_jax.commands.signals import Terminated

def main():
    try:
        raise {raised}
    except BaseException:
        raise RuntimeError("made of it")

run_command(main)
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (143 if "143" in raised else 130, "interrupted\n")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("module", ["numpy._globals", "jax._src.config", "jax.numpy"])
def test_a_signal_while_jax_is_imported_leaves_no_traceback(number: int, code: int, module: str) -> None:
    """jaxlib imports numpy from C; it prints a traceback of an exception raised there, and raises ImportError."""
    program = f"""
import os, signal, sys
from gptoss_jax.commands.running import run_command
from gptoss_jax.commands.signals import Terminated

signal.signal(signal.SIGINT, signal.default_int_handler)

class Finder:
    def find_spec(self, name, path, target=None):
        if name == {module!r}:
            os.kill(os.getpid(), {int(number)})

def main():
    sys.meta_path.insert(0, Finder())
    import jax

run_command(main)
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (code, "interrupted\n" if number == signal.SIGINT else "")


def test_a_signal_while_an_extension_is_imported_is_not_lost() -> None:
    """jaxlib's module drops the exception and raises an ImportError without a cause."""
    program = """
import os, signal
from gptoss_jax.commands.running import run_command
from gptoss_jax.commands.signals import Terminated

def main():
    try:
        os.kill(os.getpid(), signal.SIGTERM)
    except BaseException:
        pass
    raise ImportError("Encountered an error while initializing the extension.")

run_command(main)
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (143, "interrupted\n")


def test_a_signal_ends_the_search_for_plugins_at_once() -> None:
    """jax logs a traceback for whatever is raised there, and goes on."""
    script = (
        "import os, signal\n"
        "from gptoss_jax.commands.running import run_command\n"
        "def discover_pjrt_plugins():\n"
        "    try:\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "    except BaseException:\n"
        "        print('went on')\n"
        "def main():\n"
        "    discover_pjrt_plugins()\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "run_command(main)\n"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout, found.stderr) == (130, "", "interrupted\n")


def test_an_error_right_after_a_signal_is_its_effect(monkeypatch: pytest.MonkeyPatch) -> None:
    """Extension modules may replace the signal's exception with one of their own."""
    assert signals.exit_code(AttributeError()) == 0
    now = time.monotonic()
    monkeypatch.setattr(signals, "_arrived", [(signal.SIGTERM, now)])
    assert signals.exit_code(AttributeError()) == 143
    monkeypatch.setattr(signals, "_arrived", [(signal.SIGTERM, now - 60)])
    assert signals.exit_code(AttributeError()) == 0
    assert signals.exit_code(ImportError()) == 143
