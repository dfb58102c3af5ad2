"""The process that answers HTTP requests: `python -m gptoss_jax.serving.front` is started by `gptoss_jax.serve`.

It has no device and no model, so that text, JSON and connections never hold up the engine's thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import sys
from pathlib import Path

import msgspec
import uvicorn
import uvloop

from gptoss_jax.serving.api.app import build_app
from gptoss_jax.serving.api.protocol import server_config
from gptoss_jax.serving.api.server import Server
from gptoss_jax.serving.link.front_end import FrontEnd
from gptoss_jax.serving.link.options import FrontOptions
from gptoss_jax.serving.prompts import Prompts


class _HttpServer(uvicorn.Server):
    """A uvicorn server that leaves signals to the front."""

    @contextlib.contextmanager
    def capture_signals(self):  # type: ignore[no-untyped-def]
        """Signals are handled by `_run`."""
        yield


async def _run(options: FrontOptions) -> int:
    loop = asyncio.get_running_loop()
    owner = await FrontEnd.connect(socket.socket(fileno=options.link))
    server = Server(Prompts(Path(options.model)), owner, options.names)
    http = _HttpServer(server_config(build_app(server), graceful_seconds=1))
    stopping = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, stopping.set)
    # Ctrl-C reaches all processes of a terminal; the one that owns the engine passes it on as SIGTERM.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    serving = asyncio.ensure_future(http.serve([socket.socket(fileno=options.listener)]))
    ended = asyncio.ensure_future(owner.ended())
    starting = asyncio.ensure_future(_announce(owner, server, options))
    stop = asyncio.ensure_future(stopping.wait())
    await asyncio.wait((serving, ended, stop), return_when=asyncio.FIRST_COMPLETED)
    starting.cancel()
    server.drain()
    await server.draining.wait(5.0 if ended.done() else options.shutdown_timeout)
    http.should_exit = True
    await asyncio.wait((serving,), timeout=5.0)
    return 1 if ended.done() else 0


async def _announce(owner: FrontEnd, server: Server, options: FrontOptions) -> None:
    ready = await owner.ready
    server.begin(ready.max_model_len, ready.vocab_size)
    print(f"{options.names[0]} is served at {options.url}", flush=True)


def main() -> int:
    """Run the front with the options given as JSON."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options = msgspec.json.decode(sys.argv[1], type=FrontOptions)
    return uvloop.run(_run(options))


if __name__ == "__main__":
    sys.exit(main())
