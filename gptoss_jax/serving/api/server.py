"""What the routes of a server share."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator

from gptoss_jax.serving import turns
from gptoss_jax.serving.api.errors import not_found
from gptoss_jax.serving.api.grammars import GrammarChecks
from gptoss_jax.serving.api.lifecycle import Drain, Health
from gptoss_jax.serving.api.metrics import Metrics
from gptoss_jax.serving.api.work import CountedTurn, Work
from gptoss_jax.serving.generated import Request
from gptoss_jax.serving.owner import EngineOwner
from gptoss_jax.serving.prompts import Prompts
from gptoss_jax.text.tokenizer import Tokenizer

MAX_NOTES = 1000
"""The most fields that are logged; clients choose the names of unknown ones."""

_logger = logging.getLogger(__name__)


@dataclasses.dataclass
class Server:
    """The model that a server serves, and its state.

    Args:
      prompts: makes requests.
      owner: runs them.
      names: the names of the model; the first is used in responses to requests that name none.
      max_model_len, vocab_size: the engine's.
      created: when the model was loaded, in seconds since 1970.
      draining, health: the server's states.
      metrics: counts all requests.
      grammars: checks the grammars of requests; None leaves it to the engine.
      reasoning_fields: the names under which Chat Completions have the reasoning.
      fingerprint: the `system_fingerprint` of responses.
    """

    prompts: Prompts
    owner: EngineOwner
    names: list[str]
    max_model_len: int = 0
    vocab_size: int = 0
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))
    draining: Drain = dataclasses.field(default_factory=Drain)
    health: Health = dataclasses.field(default_factory=Health)
    metrics: Metrics = dataclasses.field(default_factory=Metrics)
    grammars: GrammarChecks | None = None
    reasoning_fields: tuple[str, ...] = ("reasoning", "reasoning_content")
    fingerprint: str = "gptoss-jax"
    _noted: set[str] = dataclasses.field(default_factory=set)

    def __post_init__(self) -> None:
        self.metrics.set_names(self.names)

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer. Raises UsageError without one."""
        return self.prompts.need_tokenizer("text")

    def name(self, model: str | None) -> str:
        """The name of the model that a request asks for. Raises ApiError for an unknown one."""
        if model is None:
            return self.names[0]
        if model not in self.names:
            raise not_found(
                f"the model {model!r:.80} does not exist; there is {self.names[0]!r}", "model", "model_not_found"
            )
        return model

    async def run(self, request: Request) -> AsyncGenerator[turns.Update]:
        """Run a request; closing the generator aborts what has not finished. Raises as `start` does."""
        async with contextlib.aclosing(await self.start(request)) as turn:
            async for update in turn:
                yield update

    async def start(self, request: Request) -> turns.Turn:
        """Submit a request; the caller closes the turn, as by `contextlib.aclosing`.

        It is counted, checked and within the limits of the HTTP request that it is for. Raises ApiError, UsageError
        and EngineError.
        """
        work = Work(request, self.draining, self.metrics)
        try:
            work.admit()
            if self.grammars:
                await self.grammars.check(request.params.structured_outputs)
            stream = await self.owner.submit(request)
        except Exception as error:
            work.end(error)
            raise
        except BaseException:
            work.end()
            raise
        return CountedTurn(stream, self.prompts.tokenizer, request, work)

    def begin(self, max_model_len: int, vocab_size: int) -> None:
        """Take requests, now that the engine is ready."""
        self.max_model_len, self.vocab_size = max_model_len, vocab_size
        self.health.ready = True

    def drain(self) -> None:
        """Take no more requests."""
        self.draining.begin()

    @contextlib.asynccontextmanager
    async def lifespan(self, app: object = None) -> AsyncIterator[None]:
        """What runs beside the application: it notes the end of the engine, and checks grammars."""
        following = asyncio.ensure_future(self.health.follow(self.owner))
        if self.grammars:
            self.grammars.start()
        try:
            yield
        finally:
            following.cancel()
            await asyncio.wait((following,))
            if self.grammars:
                await self.grammars.close()

    def note_once(self, field: str, text: str) -> None:
        """Log, once, that a field of a request changes nothing."""
        if field not in self._noted and len(self._noted) < MAX_NOTES:
            self._noted.add(field)
            _logger.info("%s: %s", field, text)
