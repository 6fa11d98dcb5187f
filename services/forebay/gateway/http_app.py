"""The gateway's HTTP application: OpenAI-compatible routes, health, metrics."""

from __future__ import annotations

from collections.abc import Callable

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from forebay.core.errors import ForebayError, NotFound
from forebay.core.randomness import Rng
from forebay.core.settings import GatewaySettings
from forebay.gateway.exchanges import Exchanges
from forebay.gateway.explanation import record
from forebay.gateway.generation import Generator
from forebay.gateway.observer import Observer
from forebay.gateway.openai_responses import Json, error_fields, error_json, model_json, to_json
from forebay.gateway.openai_route import Edge, GenerationRoute
from forebay.rpc.status import mapped

_MESSAGES = {404: "no such route", 405: "this route does not take that method"}


def create_app(
    generator: Generator,
    settings: GatewaySettings,
    observer: Observer,
    *,
    rng: Rng,
    unix_time: Callable[[], int],
    exchanges: Exchanges,
) -> Starlette:
    """`unix_time`: whole seconds, for `created`. `exchanges` is how the owner drains the app."""
    edge = Edge(generator, settings, observer, rng, unix_time, exchanges)
    pages = _Pages(edge)
    app = Starlette(
        routes=[
            Route("/v1/chat/completions", GenerationRoute(edge, chat=True), methods=["POST"]),
            Route("/v1/completions", GenerationRoute(edge, chat=False), methods=["POST"]),
            Route("/v1/models", pages.models),
            Route("/v1/models/{model_id:path}", pages.model),
            Route("/v1/requests/{request_id}/explain", pages.explain),
            Route("/health", pages.health),
            Route("/ready", pages.ready),
            Route("/metrics", pages.metrics),
        ],
        exception_handlers={
            HTTPException: pages.refused,
            ForebayError: pages.failed,
            Exception: pages.failed,
        },
    )
    app.router.redirect_slashes = False
    return app


class _Pages:
    """The routes that answer at once."""

    def __init__(self, edge: Edge) -> None:
        self._edge = edge

    async def models(self, request: Request) -> Response:
        cards = [model_json(card) for card in self._edge.generator.models()]
        return self._json(200, {"object": "list", "data": cards})

    async def model(self, request: Request) -> Response:
        wanted: str = request.path_params["model_id"]
        for card in self._edge.generator.models():
            if card.id == wanted:
                return self._json(200, model_json(card))
        raise NotFound("no such model", param="model", code="model_not_found")

    async def explain(self, request: Request) -> Response:
        timeline = self._edge.observer.explanations.find(request.path_params["request_id"])
        return self._json(200, record(timeline))

    async def health(self, request: Request) -> Response:
        return self._json(200, {"status": "ok"})

    async def ready(self, request: Request) -> Response:
        if self._edge.exchanges.draining:
            return self._json(503, {"status": "draining"})
        if not self._edge.generator.ready:
            return self._json(503, {"status": "waiting for workers"})
        return self._json(200, {"status": "ready"})

    async def metrics(self, request: Request) -> Response:
        metrics = self._edge.observer.metrics
        return Response(metrics.exposition(), headers={"content-type": metrics.content_type})

    async def refused(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        message = _MESSAGES.get(error.status_code, error.detail)
        response = self._json(
            error.status_code, error_fields(message, type_="invalid_request_error")
        )
        response.headers.update(error.headers or {})
        return response

    async def failed(self, request: Request, error: Exception) -> Response:
        if isinstance(error, ForebayError):
            return self._json(mapped(error).http, error_json(error))
        return self._json(500, error_fields("the gateway failed", type_="server_error"))

    def _json(self, status: int, value: Json) -> Response:
        return Response(
            to_json(value),
            status,
            headers={"x-request-id": self._edge.rng.token("req")},
            media_type="application/json",
        )
