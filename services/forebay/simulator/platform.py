"""A whole platform in virtual time: production gateways and workers over the simulated seams."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace

from forebay.core.executor import InlineExecutor
from forebay.core.randomness import Rng
from forebay.core.roles import WorkerRole
from forebay.core.settings import EngineSettings, GatewaySettings, WorkerSettings
from forebay.engine.loader import load_runner
from forebay.gateway.service import GatewayService
from forebay.simulator.network import SimNetwork
from forebay.simulator.registry import MemoryRegistry
from forebay.worker.worker import Worker

READY_POLL_S = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class PlatformOptions:
    """latency_s: least time of a message between two processes."""

    seed: int
    num_prefill: int = 1
    num_decode: int = 1
    num_mixed: int = 0
    latency_s: float = 0.0005
    engine: EngineSettings = field(
        default_factory=lambda: EngineSettings(engine="sim", model_id="sim", num_blocks=512)
    )
    worker: WorkerSettings = field(default_factory=WorkerSettings)
    gateway: GatewaySettings = field(
        default_factory=lambda: GatewaySettings(cache_salt="simulated")
    )


class SimulatedPlatform:
    """Use as an async context manager inside `loop.run`. A seed gives the same run every time."""

    def __init__(self, options: PlatformOptions) -> None:
        self.workers: list[Worker] = []
        self._options = options
        self._rng = Rng(options.seed)
        self._registry = MemoryRegistry()
        self.network = SimNetwork(self._rng, options.latency_s)
        self.gateway = GatewayService(options.gateway, self.network, self._registry, self._rng)
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> SimulatedPlatform:
        counts = (
            (WorkerRole.PREFILL, self._options.num_prefill),
            (WorkerRole.DECODE, self._options.num_decode),
            (WorkerRole.MIXED, self._options.num_mixed),
        )
        for role, count in counts:
            for _ in range(count):
                self._start_worker(role)
        await self.gateway.start()
        while not self.gateway.ready:
            await asyncio.sleep(READY_POLL_S)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.gateway.stop()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for worker in self.workers:
            await worker.close()

    async def settle(self) -> None:
        """Waits until no worker holds anything of any request, and checks every invariant."""
        while not all(worker.idle for worker in self.workers):
            await asyncio.sleep(READY_POLL_S)
        for worker in self.workers:
            worker.check_integrity()

    def _start_worker(self, role: WorkerRole) -> None:
        settings = replace(self._options.worker, role=role, engine=self._options.engine)
        runner = load_runner(settings.engine)
        worker = Worker(settings, runner, InlineExecutor(), self.network, self._rng)
        worker.endpoint = f"worker-{len(self.workers)}:1"
        self.network.listen(worker.endpoint, worker.routes())
        self.workers.append(worker)
        self._tasks += [
            asyncio.create_task(worker.run()),
            asyncio.create_task(self._heartbeat(worker, settings)),
        ]

    async def _heartbeat(self, worker: Worker, settings: WorkerSettings) -> None:
        while True:
            await self._registry.publish(worker.description(), settings.registry_ttl_s)
            await asyncio.sleep(settings.heartbeat_s)
