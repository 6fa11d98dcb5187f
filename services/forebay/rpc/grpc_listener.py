"""A gRPC server for `Routes`, with health and reflection on every listener."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from forebay.core.errors import ConfigurationError, ForebayError
from forebay.rpc.connector import Method, Routes
from forebay.rpc.grpc_connector import MAX_MESSAGE_BYTES
from forebay.rpc.status import mapped, trailing_metadata

log = logging.getLogger(__name__)

SERVER_OPTIONS: tuple[tuple[str, Any], ...] = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.so_reuseport", 0),
)


class GrpcListener:
    """Serves `routes` on `host`; `address` is known after `start`."""

    def __init__(self, routes: Routes, host: str, port: int) -> None:
        self._host = host
        self._port = port
        self._server = grpc.aio.server(options=SERVER_OPTIONS)
        self._health = new_health_servicer()
        _add_routes(self._server, routes)
        self._services = routes.services()
        add_health_and_reflection(self._server, self._health, self._services)

    @property
    def port(self) -> int:
        return self._port

    async def start(self) -> None:
        """Raises ConfigurationError when the port is taken."""
        self._port = add_port(self._server, self._host, self._port)
        await self._server.start()
        await set_serving(self._health, self._services, True)

    async def stop(self, grace_s: float) -> None:
        await set_serving(self._health, self._services, False)
        await self._server.stop(grace_s)


def add_port(server: grpc.aio.Server, host: str, port: int) -> int:
    """The bound port. Raises ConfigurationError."""
    try:
        return server.add_insecure_port(f"{host}:{port}")
    except RuntimeError as error:
        raise ConfigurationError(f"gRPC cannot listen on {host}:{port}: port in use?") from error


def new_health_servicer() -> Any:
    return health.aio.HealthServicer()  # type: ignore[attr-defined]  # the stubs lack `aio`


def add_health_and_reflection(server: grpc.aio.Server, servicer: Any, services: list[str]) -> None:
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    names = [*services, health.SERVICE_NAME, reflection.SERVICE_NAME]
    reflection.enable_server_reflection(names, server)


async def set_serving(servicer: Any, services: list[str], serving: bool) -> None:
    """Sets the status of every service, and the server's own under the empty name."""
    status = health_pb2.HealthCheckResponse.ServingStatus
    for service in ["", *services]:
        await servicer.set(service, status.SERVING if serving else status.NOT_SERVING)


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: ForebayError) -> None:
    """Ends the call with the error's status; does not return."""
    await context.abort(mapped(error).grpc, error.message, trailing_metadata(error))


def _add_routes(server: grpc.aio.Server, routes: Routes) -> None:
    handlers: dict[str, dict[str, grpc.RpcMethodHandler[Any, Any]]] = {}

    def add(method: Method[Any, Any], factory: Callable[..., Any], behaviour: Any) -> None:
        handlers.setdefault(method.service, {})[method.name] = factory(
            behaviour, method.decode_request, method.encode_response
        )

    for method, unary in routes.unary:
        add(method, grpc.unary_unary_rpc_method_handler, _single(unary))
    for method, push in routes.push:
        add(method, grpc.stream_unary_rpc_method_handler, _single(push))
    for method, duplex in routes.duplex:
        add(method, grpc.stream_stream_rpc_method_handler, _streaming(duplex))
    server.add_generic_rpc_handlers(
        tuple(
            grpc.method_handlers_generic_handler(service, methods)
            for service, methods in handlers.items()
        )
    )


def _single(handler: Callable[[Any], Awaitable[Any]]) -> Any:
    """For one response: `request` is a message or an iterator of them."""

    async def serve(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        try:
            return await handler(request)
        except ForebayError as error:
            await abort(context, error)
        except Exception:
            log.exception("handler %s failed", handler.__qualname__)
            await context.abort(grpc.StatusCode.INTERNAL, "internal error")

    return serve


def _streaming(handler: Callable[[AsyncIterator[Any]], AsyncGenerator[Any, None]]) -> Any:
    async def serve(requests: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        try:
            async with aclosing(handler(requests)) as responses:
                async for response in responses:
                    yield response
        except ForebayError as error:
            await abort(context, error)
        except Exception:
            log.exception("handler %s failed", handler.__qualname__)
            await context.abort(grpc.StatusCode.INTERNAL, "internal error")

    return serve
