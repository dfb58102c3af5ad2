"""The models that a server has: one, under one or more names."""

from __future__ import annotations

import msgspec
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import BaseRoute

from gptoss_jax.serving.api.encoding import JsonResponse
from gptoss_jax.serving.api.routing import route
from gptoss_jax.serving.api.server import Server


class Model(msgspec.Struct):
    """A model, with the length of its context in tokens."""

    id: str
    created: int
    max_model_len: int
    object: str = "model"
    owned_by: str = "gptoss-jax"


class ModelList(msgspec.Struct):
    """All models."""

    data: list[Model]
    object: str = "list"


def routes(server: Server) -> list[BaseRoute]:
    """GET /v1/models and /v1/models/{id}."""

    def model(name: str) -> Model:
        return Model(name, server.created, server.max_model_len)

    async def all_models(http: HttpRequest) -> Response:
        return JsonResponse(ModelList([model(name) for name in server.names]))

    async def one_model(http: HttpRequest) -> Response:
        return JsonResponse(model(server.name(http.path_params["id"])))

    return [route("/v1/models", all_models, "GET"), route("/v1/models/{id:path}", one_model, "GET")]
