"""A request while the engine runs it: in flight, within its key's limits, and counted."""

from __future__ import annotations

import contextlib
from typing import Self

from gptoss_jax.serving import turns
from gptoss_jax.serving.api.lifecycle import Drain
from gptoss_jax.serving.api.limits import current_grant
from gptoss_jax.serving.api.metrics import Metrics
from gptoss_jax.serving.generated import Request
from gptoss_jax.serving.owner import EventStream
from gptoss_jax.text.tokenizer import Tokenizer


class Work:
    """What is done for a request from its start to its end, on behalf of the HTTP request of this context, if any."""

    def __init__(self, request: Request, drain: Drain, metrics: Metrics) -> None:
        self._request, self._grant = request, current_grant()
        self._observation = metrics.observe(request)
        self._held = contextlib.ExitStack()
        self._held.enter_context(drain.working())
        if self._grant:
            self._held.enter_context(self._grant)
        self._ended = False

    def admit(self) -> None:
        """Charge the prompt to the key, and apply its time limit. Raises ApiError for a key that has used too much."""
        if self._grant is None:
            return
        self._grant.charge_prompt(len(self._request.prompt_token_ids))
        limits = [limit for limit in (self._request.timeout, self._grant.timeout) if limit is not None]
        self._request.timeout = min(limits, default=None)

    def update(self, update: turns.Update) -> None:
        """Count an update."""
        tokens = self._observation.update(update)
        if self._grant:
            self._grant.charge(tokens)

    def end(self, error: Exception | None = None) -> None:
        """Count the end, by an error or because all completions have ended or nobody reads them."""
        if not self._ended:
            self._ended = True
            self._held.close()
            self._observation.end(error)


class CountedTurn(turns.Turn):
    """A turn whose updates and end are counted."""

    def __init__(self, stream: EventStream, tokenizer: Tokenizer | None, request: Request, work: Work) -> None:
        super().__init__(stream, tokenizer, request)
        self._work = work

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> turns.Update:
        """See Turn."""
        try:
            update = await super().__anext__()
        except StopAsyncIteration:
            self._work.end()
            raise
        except Exception as error:
            self._work.end(error)
            raise
        self._work.update(update)
        return update

    async def aclose(self) -> None:
        """See Turn."""
        await super().aclose()
        self._work.end()
