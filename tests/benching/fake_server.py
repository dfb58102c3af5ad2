"""A server of the three OpenAI APIs that streams events at known times, written by hand from OpenAI's API reference."""

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

TTFT, GAP = 0.1, 0.03
"""Seconds to the first token, and between tokens."""

Parts = Iterator[bytes | float | None]
"""A response: bytes to send, seconds to wait, and None to drop the connection."""


@dataclass
class Call:
    path: str
    headers: dict[str, str]
    body: dict[str, Any]


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def event(fields: dict[str, Any] | str, named: bool = False) -> bytes:
    """A chunk with one server-sent event; the Responses API also names the event's type."""
    data = fields if isinstance(fields, str) else json.dumps(fields)
    name = f"event: {fields['type']}\n" if named and isinstance(fields, dict) else ""
    return chunk(f"{name}data: {data}\n\n".encode())


STREAM = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
END = b"0\r\n\r\n"
MODELS = {"object": "list", "data": [{"id": "fake", "object": "model", "created": 1, "owned_by": "test"}]}


def response(status: int, fields: dict[str, Any]) -> bytes:
    body = json.dumps(fields).encode()
    return b"HTTP/1.1 %d X\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (
        status,
        len(body),
        body,
    )


def refusal(status: int, message: str) -> bytes:
    return response(status, {"error": {"message": message, "type": "x", "param": None, "code": None}})


def paced(count: int) -> Iterator[float]:
    yield TTFT
    yield from [GAP] * (count - 1)


def completions(call: Call) -> Parts:
    base = {"id": "cmpl-1", "object": "text_completion", "created": 1, "model": "fake"}
    count, prompt = call.body["max_tokens"], call.body["prompt"]
    yield STREAM
    for seconds in paced(count):
        yield seconds
        yield event(base | {"choices": [{"text": " a", "index": 0, "logprobs": None, "finish_reason": None}]})
    yield event(base | {"choices": [{"text": "", "index": 0, "logprobs": None, "finish_reason": "length"}]})
    usage = {"prompt_tokens": len(prompt), "completion_tokens": count, "total_tokens": len(prompt) + count}
    yield event(base | {"choices": [], "usage": usage})
    yield event("[DONE]") + END


def chat(call: Call) -> Parts:
    base = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "fake"}
    count, prompt = call.body["max_completion_tokens"], call.body["messages"][0]["content"]

    def delta(fields: dict[str, Any], finish_reason: str | None = None) -> bytes:
        choice = {"index": 0, "delta": fields, "logprobs": None, "finish_reason": finish_reason}
        return event(base | {"choices": [choice], "usage": None})

    yield STREAM
    # The role comes at once, long before the first token.
    yield delta({"role": "assistant", "content": ""})
    for number, seconds in enumerate(paced(count)):
        yield seconds
        yield delta({"reasoning_content" if number == 0 else "content": " a"})
    yield delta({}, "length")
    tokens = len(prompt.split()) + 70
    usage = {"prompt_tokens": tokens, "completion_tokens": count, "total_tokens": tokens + count}
    yield event(base | {"choices": [], "usage": usage})
    yield event("[DONE]") + END


def responses(call: Call) -> Parts:
    count, tokens = call.body["max_output_tokens"], len(call.body["input"].split()) + 70
    envelope = {
        "id": "resp_1",
        "object": "response",
        "status": "in_progress",
        "error": None,
        "output": [],
        "usage": None,
    }
    item = {"id": "msg_1", "type": "message", "role": "assistant", "status": "in_progress", "content": []}
    place = {"item_id": "msg_1", "output_index": 0, "content_index": 0}
    part = {"type": "output_text", "text": "", "annotations": []}
    begin: list[dict[str, Any]] = [
        {"type": "response.created", "response": envelope},
        {"type": "response.in_progress", "response": envelope},
        {"type": "response.output_item.added", "output_index": 0, "item": item},
        {"type": "response.content_part.added", **place, "part": part},
    ]
    yield STREAM
    for number, fields in enumerate(begin):
        yield event(fields | {"sequence_number": number}, named=True)
    for number, seconds in enumerate(paced(count)):
        yield seconds
        fields = {"type": "response.output_text.delta", **place, "delta": " a", "logprobs": []}
        yield event(fields | {"sequence_number": 4 + number}, named=True)
    usage = {
        "input_tokens": tokens,
        "input_tokens_details": {"cached_tokens": 0},
        "output_tokens": count,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": tokens + count,
    }
    ended = envelope | {
        "status": "incomplete",
        "incomplete_details": {"reason": "max_output_tokens"},
        "usage": usage,
    }
    yield event({"type": "response.output_text.done", **place, "text": " a" * count}, named=True)
    yield event({"type": "response.incomplete", "response": ended}, named=True) + END


APIS = {"/v1/completions": completions, "/v1/chat/completions": chat, "/v1/responses": responses}


@dataclass
class FakeServer:
    """Listens on a free port of this machine in a thread. `calls` has all requests, `connections` their number."""

    answer: Callable[[Call], Parts] | None = None
    models: bytes = response(200, MODELS)
    calls: list[Call] = field(default_factory=list)
    connections: int = 0
    in_flight: int = 0
    peak: int = 0
    port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> "FakeServer":
        self._loop = asyncio.new_event_loop()
        ready = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(ready,), daemon=True)
        self._thread.start()
        assert ready.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def _run(self, ready: threading.Event) -> None:
        server = self._loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self.port = server.sockets[0].getsockname()[1]
        ready.set()
        self._loop.run_forever()
        server.close()
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.run_until_complete(asyncio.sleep(0))
        self._loop.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while await self._one(reader, writer):
                pass
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().strip().split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        call = Call(first.split()[1], headers, json.loads(body or b"{}"))
        self.calls.append(call)
        parts = iter([self.models]) if first.startswith("GET") else (self.answer or APIS[call.path])(call)
        self.in_flight += first.startswith("POST")
        self.peak = max(self.peak, self.in_flight)
        try:
            return await self._send(parts, writer)
        finally:
            self.in_flight -= first.startswith("POST")

    async def _send(self, parts: Parts, writer: asyncio.StreamWriter) -> bool:
        due = self._loop.time()
        for part in parts:
            if part is None:
                return False
            if isinstance(part, float):
                due += part
                await asyncio.sleep(due - self._loop.time())
            else:
                writer.write(part)
                await writer.drain()
        return True
