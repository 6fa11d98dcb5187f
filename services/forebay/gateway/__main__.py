"""`python -m forebay.gateway`: one gateway process, set up by FOREBAY_GATEWAY_* variables.

SIGTERM and SIGINT drain it: /ready answers 503, running requests get `drain_s`, then it exits 0.
A setting with which it cannot start is one line on stderr and exit code 1.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
import time

from forebay.core.errors import ConfigurationError
from forebay.core.randomness import Rng
from forebay.core.settings import REDIS_URL_VARIABLE, GatewaySettings, load
from forebay.gateway.router_metrics import RouterCollector
from forebay.gateway.server import GatewayServer
from forebay.gateway.service import GatewayService
from forebay.rpc.grpc_connector import GrpcConnector
from forebay.store.redis_kv_events import RedisKvEventSource
from forebay.store.redis_registry import RedisRegistry

_LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s %(message)s"


async def run(settings: GatewaySettings) -> None:
    """Serves until SIGTERM or SIGINT. Raises ConfigurationError when it cannot start."""
    if not settings.redis_url:
        raise ConfigurationError(f"{REDIS_URL_VARIABLE} is not set")
    registry = RedisRegistry.connect(settings.redis_url)
    events = RedisKvEventSource.connect(settings.redis_url)
    rng = Rng()
    service = GatewayService(
        settings, GrpcConnector(), registry, events, rng, created=int(time.time())
    )
    server = GatewayServer(service, settings, rng)
    server.metrics.registry.register(RouterCollector(service.router))
    asked_to_stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, asked_to_stop.set)
    await service.start()
    try:
        await server.start()
        await asked_to_stop.wait()
        await server.stop(settings.drain_s)
    finally:
        await service.stop()


def main() -> None:
    logging.basicConfig(level=logging.INFO, format=_LOG_FORMAT, stream=sys.stderr)
    try:
        asyncio.run(run(load(GatewaySettings)))
    except ConfigurationError as error:
        print(f"forebay gateway: {error.message}", file=sys.stderr)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
