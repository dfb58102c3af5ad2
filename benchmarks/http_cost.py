"""What HTTP costs: tokens a second of a fake engine through the server, against those that its owner alone delivers.

`python -m benchmarks.http_cost [--streams 1,8,64,256] [--rate 40000]`; the engine, the front and the clients share the
machine, so on two cores they compete.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import msgspec

from benchmarks.fake_engine import FakeEngine
from gptoss_jax.checkpoints.loading import EMBEDDED
from gptoss_jax.commands.flags import integers
from gptoss_jax.serving.link.engine_end import EngineEnd
from gptoss_jax.serving.link.options import FrontOptions
from gptoss_jax.serving.worker import Inbox, Worker
from gptoss_jax.text.tokenizer import Tokenizer
from gptoss_jax.types import SamplingParams

MARK = "~"
"""The text of each token."""

SECONDS = 6.0
"""How long each measurement runs, in seconds."""


def script(tokenizer: Tokenizer) -> list[int]:
    """A long answer in the harmony format, whose tokens can be counted in its text."""
    special = tokenizer.special_tokens
    header = [special["<|channel|>"], *tokenizer.encode("final"), special["<|message|>"]]
    return header + tokenizer.encode(MARK) * 100_000


def alone(engine: FakeEngine, worker: Worker, streams: int) -> float:
    """Tokens a second that the worker delivers to a reader in this process."""
    inbox = Inbox()
    for _ in range(streams):
        worker.submit([1], SamplingParams(max_tokens=100_000), inbox)
    inbox.get()
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < SECONDS:
        count += len(inbox.get())
    seconds = time.perf_counter() - started
    worker.leave(inbox)
    worker.load()
    return count / seconds


def start_front(engine: FakeEngine, worker: Worker) -> tuple[subprocess.Popen[bytes], int]:
    """The front process of an engine, and its port."""
    own, front = socket.socketpair()
    listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
    port = listener.getsockname()[1]
    options = FrontOptions(front.fileno(), listener.fileno(), str(EMBEDDED), ["fake"], f"http://127.0.0.1:{port}")
    command = [sys.executable, "-m", "gptoss_jax.serving.front", msgspec.json.encode(options).decode()]
    process = subprocess.Popen(command, pass_fds=(front.fileno(), listener.fileno()), stdout=subprocess.PIPE)
    front.close()
    listener.close()
    threading.Thread(target=EngineEnd(own, engine, worker).serve, daemon=True).start()  # type: ignore[arg-type]
    assert process.stdout
    process.stdout.readline()
    return process, port


class _Reader(asyncio.Protocol):
    """Counts the bytes and events of a stream."""

    def __init__(self, body: bytes) -> None:
        self._body = body
        self.events = self.tokens = 0
        self.first: float | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        transport.write(head + b"Content-Length: %d\r\n\r\n" % len(self._body) + self._body)  # type: ignore[attr-defined]

    def data_received(self, data: bytes) -> None:
        self.tokens += data.count(MARK.encode())
        if self.first is None and self.tokens:
            self.first = time.perf_counter()
        self.events += data.count(b"data: ")


async def _clients(port: int, streams: int) -> list[_Reader]:
    message = {"role": "user", "content": "Go on."}
    body = json.dumps({"messages": [message], "stream": True, "max_completion_tokens": 100_000}).encode()
    loop = asyncio.get_running_loop()
    made = [await loop.create_connection(lambda: _Reader(body), "127.0.0.1", port) for _ in range(streams)]
    while any(reader.first is None for _, reader in made):
        await asyncio.sleep(0.05)
    tokens, events = (-sum(getattr(reader, name) for _, reader in made) for name in ("tokens", "events"))
    started = time.perf_counter()
    await asyncio.sleep(SECONDS)
    seconds = time.perf_counter() - started
    tokens += sum(reader.tokens for _, reader in made)
    events += sum(reader.events for _, reader in made)
    print(tokens / seconds, tokens / max(1, events), flush=True)
    for transport, _ in made:
        transport.abort()
    return [reader for _, reader in made]


def through_http(port: int, streams: int) -> tuple[float, float]:
    """Tokens a second that streaming clients in another process receive, and tokens in an event."""
    command = [sys.executable, "-m", "benchmarks.http_cost", "--clients", f"{port},{streams}"]
    rate, per_event = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.split()
    return float(rate), float(per_event)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=integers, default=[1, 8, 64, 256])
    parser.add_argument("--rate", type=float, default=40_000, help="tokens a second of the engine at 256 streams")
    parser.add_argument("--clients", type=integers, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.clients:
        asyncio.run(_clients(*options.clients))
        return
    step = 256 / options.rate
    engine = FakeEngine(script(Tokenizer.from_dir(Path(EMBEDDED))), step)
    worker = Worker(engine)  # type: ignore[arg-type]
    front, port = start_front(engine, worker)
    print("streams  owner tok/s  HTTP tok/s  ratio  tokens/event  front CPU s")
    for streams in options.streams:
        own = alone(engine, worker, streams)
        before = _cpu_seconds(front.pid)
        http, per_event = through_http(port, streams)
        cpu = _cpu_seconds(front.pid) - before
        print(f"{streams:7} {own:12.0f} {http:11.0f} {http / own:6.3f} {per_event:13.2f} {cpu / SECONDS:12.2f}")
    front.terminate()
    front.wait()


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100


if __name__ == "__main__":
    main()
