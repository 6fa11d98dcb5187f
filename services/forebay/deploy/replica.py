"""A Ray Serve replica that hosts one worker. Requests never come through Serve: gateways talk to
the worker's own gRPC listener. Serve only places, health-checks, replaces and drains it."""

from __future__ import annotations

from dataclasses import replace

from forebay.core.roles import WorkerRole
from forebay.core.settings import WorkerSettings, load
from forebay.worker.process import WorkerProcess


class WorkerReplica:
    """Serve awaits these methods on the loop that serves gRPC; what is no coroutine it would call
    in another thread."""

    async def __init__(self, role: str) -> None:  # type: ignore[misc]
        settings = replace(load(WorkerSettings), role=WorkerRole(role))
        self._drain_s = settings.drain_s
        self._worker = WorkerProcess(settings)
        await self._worker.start()

    async def check_health(self) -> None:
        self._worker.check_health()

    async def __del__(self) -> None:
        await self._worker.stop(self._drain_s)
