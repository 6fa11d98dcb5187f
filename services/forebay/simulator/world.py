"""A running simulation as faults and scenarios see it: the platform, its clients, and time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from forebay.core.roles import WorkerRole
from forebay.engine.sequence import Status
from forebay.simulator.client import End, Phase, SimClient
from forebay.simulator.dice import Dice
from forebay.simulator.loop import Node
from forebay.simulator.platform import SimulatedPlatform
from forebay.simulator.processes import GatewayProcess, WorkerProcess
from forebay.simulator.verdict import Verdict
from forebay.simulator.workload import Kind, kinds

POLL_S = 0.01
PATIENCE_S = 30.0
"""How long most clients would wait."""
DEADLINE_SLACK_S = 1.5
"""How long after its deadline a request may still wait for its end: a sweep and a late timer."""


class World:
    """dice: of the scenario. frozen_until: when the nodes that are frozen will be over it."""

    def __init__(self, platform: SimulatedPlatform, dice: Dice, verdict: Verdict) -> None:
        self.platform = platform
        self.network = platform.network
        self.loop = platform.loop
        self.timeline = platform.timeline
        self.dice = dice
        self.verdict = verdict
        self.clients: list[SimClient] = []
        self.gateway_of: dict[SimClient, GatewayProcess] = {}
        self.frozen_s: dict[Node, float] = {}
        self.num_worker_losses = 0
        self.lives: list[WorkerProcess] = list(platform.processes)
        self.watchers: list[Callable[[SimClient], None]] = []
        self.num_outages = 0

    @property
    def now(self) -> float:
        return self.loop.now

    def note(self, text: str) -> None:
        self.timeline.add(self.now, "world", text)

    async def sleep(self, low_s: float, high_s: float) -> None:
        await asyncio.sleep(self.dice.between(low_s, high_s))

    async def until(self, condition: Callable[[], bool], within_s: float) -> bool:
        """Whether it came true in time."""
        limit = self.now + within_s
        while not condition():
            if self.now >= limit:
                return False
            await asyncio.sleep(POLL_S)
        return True

    # Clients.

    async def start_client(self, kind: Kind, timeout_s: float, pause_s: float) -> SimClient:
        """At a gateway that is ready: others get no connections."""
        client = SimClient(len(self.clients), kind, timeout_s, pause_s, self._on_phase)
        self.clients.append(client)
        while not (ready := self._ready_gateways()):
            await asyncio.sleep(0.05)
        gateway = self.dice.pick(ready)
        self.gateway_of[client] = gateway
        client.began_at = self.now + gateway.node.offset
        self.timeline.add(self.now, gateway.node.name, f"{client.name} asks: {kind.name}")
        client.task = self.loop.spawn(gateway.node, self._run_client(client, gateway))
        return client

    async def start_some_client(self) -> SimClient:
        return await self.start_client(self.dice.pick(kinds()), PATIENCE_S, 0.0)

    def _ready_gateways(self) -> list[GatewayProcess]:
        return [
            gateway
            for gateway in self.platform.gateways
            if not gateway.node.dead and not gateway.stopping and gateway.service.ready
        ]

    async def _run_client(self, client: SimClient, gateway: GatewayProcess) -> None:
        try:
            await client.run(gateway.service)
        except Exception as error:
            self.verdict.report(error)

    def _on_phase(self, client: SimClient) -> None:
        if self.timeline.on:
            end = "" if client.end is None else f": {client.end}"
            why = f" ({client.error.message})" if client.error else ""
            name = self.gateway_of[client].node.name
            self.timeline.add(self.now, name, f"{client.name} {client.phase}{end}{why}")
        for watcher in self.watchers:
            watcher(client)

    def is_over(self, client: SimClient) -> bool:
        return client.end is not None

    def active_clients(self, gateway: GatewayProcess | None = None) -> list[SimClient]:
        return [
            client
            for client, served_by in self.gateway_of.items()
            if client.end is None and (gateway is None or served_by is gateway)
        ]

    def check_overdue(self) -> None:
        """I6: no request waits longer than its deadline, its reader's pauses apart."""
        for client in self.active_clients():
            node = self.gateway_of[client].node
            if not node.running:
                continue
            limit = client.began_at + client.timeout_s + client.paused_s + DEADLINE_SLACK_S
            if self.now + node.offset > limit + self.frozen_s.get(node, 0.0):
                self.verdict.report(AssertionError(f"I6: {client.name} waits past its deadline"))

    # Processes.

    def workers(self, role: WorkerRole) -> list[WorkerProcess]:
        """Those that run and stay."""
        return [
            process
            for process in self.platform.processes
            if process.role is role and process.node.running and not process.stopping
        ]

    def num_requests(self, process: WorkerProcess) -> int:
        return len(process.worker._requests)

    async def busy_worker(self, role: WorkerRole) -> WorkerProcess | None:
        """One that has requests, soon; else any that runs."""
        await self.until(
            lambda: any(self.num_requests(process) for process in self.workers(role)), 0.4
        )
        running = self.workers(role)
        busy = [process for process in running if self.num_requests(process)]
        return self.dice.pick(busy or running) if running else None

    def kill_worker(self, process: WorkerProcess) -> int:
        self.num_worker_losses += 1
        num_broken = self.platform.kill(process.node)
        self.note(f"FAULT: {process.node.name} is killed, {num_broken} calls break")
        return num_broken

    def start_worker(
        self, like: WorkerProcess, *, version: int = 0, anew: bool = False
    ) -> WorkerProcess:
        """A new life of the same worker, or (`anew`) another one like it."""
        name = f"{like.role}-{len(self.lives)}" if anew else like.node.name.partition("#")[0]
        process = self.platform.start_worker(
            like.role,
            name,
            protocol_version=version or like.protocol_version,
        )
        self.lives.append(process)
        self.note(f"{process.node.name} starts")
        return process

    async def freeze(self, node: Node, seconds: float) -> int:
        """SIGSTOP for a while; its peers' keep-alive gives up on it in time. How many events had
        to wait."""
        self.note(f"FAULT: {node.name} is frozen for {seconds:.3f} s")
        self.loop.freeze(node)
        keep_alive_s = self.network.keep_alive_s
        if seconds > keep_alive_s:
            await asyncio.sleep(keep_alive_s)
            self.network.break_calls(node, "keep-alive ran out")
            await asyncio.sleep(seconds - keep_alive_s)
        else:
            await asyncio.sleep(seconds)
        self.frozen_s[node] = self.frozen_s.get(node, 0.0) + seconds
        return len(node.held)

    def kill_gateway(self, gateway: GatewayProcess) -> int:
        for client in self.active_clients(gateway):
            client.end = End.GATEWAY_DIED
            client.phase = Phase.OVER
        num_broken = self.platform.kill(gateway.node)
        self.note(f"FAULT: {gateway.node.name} is killed, {num_broken} calls break")
        return num_broken

    def in_flight(self, gateway: GatewayProcess) -> dict[str, int]:
        """What a gateway counts of requests, anywhere."""
        service = gateway.service
        links = service._fleet._links.values()
        return {
            "waiting": len(service._queue),
            "subscriptions": sum(len(link._inboxes) for link in links),
            "calls": sum(len(link._calls) for link in links),
            "background": len(service._dispatcher._background),
            "probation": int(service._dispatcher.probation.locked()),
        }

    def at_rest(self, gateway: GatewayProcess) -> bool:
        return not any(self.in_flight(gateway).values())

    def replace_unhealthy(self) -> None:
        """What Ray Serve does with a worker whose health check fails."""
        for process in list(self.platform.processes):
            if process.unhealthy and process.node.running:
                self.kill_worker(process)
                self.start_worker(process)

    def holder_of(self, client: SimClient, role: WorkerRole) -> WorkerProcess | None:
        """The worker that has the client's request, which is known by its seed."""
        for process in self.workers(role):
            for request in process.worker._requests:
                if request.start.params.seed == client.number and request.start.params.greedy:
                    return process
        return None

    def is_computing(self, client: SimClient, process: WorkerProcess) -> bool:
        """Whether the prompt waits or is computed there."""
        return any(
            sequence.params.seed == client.number
            and sequence.status in (Status.WAITING, Status.RUNNING)
            for request in process.worker._requests
            for sequence in process.worker.engine.sequences(request.key)
        )
