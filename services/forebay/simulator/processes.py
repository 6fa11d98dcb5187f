"""The simulated processes: production gateways and workers, and the Redis between them, each on a
node of its own."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from forebay.core import clock
from forebay.core.errors import InternalError, Unavailable
from forebay.core.executor import Executor, InlineExecutor
from forebay.core.randomness import Rng
from forebay.core.roles import WorkerRole
from forebay.core.settings import GatewaySettings, WorkerSettings
from forebay.engine.interface import Runner
from forebay.gateway.service import GatewayService
from forebay.simulator.channel import SimConnector
from forebay.simulator.dice import Dice
from forebay.simulator.executor import SimExecutor
from forebay.simulator.fabric import Network
from forebay.simulator.kv_events import SimKvEventSink, SimKvEventSource
from forebay.simulator.loop import Node
from forebay.simulator.redis import SimRedis
from forebay.simulator.redis_client import REDIS_ADDRESS, SimRedisClient
from forebay.simulator.registry import SimRegistry
from forebay.simulator.watch import WatchedRunner, WorkerWatch
from forebay.worker.kv_publisher import KvPublisher
from forebay.worker.worker import Worker


@dataclass(frozen=True, slots=True, kw_only=True)
class Birth:
    """What a process gets at its start. seed: of its own random numbers."""

    name: str
    seed: int
    clock_offset_s: float = 0.0


class WorkerProcess:
    """One life of a worker. step_s: the longest that a call of its executor takes; 0 has it run
    inline."""

    def __init__(
        self,
        network: Network,
        birth: Birth,
        address: str,
        settings: WorkerSettings,
        runner: Runner,
        protocol_version: int,
        step_s: float,
    ) -> None:
        loop = network.loop
        self.node: Node = loop.new_node(birth.name, birth.clock_offset_s)
        self.address = address
        self.protocol_version = protocol_version
        self.unhealthy = False
        self.stopping = False
        self.over = False
        self.executor: Executor = (
            SimExecutor(loop, Dice(birth.seed, 7), step_s) if step_s else InlineExecutor()
        )
        self._network = network
        self._settings = settings
        self.registry = SimRegistry(SimConnector(network, self.node))
        watched = WatchedRunner(runner)
        self.worker = Worker(
            settings,
            watched,
            self.executor,
            SimConnector(network, self.node),
            Rng(birth.seed),
            protocol_version,
        )
        self.publisher = KvPublisher(
            self.worker.engine.pool,
            SimKvEventSink(
                SimRedisClient(SimConnector(network, self.node)),
                self.worker.worker_id,
                self.worker.epoch,
            ),
            interval_s=settings.kv_event_interval_s,
            heartbeat_s=settings.heartbeat_s,
        )
        watched.watch(self.worker)
        self.watch = WorkerWatch(self.worker, self.node)
        self.node.after_event = self.watch.check_event
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def role(self) -> WorkerRole:
        return self._settings.role

    def start(self) -> None:
        self.worker.endpoint = self.address
        self._network.listen(self.address, self.node, self.worker.routes())
        self._tasks = [
            self._network.loop.spawn(self.node, self.worker.run()),
            self._network.loop.spawn(self.node, self._heartbeat()),
            self._network.loop.spawn(self.node, self.publisher.run()),
        ]

    async def stop(self, grace_s: float) -> None:
        """On its own node: leaves the registry, drains, ends."""
        self.stopping = True
        run, heartbeat, publishing = self._tasks
        heartbeat.cancel()
        await asyncio.gather(heartbeat, return_exceptions=True)
        await asyncio.gather(self.worker.drain(clock.Deadline.after(grace_s)), self._deregister())
        run.cancel()
        publishing.cancel()
        await asyncio.gather(run, publishing, return_exceptions=True)
        await self.publisher.close()
        self._network.stop_listening(self.node)
        await self.worker.close()
        await self.registry.close()
        self.over = True

    async def _heartbeat(self) -> None:
        while True:
            try:
                self.worker.check_health()
                description = self.worker.description()
                await self.registry.publish(description, self._settings.registry_ttl_s)
            except InternalError:
                self.unhealthy = True
            except Unavailable:
                pass
            await asyncio.sleep(self._settings.heartbeat_s)

    async def _deregister(self) -> None:
        try:
            await self.registry.remove(self.worker.worker_id)
        except Unavailable:
            return


class GatewayProcess:
    """One life of a gateway. stopping: it gets no new requests."""

    def __init__(self, network: Network, birth: Birth, settings: GatewaySettings) -> None:
        self.node = network.loop.new_node(birth.name, birth.clock_offset_s)
        self.stopping = False
        self._network = network
        self.registry = SimRegistry(SimConnector(network, self.node))
        self.events = SimKvEventSource(SimRedisClient(SimConnector(network, self.node)))
        self.service = GatewayService(
            settings,
            SimConnector(network, self.node),
            self.registry,
            self.events,
            Rng(birth.seed),
        )

    def start(self) -> None:
        self._network.loop.spawn(self.node, self.service.start())


class RedisProcess:
    """One life of Redis: it keeps nothing over a restart."""

    def __init__(self, network: Network, birth: Birth) -> None:
        self.node = network.loop.new_node(birth.name, birth.clock_offset_s)
        self.redis = SimRedis()
        network.listen(REDIS_ADDRESS, self.node, self.redis.routes())
