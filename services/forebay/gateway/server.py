"""The listening side of a gateway process: HTTP through uvicorn, gRPC, and how both drain."""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import grpc.aio
import uvicorn
from starlette.types import ASGIApp

from forebay.core.errors import ConfigurationError
from forebay.core.randomness import Rng
from forebay.core.settings import GatewaySettings
from forebay.gateway.exchanges import Exchanges
from forebay.gateway.generation import Generator
from forebay.gateway.grpc_service import Health, add_to_server
from forebay.gateway.http_app import create_app
from forebay.gateway.http_protocol import BoundedHttpProtocol
from forebay.gateway.observer import Observer
from forebay.rpc.grpc_listener import SERVER_OPTIONS, add_port

log = logging.getLogger(__name__)

KEEP_ALIVE_CONNECTION_S = 30
"""How long an idle HTTP connection stays open."""
_START_TIMEOUT_S = 10.0
_LAST_WORDS_S = 3
"""For errors to reach the clients of what was cut at shutdown."""
_BACKLOG = 2048
_WIRE_OVERHEAD = 8
"""A chunked body may be this many times as long on the wire as the body it carries."""


class GatewayServer:
    """Both edges of one Generator. `start`, then `stop`, once each. Raises ConfigurationError for
    settings with which it cannot work."""

    def __init__(self, generator: Generator, settings: GatewaySettings, rng: Rng) -> None:
        self._observer = Observer.of(settings)
        self.metrics = self._observer.metrics
        self.http_port = settings.http_port
        self.grpc_port = settings.grpc_port
        self._settings = settings
        self._exchanges = Exchanges()
        app = create_app(
            generator,
            settings,
            self._observer,
            rng=rng,
            unix_time=_unix_time,
            exchanges=self._exchanges,
        )
        self._http = _HttpServer(http_config(app, settings))
        self._http_task: asyncio.Task[None] | None = None
        self._grpc = grpc.aio.server(options=_grpc_options(settings))
        self._health: Health = add_to_server(
            self._grpc, generator, self._observer, max_life_s=settings.request_timeout_s
        )
        self._health_task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Raises ConfigurationError when a port cannot be had."""
        settings = self._settings
        listener = _listen(settings.host, settings.http_port)
        self.http_port = listener.getsockname()[1]
        try:
            self.grpc_port = add_port(self._grpc, settings.host, settings.grpc_port)
        except ConfigurationError:
            listener.close()
            raise
        await self._health.refresh()
        await self._grpc.start()
        self._health_task = asyncio.create_task(self._health.follow(settings.registry_poll_s))
        self._http_task = asyncio.create_task(self._http.serve(sockets=[listener]))
        async with asyncio.timeout(_START_TIMEOUT_S):
            await self._http.listening.wait()
        log.info(
            "listening: http=%s:%d grpc=%s:%d",
            settings.host,
            self.http_port,
            settings.host,
            self.grpc_port,
        )

    async def stop(self, drain_s: float) -> None:
        """New requests are refused at once; running ones get `drain_s`, then an error."""
        log.info("draining: requests=%d limit_s=%g", len(self._exchanges), drain_s)
        self._exchanges.draining = True
        await self._health.drain()
        await asyncio.gather(self._exchanges.finish(drain_s), self._grpc.stop(drain_s))
        if self._health_task is not None:
            self._health_task.cancel()
            await asyncio.gather(self._health_task, return_exceptions=True)
        if self._http_task is not None:
            self._http.should_exit = True
            await self._http_task
        await self._observer.close()
        log.info("stopped")


class _HttpServer(uvicorn.Server):
    """Signals are the process's business; `listening` is set once connections are accepted."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = asyncio.Event()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listening.set()


def http_config(app: ASGIApp, settings: GatewaySettings) -> uvicorn.Config:
    class Protocol(BoundedHttpProtocol):
        max_message_bytes = _WIRE_OVERHEAD * settings.max_body_kib * 1024

    return uvicorn.Config(
        app,
        http=Protocol,
        ws="none",
        lifespan="off",
        interface="asgi3",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=KEEP_ALIVE_CONNECTION_S,
        timeout_graceful_shutdown=_LAST_WORDS_S,
    )


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio switches Nagle's delay off only on sockets that name their protocol.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(_BACKLOG)
    except (OSError, OverflowError) as error:
        listener.close()
        raise ConfigurationError(f"HTTP cannot listen on {host}:{port}: {error}") from error
    return listener


def _grpc_options(settings: GatewaySettings) -> list[tuple[str, Any]]:
    """A request is bounded as an HTTP body is; what is sent stays under every client's default."""
    own: dict[str, Any] = {"grpc.max_receive_message_length": settings.max_body_kib * 1024}
    return list({**dict(SERVER_OPTIONS), **own}.items())


def _unix_time() -> int:
    return int(time.time())
