"""A whole platform in virtual time: production gateways and workers over the simulated seams."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from forebay.core.roles import WorkerRole
from forebay.core.settings import EngineSettings, GatewaySettings, WorkerSettings
from forebay.engine.loader import load_runner
from forebay.gateway.service import GatewayService
from forebay.rpc.methods import PROTOCOL_VERSION
from forebay.rpc.v1 import worker_pb2
from forebay.simulator.dice import Dice
from forebay.simulator.fabric import Network
from forebay.simulator.forced_pulls import ForcedPulls
from forebay.simulator.loop import Node, SimLoop
from forebay.simulator.processes import Birth, GatewayProcess, RedisProcess, WorkerProcess
from forebay.simulator.timeline import Timeline
from forebay.simulator.watch import Violation
from forebay.worker.worker import Worker

READY_POLL_S = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class PlatformOptions:
    """latency_s: least time of a message between two processes. keep_alive_s: silence after which
    a connection counts as broken. step_s: the longest time of a call of a worker's executor; 0
    runs it inline. salts: one per gateway. pull_share: of the prompts for which a gateway names a
    worker to pull KV from, whatever its router says."""

    seed: int
    num_prefill: int = 1
    num_decode: int = 1
    num_mixed: int = 0
    latency_s: float = 0.0005
    keep_alive_s: float = 15.0
    step_s: float = 0.0
    pull_share: float = 0.0
    salts: tuple[str, ...] = ("simulated",)
    engine: EngineSettings = field(
        default_factory=lambda: EngineSettings(engine="sim", model_id="sim", num_blocks=512)
    )
    worker: WorkerSettings = field(default_factory=WorkerSettings)
    gateway: GatewaySettings = field(default_factory=GatewaySettings)


class SimulatedPlatform:
    """Use as an async context manager inside `loop.run`. A seed gives the same run every time.
    `on_bug(what, error)`: a handler failed as none may. skew: seconds by which the clocks of the
    named processes are off."""

    def __init__(
        self,
        options: PlatformOptions,
        timeline: Timeline | None = None,
        on_bug: Callable[[str, Exception], None] | None = None,
        skew: Mapping[str, float] | None = None,
    ) -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, SimLoop)
        self.loop = loop
        self.options = options
        self.timeline = Timeline(False) if timeline is None else timeline
        self.network = Network(
            loop,
            Dice(options.seed, 1),
            self.timeline,
            options.latency_s,
            options.keep_alive_s,
            _raise if on_bug is None else on_bug,
        )
        self.network.after_call["Abort"] = self._after_abort
        pulls = ForcedPulls(Dice(options.seed, 3), options.pull_share, lambda: self.processes)
        self.network.before_call["Prefill"] = pulls.name_source
        self.network.on_push = self._check_pair
        self._skew = dict(skew or {})
        self.processes: list[WorkerProcess] = []
        self.gateways: list[GatewayProcess] = []
        self._num_births = 0
        self.redis = RedisProcess(self.network, self._birth("redis"))

    @property
    def gateway(self) -> GatewayService:
        return self.gateways[0].service

    @property
    def workers(self) -> list[Worker]:
        return [process.worker for process in self.processes]

    async def __aenter__(self) -> SimulatedPlatform:
        counts = (
            (WorkerRole.PREFILL, self.options.num_prefill),
            (WorkerRole.DECODE, self.options.num_decode),
            (WorkerRole.MIXED, self.options.num_mixed),
        )
        for role, count in counts:
            for number in range(count):
                self.start_worker(role, f"{role.value}-{number}")
        for number in range(len(self.options.salts)):
            self.start_gateway(number)
        while not all(gateway.service.ready for gateway in self.gateways):
            await asyncio.sleep(READY_POLL_S)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.network.close()

    def start_worker(
        self,
        role: WorkerRole,
        name: str,
        *,
        protocol_version: int = PROTOCOL_VERSION,
    ) -> WorkerProcess:
        """Also to restart one under its old name and address, as a new life."""
        options = self.options
        settings = replace(options.worker, role=role, engine=options.engine)
        process = WorkerProcess(
            self.network,
            self._birth(name),
            f"{name}:1",
            settings,
            load_runner(settings.engine),
            protocol_version,
            options.step_s,
        )
        self.processes.append(process)
        process.start()
        return process

    def start_gateway(self, number: int) -> GatewayProcess:
        settings = replace(self.options.gateway, cache_salt=self.options.salts[number])
        birth = self._birth(f"gateway-{number}")
        gateway = GatewayProcess(self.network, birth, settings)
        gateway.start()
        if number < len(self.gateways):
            self.gateways[number] = gateway
        else:
            self.gateways.append(gateway)
        return gateway

    def start_redis(self) -> None:
        self.redis = RedisProcess(self.network, self._birth("redis"))

    def kill(self, node: Node) -> int:
        """SIGKILL. Returns how many calls broke with it."""
        self.loop.kill(node)
        self.processes = [process for process in self.processes if process.node is not node]
        return self.network.kill(node)

    def forget(self, process: WorkerProcess) -> None:
        """One that has ended in order."""
        self.kill(process.node)

    async def settle(self) -> None:
        """Waits until no worker holds anything of any request, and checks every invariant."""
        while not all(worker.idle for worker in self.workers):
            await asyncio.sleep(READY_POLL_S)
        for process in self.processes:
            process.watch.check_all(self.loop.now + process.node.offset)

    def _birth(self, name: str) -> Birth:
        self._num_births += 1
        life = sum(node.name.partition("#")[0] == name for node in self.loop.nodes)
        return Birth(
            name=f"{name}#{life + 1}" if life else name,
            seed=self.options.seed * 1024 + 512 + self._num_births,
            clock_offset_s=self._skew.get(name, 0.0),
        )

    def _check_pair(self, sender: Node, receiver: Node) -> None:
        """KV moves only between workers of one protocol version."""
        versions = {
            process.protocol_version
            for process in self.processes
            if process.node in (sender, receiver)
        }
        if len(versions) > 1:
            raise Violation(f"{sender.name} pushes to {receiver.name}, of another version")

    def _after_abort(self, node: Node, request: worker_pb2.AbortRequest) -> None:
        for process in self.processes:
            if process.node is node:
                process.watch.on_abort(request)


def _raise(what: str, error: Exception) -> None:
    raise AssertionError(f"{what} failed") from error
