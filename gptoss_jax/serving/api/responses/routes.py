"""The routes of the Responses API."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import datetime
import functools
import logging
import sqlite3
from collections.abc import AsyncGenerator
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import BaseRoute

from gptoss_jax.errors import UsageError
from gptoss_jax.serving.api import sse
from gptoss_jax.serving.api.body import convert, read_body
from gptoss_jax.serving.api.disconnect import while_connected
from gptoss_jax.serving.api.encoding import JsonResponse
from gptoss_jax.serving.api.errors import ApiError, as_api_error, bad_request, not_found
from gptoss_jax.serving.api.objects import TokenTexts, check_stream
from gptoss_jax.serving.api.responses.events import Events, NoEvents
from gptoss_jax.serving.api.responses.fields import ENCRYPTED, CreateRequest, read_request
from gptoss_jax.serving.api.responses.ids import new_id
from gptoss_jax.serving.api.responses.items import Item, read_items
from gptoss_jax.serving.api.responses.output import Output, new_response
from gptoss_jax.serving.api.responses.prompt import Context, make_request, own_error
from gptoss_jax.serving.api.responses.sealing import Sealing
from gptoss_jax.serving.api.responses.store import Conversation, Record, Store, StoreOptions
from gptoss_jax.serving.api.responses.tools import Tools, read_tools
from gptoss_jax.serving.api.routing import route
from gptoss_jax.serving.api.server import Server
from gptoss_jax.serving.generated import Request

_logger = logging.getLogger(__name__)


def routes(server: Server) -> list[BaseRoute]:
    """The routes of the Responses API, with a store of their own. Raises UsageError if it cannot be opened."""
    api = _Responses(server)
    one = "/v1/responses/{response_id}"
    return [
        route("/v1/responses", api.create, "POST"),
        route("/v1/responses/input_tokens", api.input_tokens, "POST"),
        route(one, api.retrieve, "GET"),
        route(one, api.delete, "DELETE"),
        route(f"{one}/cancel", api.cancel, "POST"),
        route(f"{one}/input_items", api.input_items, "GET"),
    ]


def owner_of(http: HttpRequest) -> str:
    """The owner of what a request stores: the name of its API key, or "" without keys."""
    return getattr(http.state, "key_name", None) or ""


@dataclasses.dataclass
class _Prepared:
    """A response that can be generated."""

    context: Context
    owner: str
    before: Conversation | None
    request: Request
    model: str


class _ItemsQuery(msgspec.Struct):
    """The query of a list of items."""

    limit: Annotated[int, Meta(ge=1, le=100)] = 20
    order: Literal["asc", "desc"] = "desc"
    after: str | None = None


class _Responses:
    def __init__(self, server: Server) -> None:
        self._server = server
        self._store = Store(server.response_store or StoreOptions())
        self._sealing = Sealing(server.response_secret)

    async def create(self, http: HttpRequest) -> Response:
        """Generate a response."""
        prepared = await self._prepare(http)
        if prepared.context.request.stream:
            return await sse.stream(self._events(prepared))
        return JsonResponse(await while_connected(http.receive, self._answer(prepared)))

    async def input_tokens(self, http: HttpRequest) -> Response:
        """Count the tokens of a prompt."""
        prepared = await self._prepare(http)
        count = len(prepared.request.prompt_token_ids)
        return JsonResponse({"object": "response.input_tokens", "input_tokens": count})

    async def retrieve(self, http: HttpRequest) -> Response:
        """A stored response."""
        for name in ("stream", "starting_after"):
            if http.query_params.get(name, "false") not in ("false", "0"):
                raise bad_request(f"{name}: only responses in the background can be streamed again", name)
        response = await self._store.get(http.path_params["response_id"], owner_of(http))
        if response is None:
            raise _missing(http.path_params["response_id"], "response_id")
        return JsonResponse(response)

    async def delete(self, http: HttpRequest) -> Response:
        """Delete a stored response."""
        response_id = http.path_params["response_id"]
        if not await self._store.delete(response_id, owner_of(http)):
            raise _missing(response_id, "response_id")
        return JsonResponse({"id": response_id, "object": "response", "deleted": True})

    async def cancel(self, http: HttpRequest) -> Response:
        """Refuse to cancel a response that is complete."""
        response_id = http.path_params["response_id"]
        if await self._store.get(response_id, owner_of(http)) is None:
            raise _missing(response_id, "response_id")
        raise bad_request("response_id: only responses in the background can be cancelled", "response_id")

    async def input_items(self, http: HttpRequest) -> Response:
        """Some input items of a stored response."""
        response_id, query = http.path_params["response_id"], _items_query(http)
        try:
            page = await self._store.input_items(
                response_id, owner_of(http), query.limit, query.order == "desc", query.after
            )
        except KeyError:
            raise bad_request("after: expected the id of an input item of the response", "after") from None
        if page is None:
            raise _missing(response_id, "response_id")
        return JsonResponse(
            {
                "object": "list",
                "data": page.items,
                "first_id": page.first,
                "last_id": page.last,
                "has_more": page.more,
            }
        )

    async def _prepare(self, http: HttpRequest) -> _Prepared:
        owner, body = owner_of(http), await read_body(http)
        # Long inputs take long to read and to tokenize.
        request, tools, given = await asyncio.to_thread(self._read, body, owner)
        before = await self._before(request.previous_response_id, owner)
        date = before.date if before else datetime.date.today().isoformat()
        given = await self._resolved(given, owner)
        context = Context(request, before.items if before else [], given, tools, date)
        made = await asyncio.to_thread(
            make_request, new_id("resp"), context, self._server.prompts, self._server.max_model_len
        )
        return _Prepared(context, owner, before, made, self._server.name(request.model))

    def _read(self, body: bytes, owner: str) -> tuple[CreateRequest, Tools, list[Item]]:
        request = read_request(body, self._server)
        self._server.name(request.model)
        check_stream(request.stream, request.stream_options, None)
        if request.input is None and request.previous_response_id is None:
            raise bad_request("input: expected text or a list of items, found nothing", "input")
        given = read_items(request.input or [], lambda sealed, where: self._sealing.unseal(sealed, owner, where))
        return request, read_tools(request.tools, self._server), given

    async def _before(self, previous: str | None, owner: str) -> Conversation | None:
        """The conversation that a request continues."""
        if previous is None:
            return None
        before = await self._store.conversation(previous, owner)
        if before is None:
            raise _missing(previous, "previous_response_id", "previous_response_not_found")
        if before.status == "failed":
            where = "previous_response_id"
            raise bad_request(
                f"{where}: the response {previous!r:.80} has failed, so it has no continuation", where
            )
        return before

    async def _resolved(self, given: list[Item], owner: str) -> list[Item]:
        """The items, with those that references refer to."""
        ids = [item["id"] for item in given if item["type"] == "item_reference"]
        if not ids:
            return given
        found = await self._store.find_items(ids, owner)
        for index, item in enumerate(given):
            if item["type"] == "item_reference" and item["id"] not in found:
                where = f"input[{index}].id"
                raise not_found(f"{where}: there is no stored item {item['id']!r:.80}", where, "item_not_found")
        return [found[item["id"]] if item["type"] == "item_reference" else item for item in given]

    def _output(self, prepared: _Prepared, events: Events) -> Output:
        request, made = prepared.context.request, prepared.request
        response = new_response(made.request_id, prepared.model, request, prepared.context.tools, made.params)
        seal = functools.partial(self._sealing.seal, owner=prepared.owner) if request.includes(ENCRYPTED) else None
        texts = TokenTexts(self._server.prompts.tokenizer)
        return Output(response, events, prepared.context.tools, texts, seal)

    async def _answer(self, prepared: _Prepared) -> dict[str, Any]:
        """The whole response."""
        output = self._output(prepared, NoEvents())
        try:
            async with contextlib.aclosing(await self._server.start(prepared.request)) as turn:
                async for update in turn:
                    output.add(update)
        except UsageError as error:
            raise own_error(error, prepared.context) from None
        await self._keep(prepared, output)
        return output.response

    async def _events(self, prepared: _Prepared) -> AsyncGenerator[bytes]:
        """The events of the response. Raises only before the first ones."""
        events = Events()
        output = self._output(prepared, events)
        try:
            turn = await self._server.start(prepared.request)
        except UsageError as error:
            raise own_error(error, prepared.context) from None
        async with contextlib.aclosing(turn):
            output.begin()
            yield events.take()
            try:
                async for update in turn:
                    output.add(update)
                    if data := events.take():
                        yield data
            except Exception as error:
                output.fail(_streamed_error(error, prepared.context))
        # Whoever has seen the last event can rely on the response's being stored.
        await self._keep(prepared, output)
        output.end()
        yield events.take() + sse.DONE

    async def _keep(self, prepared: _Prepared, output: Output) -> None:
        """Store the response, if it shall be; one that cannot be stored says so."""
        context, response = prepared.context, output.response
        if not response["store"]:
            return
        try:
            await self._store.put(Record(response, prepared.owner, context.date, prepared.before, context.given))
        except sqlite3.Error:
            pass
            _logger.exception("a response could not be stored")


def _streamed_error(error: Exception, context: Context) -> ApiError:
    return own_error(error, context) if isinstance(error, UsageError) else as_api_error(error)


def _items_query(http: HttpRequest) -> _ItemsQuery:
    return convert(dict(http.query_params), _ItemsQuery, strict=False)


def _missing(response_id: str, field: str, code: str | None = None) -> ApiError:
    return not_found(f"{field}: there is no stored response {response_id!r:.80}", field, code)
