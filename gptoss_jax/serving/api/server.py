"""What the routes of a server share."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import AsyncGenerator

from gptoss_jax.serving import turns
from gptoss_jax.serving.api.errors import not_found
from gptoss_jax.serving.generated import Request
from gptoss_jax.serving.owner import EngineOwner
from gptoss_jax.serving.prompts import Prompts
from gptoss_jax.text.tokenizer import Tokenizer

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
    """

    prompts: Prompts
    owner: EngineOwner
    names: list[str]
    max_model_len: int
    vocab_size: int
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))
    _noted: set[str] = dataclasses.field(default_factory=set)

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

    def run(self, request: Request) -> AsyncGenerator[turns.Update]:
        """Run a request; see `turns.run`."""
        return turns.run(self.owner, self.prompts.tokenizer, request)

    async def start(self, request: Request) -> turns.Turn:
        """Submit a request, which the caller closes; see `turns.start`."""
        return await turns.start(self.owner, self.prompts.tokenizer, request)

    def note_once(self, field: str, text: str) -> None:
        """Log, once, that a field of a request changes nothing."""
        if field not in self._noted:
            self._noted.add(field)
            _logger.info("%s: %s", field, text)
