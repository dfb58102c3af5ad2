"""A server over a scripted engine, for tests of the APIs without a model's time."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import openai
import uvicorn
from hypothesis import strategies as st

from gptoss_jax.checkpoints.loading import EMBEDDED
from gptoss_jax.engine.outputs import Load, TokenEvent
from gptoss_jax.errors import EngineError
from gptoss_jax.serving.api.app import build_app
from gptoss_jax.serving.api.server import Server
from gptoss_jax.serving.generated import Request
from gptoss_jax.serving.prompts import Prompts
from gptoss_jax.text.harmony import stop_token_ids
from gptoss_jax.types import TokenLogprobs
from tests.text.harmony.test_parse import tokens_of

PROMPTS = Prompts(EMBEDDED)
ANSWER = (
    "<|channel|>analysis<|message|>Think.<|end|><|start|>assistant"
    "<|channel|>final<|message|>The answer is 42.<|return|>"
)
CALL = (
    "<|channel|>analysis<|message|>Call.<|end|><|start|>assistant<|channel|>commentary to=functions.add "
    '<|constrain|>json<|message|>{"a": 1, "b": 2}<|call|>'
)

STOP_TOKENS = stop_token_ids(PROMPTS.tokenizer) if PROMPTS.tokenizer else ()

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
"""Any JSON value."""

Script = str | Sequence[int] | Exception
"""What a completion consists of: text with special tokens, token ids, or an error after the first half of ANSWER."""


class ScriptedOwner:
    """An EngineOwner whose completions are given: `script` maps a request and the completion's index to its tokens.

    `per_step` tokens come together, `delay` seconds after the previous ones. `requests` are those submitted,
    `aborted` the indices of those aborted before their end, with the completion's index or None. `cached_tokens` of
    each prompt are reported as found in the prefix cache.
    """

    def __init__(
        self, script: Callable[[Request, int], Script] | Script = ANSWER, per_step: int = 4, delay: float = 0.0
    ) -> None:
        self._script = script if callable(script) else lambda request, index: script
        self._per_step, self._delay = per_step, delay
        self.requests: list[Request] = []
        self.aborted: list[tuple[int, int | None]] = []
        self.refusal: Exception | None = None
        self.cached_tokens = 0

    async def submit(self, request: Request) -> _Stream:
        if self.refusal:
            raise self.refusal
        self.requests.append(request)
        tokens = [self._tokens(request, index) for index in range(request.params.n)]
        number = len(self.requests) - 1
        aborted = self.aborted

        def abort(index: int | None = None) -> None:
            aborted.append((number, index))

        return _Stream(request, tokens, self._per_step, self._delay, abort, self.cached_tokens)

    def _tokens(self, request: Request, index: int) -> tuple[list[int], Exception | None]:
        script = self._script(request, index)
        if isinstance(script, Exception):
            tokens = list(tokens_of(PROMPTS.tokenizer, ANSWER))
            return tokens[: len(tokens) // 2], script
        return list(tokens_of(PROMPTS.tokenizer, script) if isinstance(script, str) else script), None

    async def load(self) -> Load:
        return Load()

    async def ended(self) -> EngineError:
        return await asyncio.get_running_loop().create_future()


def logprobs_of(token: int, top: int) -> TokenLogprobs:
    """The log-probabilities that the scripted engine reports: the chosen token is the most likely one."""
    return TokenLogprobs(token, -0.5, {(token + i) % 1000: -0.5 - i for i in range(top)})


class _Stream:
    def __init__(
        self,
        request: Request,
        tokens: list[tuple[list[int], Exception | None]],
        per_step: int,
        delay: float,
        aborted: Callable[[int | None], None],
        cached_tokens: int = 0,
    ) -> None:
        self._cached_tokens = cached_tokens
        self._request, self._tokens, self._per_step, self._delay = request, tokens, per_step, delay
        self._at = 0
        self.abort = aborted

    def close(self) -> None:
        pass

    async def events(self) -> list[TokenEvent]:
        await asyncio.sleep(self._delay)
        params, found = self._request.params, []
        for index, (all_tokens, error) in enumerate(self._tokens):
            tokens = all_tokens[: params.max_tokens]
            cut = len(tokens) < len(all_tokens) or params.max_tokens == len(tokens)
            ended = "length" if cut and tokens[-1] not in STOP_TOKENS else "stop"
            for i in range(self._at, min(self._at + self._per_step, len(tokens))):
                last = i == len(tokens) - 1 and error is None
                logprobs = None if params.logprobs is None else logprobs_of(tokens[i], params.logprobs)
                event = TokenEvent(
                    self._request.request_id, index, tokens[i], logprobs, finish_reason=ended if last else None
                )
                event.cached_tokens = self._cached_tokens
                if i == 0 and params.prompt_logprobs is not None:
                    _, *rest = self._request.prompt_token_ids
                    event.prompt_logprobs = [None, *(logprobs_of(t, params.prompt_logprobs) for t in rest)]
                found.append(event)
            if error is not None and self._at <= len(tokens) < self._at + self._per_step:
                found.append(TokenEvent(self._request.request_id, index, -1, finish_reason="error", error=error))
        self._at += self._per_step
        return found


def server_over(owner: object, **more: object) -> Server:
    """A server of the shipped model's tokenizer over an owner."""
    vocabulary = PROMPTS.tokenizer.vocab_size if PROMPTS.tokenizer else 0
    fields = {"names": ["gpt-oss-test"], "max_model_len": 4096, "vocab_size": vocabulary} | more
    return Server(PROMPTS, owner, **fields)  # type: ignore[arg-type]


class Served:
    """A server whose scripted engine can be changed between requests, and OpenAI's client of it."""

    model = "gpt-oss-test"

    def __init__(self, url: str, owner: ScriptedOwner, server: Server) -> None:
        self.url, self.owner, self.server = url, owner, server
        self.client = openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0)

    def says(self, script: Callable[[Request, int], Script] | Script, **engine: Any) -> None:
        """What the engine generates from now on; `engine` are as for ScriptedOwner, and its attributes."""
        names = ("per_step", "delay")
        self.owner.__init__(script, **{k: v for k, v in engine.items() if k in names})  # type: ignore[misc]
        for name in engine.keys() - names:
            setattr(self.owner, name, engine[name])


@contextlib.contextmanager
def served(**more: object) -> Iterator[Served]:
    """Serves an engine without a script on a free port; `more` are as for `server_over`."""
    owner = ScriptedOwner()
    server = server_over(owner, **more)
    with serving(server) as url:
        found = Served(url, owner, server)
        with found.client:
            yield found


@contextlib.contextmanager
def serving(server: Server) -> Iterator[str]:
    """Serves on a free port of the loopback address, in a thread; the URL without a path."""
    config = uvicorn.Config(build_app(server), host="127.0.0.1", port=0, log_level="warning", lifespan="on")
    running = uvicorn.Server(config)
    thread = threading.Thread(target=running.run, daemon=True)
    thread.start()
    while not running.started:
        if not thread.is_alive():
            raise RuntimeError("the server did not start")
        threading.Event().wait(0.01)
    port = running.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        running.should_exit = True
        thread.join(10)
