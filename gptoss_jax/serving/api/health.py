"""The routes that operators' tools read: health and metrics."""

from __future__ import annotations

from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import BaseRoute

from gptoss_jax.serving.api.encoding import JsonResponse
from gptoss_jax.serving.api.errors import RETRY_SECONDS
from gptoss_jax.serving.api.routing import route
from gptoss_jax.serving.api.server import Server


def routes(server: Server) -> list[BaseRoute]:
    """GET /health, /health/live, /health/ready and /metrics.

    A server is ready while it takes requests; it is alive until its engine has ended, also while it starts or drains.
    """

    def answer(well: bool) -> Response:
        body: dict[str, str] = {"status": server.health.status(server.draining.begun)}
        if server.health.failure is not None:
            body["reason"] = server.health.failure
        return JsonResponse(body) if well else JsonResponse(body, 503, {"retry-after": str(RETRY_SECONDS)})

    async def ready(http: HttpRequest) -> Response:
        return answer(server.health.status(server.draining.begun) == "ready")

    async def live(http: HttpRequest) -> Response:
        return answer(server.health.failure is None)

    async def metrics(http: HttpRequest) -> Response:
        text, content_type = await server.metrics.render(server.owner, http.headers.get("accept", ""))
        return Response(text, headers={"content-type": content_type})

    return [
        route("/health", ready, "GET"),
        route("/health/live", live, "GET"),
        route("/health/ready", ready, "GET"),
        route("/metrics", metrics, "GET"),
    ]
