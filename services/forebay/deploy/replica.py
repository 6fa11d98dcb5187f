"""A Ray Serve replica that hosts one worker. Requests never come through Serve: gateways talk to
the worker's own gRPC listener. Serve only places, health-checks, replaces and drains it."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from dataclasses import replace

from forebay.core.roles import WorkerRole
from forebay.core.settings import WorkerSettings, load
from forebay.worker.process import WorkerProcess

log = logging.getLogger(__name__)

STOP_MARGIN_S = 8.0
"""What a worker gets on top of its time to drain until the process ends without it."""


class WorkerReplica:
    """Serve awaits these methods on the loop that serves gRPC, in a daemon thread; what is no
    coroutine it would call in another thread.

    A worker drains in two cases. Serve's own shutdown of a replica awaits `__del__` and kills the
    process afterwards. SIGTERM makes Ray end the main thread, with no call of `__del__`; Serve
    starts a replacement meanwhile. The interpreter then runs `_stop_at_exit` before it ends the
    thread pools that the engine needs; by the time of `atexit` they are gone.
    """

    async def __init__(self, role: str) -> None:  # type: ignore[misc]
        settings = replace(load(WorkerSettings), role=WorkerRole(role))
        self._drain_s = settings.drain_s
        self._worker = WorkerProcess(settings)
        await self._worker.start()
        self._loop = asyncio.get_running_loop()
        # No public hook comes as early; concurrent.futures ends its pools by this one.
        threading._register_atexit(self._stop_at_exit)  # type: ignore[attr-defined]

    async def check_health(self) -> None:
        self._worker.check_health()

    async def __del__(self) -> None:
        await self._worker.stop(self._drain_s)

    def _stop_at_exit(self) -> None:
        """On the main thread, which waits; a second SIGTERM ends the wait. An engine that hangs
        would keep the interpreter from ending at all."""
        stop = asyncio.run_coroutine_threadsafe(self._worker.stop(self._drain_s), self._loop)
        try:
            stop.result(self._drain_s + STOP_MARGIN_S)
        except TimeoutError:
            log.error("the worker did not stop in time")
            os._exit(1)
