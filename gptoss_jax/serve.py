"""python -m gptoss_jax.serve: serves a model over HTTP with OpenAI's APIs."""

from __future__ import annotations

import argparse
import contextlib
import signal
import socket
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any

from gptoss_jax.commands import processes
from gptoss_jax.commands.flags import (
    add_cluster_flags,
    add_engine_flags,
    add_model_flags,
    command_parser,
)
from gptoss_jax.commands.options import by_flag
from gptoss_jax.commands.running import run_command
from gptoss_jax.errors import EngineError, UsageError, expect

if TYPE_CHECKING:
    from gptoss_jax.serving.client import LLM
    from gptoss_jax.serving.worker import Worker

MAX_NUM_SEQS = {"cpu": 8}
"""Default of --max-num-seqs by platform; 256 for others."""


def flags() -> argparse.ArgumentParser:
    """The command's argument parser."""
    parser = command_parser("serve", "Serve a model over HTTP with OpenAI's APIs (extra: serve).")
    group = parser.add_argument_group("server")
    group.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    group.add_argument(
        "--port", type=int, default=8000, help="port to listen on; 0 for any free one (default: 8000)"
    )
    group.add_argument(
        "--served-model-name",
        nargs="+",
        metavar="NAME",
        help="names that requests may give the model (default: that of --model, or gptoss-jax for the included model)",
    )
    group.add_argument(
        "--shutdown-timeout",
        type=float,
        default=30.0,
        metavar="SECONDS",
        help="how long running requests may take to finish after SIGTERM (default: 30)",
    )
    add_model_flags(parser)
    add_engine_flags(parser)
    add_cluster_flags(parser)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the command."""
    options = flags().parse_args(arguments)
    with by_flag(options):
        expect(0 <= options.port < 2**16, "port", "0 to 65535", options.port)
        expect(options.shutdown_timeout >= 0, "shutdown_timeout", "a number of seconds", options.shutdown_timeout)
        return _run(options)


def _run(options: argparse.Namespace) -> int:
    if follow := processes.join("serve", options):
        return follow()
    _need_extra()
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(_listen(options.host, options.port))
        own, fronts = socket.socketpair()
        stack.enter_context(own)
        with fronts:
            front = _start_front(options, listener, fronts)
        stack.callback(front.kill)
        return _serve(options, own, front)


def _serve(options: argparse.Namespace, connection: socket.socket, front: subprocess.Popen[bytes]) -> int:
    """Load the model, and run the engine until the front exits."""
    from gptoss_jax.serving.link.engine_end import EngineEnd

    worker: Worker | None = None
    try:
        llm = _load(options)
        worker = llm.worker
        end = EngineEnd(connection, llm.engine, worker)
        threading.Thread(target=end.serve, name="gptoss-jax link", daemon=True).start()
        code = front.wait()
    except (KeyboardInterrupt, SystemExit):
        # Running requests finish; a second signal ends everything at once.
        front.send_signal(signal.SIGTERM)
        code = front.wait()
    if code and worker and (reason := worker.reason):
        raise EngineError(f"the engine has ended: {reason}")
    return code


def _load(options: argparse.Namespace) -> LLM:
    import jax

    more: dict[str, Any] = {}
    if options.max_num_seqs is None:
        more["max_num_seqs"] = MAX_NUM_SEQS.get(jax.default_backend(), 256)
    llm = processes.load_llm(options, **more)
    llm.engine.warm_up(every_feature=True)
    return llm


def _need_extra() -> None:
    try:
        import httptools  # noqa: F401
        import msgspec  # noqa: F401
        import prometheus_client  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
        import uvloop  # noqa: F401
    except ImportError as error:
        raise UsageError(f"{error.name} is missing: pip install 'gptoss-jax[serve]'") from None


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        raise UsageError(f"cannot listen on {host}:{port}: {error.strerror or error}", "--port") from None


def _start_front(
    options: argparse.Namespace, listener: socket.socket, connection: socket.socket
) -> subprocess.Popen[bytes]:
    """Start the process that answers requests; its sockets are ours."""
    import msgspec

    from gptoss_jax.checkpoints.hub import resolve
    from gptoss_jax.checkpoints.loading import EMBEDDED
    from gptoss_jax.serving.link.options import FrontOptions

    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    given = FrontOptions(
        link=connection.fileno(),
        listener=listener.fileno(),
        model=str(resolve(options.model or EMBEDDED)),
        names=options.served_model_name or [options.model or "gptoss-jax"],
        url=f"http://{shown}:{port}",
        shutdown_timeout=options.shutdown_timeout,
    )
    command = [sys.executable, "-m", "gptoss_jax.serving.front", msgspec.json.encode(given).decode()]
    return subprocess.Popen(command, pass_fds=(connection.fileno(), listener.fileno()), stdin=subprocess.DEVNULL)


if __name__ == "__main__":
    run_command(main)
