"""One seed: a platform, requests, faults, checks, and an end at which nothing may be left."""

from __future__ import annotations

import asyncio
import gc
import logging
from collections import Counter
from dataclasses import dataclass, field

from forebay.core.errors import DeadlineExceeded, Overloaded, Unavailable
from forebay.core.settings import EngineSettings, GatewaySettings, WorkerSettings
from forebay.simulator import client_faults, network_faults, process_faults, pull_faults
from forebay.simulator.client import End, SimClient
from forebay.simulator.dice import Dice
from forebay.simulator.faults import FaultKind, Verified
from forebay.simulator.index_check import disagreement
from forebay.simulator.loop import SimLoop, run
from forebay.simulator.platform import PlatformOptions, SimulatedPlatform
from forebay.simulator.timeline import Timeline
from forebay.simulator.verdict import Verdict
from forebay.simulator.workload import MEAN_OUTPUT_TOKENS, MODEL, kinds
from forebay.simulator.world import PATIENCE_S, World

MIN_REQUESTS = 20
MIN_FAULTS = 3
MAX_WAVES = 5
TICK_S = 0.4
MIN_LOSSES_OF_POISON = 2
MAX_EVENTS = 400_000
"""A hundred times what a seed takes."""
REST_S = 20.0
"""How long the platform may take to come to rest after its last request."""
SKEW_S = 7200.0
FAULTS: tuple[FaultKind, ...] = (
    *process_faults.KINDS,
    *network_faults.KINDS,
    *client_faults.KINDS,
    *pull_faults.KINDS,
)
EXHAUSTION, SKEW = "KV exhaustion", "clock skew"
PULLS = ((0.0, "kv"), (0.5, "kv"), (0.9, "round-robin"))
"""Share of the prompts for which a pull is forced, and the router's policy: one that follows the
caches leaves little to pull."""
ENVIRONMENTS = (EXHAUSTION, SKEW)
"""Kinds that last for a whole seed."""


@dataclass(slots=True)
class SeedResult:
    """injected, verified: faults by kind. ends: requests by how they ended. num_pulled_tokens,
    num_failed_pulls: KV fetched from other workers' caches, or not. lines: the timeline, if it was
    on. error: what failed."""

    seed: int
    injected: Counter[str] = field(default_factory=Counter)
    verified: Counter[str] = field(default_factory=Counter)
    ends: Counter[str] = field(default_factory=Counter)
    num_pulled_tokens: int = 0
    num_failed_pulls: int = 0
    num_events: int = 0
    num_messages: int = 0
    virtual_s: float = 0.0
    error: str = ""
    lines: list[str] = field(default_factory=list)


def options_of(seed: int, dice: Dice, *, scarce: bool) -> PlatformOptions:
    pull_share, router_policy = dice.pick(PULLS)
    return PlatformOptions(
        seed=seed,
        num_prefill=2,
        num_decode=2,
        latency_s=dice.pick((0.0003, 0.001, 0.004)),
        keep_alive_s=1.5,
        step_s=dice.pick((0.0005, 0.004, 0.012)),
        pull_share=pull_share,
        salts=("one", "two") if dice.chance(0.5) else ("same", "same"),
        engine=EngineSettings(
            engine="sim",
            model_id=MODEL,
            num_blocks=18 if scarce else dice.pick((40, 120)),
            block_size=8,
            max_batch_tokens=32,
            max_num_seqs=8,
            sim_time_scale=dice.pick((0.05, 0.3)),
            sim_mean_output_tokens=MEAN_OUTPUT_TOKENS,
        ),
        worker=WorkerSettings(
            heartbeat_s=0.5,
            registry_ttl_s=1.5,
            lease_s=2.0,
            gateway_grace_s=1.0,
            kv_frame_kib=1,
            kv_event_interval_s=0.2,
            step_timeout_s=1.0,
        ),
        gateway=GatewaySettings(
            request_timeout_s=40.0,
            queue_timeout_s=30.0,
            worker_silence_s=1.5,
            registry_poll_s=0.5,
            router_policy=router_policy,
        ),
    )


class Scenario:
    def __init__(self, seed: int, timeline: Timeline) -> None:
        self.result = SeedResult(seed, lines=timeline.lines)
        self._seed = seed
        self._timeline = timeline
        self._dice = Dice(seed)
        self._scarce = self._dice.chance(0.25)
        self._skewed = self._dice.chance(0.3)
        self._checks: list[tuple[str, Verified]] = []

    async def main(self, verdict: Verdict) -> None:
        """Raises what a check finds."""
        loop = asyncio.get_running_loop()
        assert isinstance(loop, SimLoop)
        options = options_of(self._seed, self._dice, scarce=self._scarce)
        skew = self._draw_skew() if self._skewed else {}
        platform = SimulatedPlatform(options, self._timeline, verdict.on_bug, skew)
        try:
            async with platform:
                world = World(platform, self._dice, verdict)
                work = asyncio.create_task(self._work(world))
                failed = asyncio.create_task(verdict.failed.wait())
                await asyncio.wait((work, failed), return_when=asyncio.FIRST_COMPLETED)
                if verdict.error is None:
                    await work
                failed.cancel()
        finally:
            self.result.num_events = loop.num_events
            self.result.num_messages = platform.network.num_messages
            self.result.virtual_s = loop.now

    def _draw_skew(self) -> dict[str, float]:
        names = [
            "gateway-0",
            "gateway-1",
            "prefill-0",
            "prefill-1",
            "decode-0",
            "decode-1",
            "redis",
        ]
        victims = self._dice.shuffled(names)[: 1 + self._dice.below(4)]
        return {name: SKEW_S * self._dice.between(0, 1) for name in victims}

    async def _work(self, world: World) -> None:
        ticking = asyncio.create_task(self._tick(world))
        await self._wave(
            world, MIN_REQUESTS + self._dice.below(2), MIN_FAULTS + self._dice.below(3)
        )
        for _ in range(MAX_WAVES):
            if self._count_verified(world).total() >= MIN_FAULTS:
                break
            await self._wave(world, 4, 2)
        ticking.cancel()
        await asyncio.gather(ticking, return_exceptions=True)
        await self._rest(world)
        self.result.verified = self._count_verified(world)
        self.result.ends = Counter(client.end or "none" for client in world.clients)
        pulls = [life.worker._traffic.pulls for life in world.lives]
        self.result.num_pulled_tokens = sum(p.num_tokens for p in pulls)
        self.result.num_failed_pulls = sum(p.num_failures for p in pulls)
        if self.result.verified.total() < MIN_FAULTS:
            raise AssertionError(f"only {self.result.verified.total()} faults took place")

    async def _wave(self, world: World, num_requests: int, num_faults: int) -> None:
        faults = [self._dice.pick(FAULTS) for _ in range(num_faults)]
        span_s = 0.06 * num_requests
        tasks = [
            asyncio.create_task(self._inject(world, fault, self._dice.between(0.02, span_s)))
            for fault in faults
        ]
        for _ in range(num_requests):
            await self._start_request(world)
            await world.sleep(0, 2 * span_s / num_requests)
        await asyncio.gather(*tasks)
        self._heal(world)
        while world.active_clients():
            await asyncio.sleep(TICK_S / 4)
        for client in world.clients:
            self._check_end(world, client)

    async def _start_request(self, world: World) -> None:
        kind = self._dice.pick(kinds())
        timeout_s, pause_s = PATIENCE_S, 0.0
        if self._dice.chance(0.08):
            timeout_s = self._dice.between(0.02, 0.6)
        elif self._dice.chance(0.08):
            pause_s = self._dice.between(0.01, 0.08)
        await world.start_client(kind, timeout_s, pause_s)

    async def _inject(self, world: World, fault: FaultKind, after_s: float) -> None:
        await asyncio.sleep(after_s)
        self.result.injected[fault.name] += 1
        self._checks.append((fault.name, await fault.inject(world)))

    def _count_verified(self, world: World) -> Counter[str]:
        verified = Counter(name for name, took_place in self._checks if took_place())
        if self._skewed:
            self.result.injected[SKEW] = 1
            verified[SKEW] += world.network.num_skewed > 0
        if self._scarce:
            self.result.injected[EXHAUSTION] = 1
            preempted = any(life.worker.engine.num_preemptions for life in world.lives)
            verified[EXHAUSTION] += preempted or world.network.num_refused > 0
        return +verified

    def _heal(self, world: World) -> None:
        """No fault outlives its wave."""
        for node in world.loop.nodes:
            if not node.dead:
                assert node.running, f"{node.name} is frozen"

    async def _tick(self, world: World) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            world.replace_unhealthy()
            world.check_overdue()
            self._check_workers(world)

    def _check_workers(self, world: World) -> None:
        for process in world.platform.processes:
            if process.node.running:
                process.watch.check_all(world.now + process.node.offset)

    def _check_end(self, world: World, client: SimClient) -> None:
        """No request is lost but for a good reason."""
        good = client.end in (End.COMPLETE, End.LEFT, End.GATEWAY_DIED)
        limit_s = client.timeout_s
        if client.end is not End.LATE:
            limit_s = min(limit_s, world.platform.options.gateway.queue_timeout_s)
        if isinstance(client.error, DeadlineExceeded | Overloaded | Unavailable):
            good = client.num_seconds >= limit_s - 0.002
        elif client.end is End.POISONED:
            good = world.num_worker_losses >= MIN_LOSSES_OF_POISON
        if not good:
            message = client.error.message if client.error else "nothing said"
            raise AssertionError(f"{client.name} was lost ({client.end}): {message}")

    async def _rest(self, world: World) -> None:
        """Workers and gateways hold nothing any more. I7."""

        def at_rest() -> bool:
            return all(process.watch.at_rest for process in world.platform.processes) and all(
                world.at_rest(gateway) for gateway in world.platform.gateways
            )

        limit = world.now + REST_S
        while not at_rest() and world.now < limit:
            await asyncio.sleep(TICK_S)
            world.replace_unhealthy()
        self._check_workers(world)
        for process in world.platform.processes:
            if not process.watch.at_rest:
                raise AssertionError(
                    f"I7: {process.node.name} holds {process.watch.what_is_held()}"
                )
        for gateway in world.platform.gateways:
            if not world.at_rest(gateway):
                raise AssertionError(f"I7: {gateway.node.name}: {world.in_flight(gateway)}")
        await self._check_indexes(world)

    async def _check_indexes(self, world: World) -> None:
        """Whatever became of Redis and of events: gateways know in the end what workers hold."""
        limit = world.now + REST_S
        while True:
            running = [p for p in world.platform.processes if p.node.running]
            found = [disagreement(gateway, running) for gateway in world.platform.gateways]
            wrong = [text for text in found if text]
            if not wrong:
                return
            if world.now >= limit:
                raise AssertionError(wrong[0])
            await asyncio.sleep(TICK_S)


def simulate(seed: int, *, timeline: bool = False) -> SeedResult:
    """Runs one seed. The same seed gives the same timeline everywhere; a failure is in `error`."""
    lines = Timeline(timeline)
    scenario = Scenario(seed, lines)
    loop = SimLoop(MAX_EVENTS)
    verdict = Verdict(loop, lines)
    loop.set_exception_handler(verdict.on_loop_error)
    root = logging.getLogger("forebay")
    level, propagate = root.level, root.propagate
    root.setLevel(verdict.level)
    root.addHandler(verdict)
    root.propagate = False
    gc.disable()
    try:
        run(scenario.main(verdict), loop)
    except Exception as error:
        verdict.report(error)
    finally:
        gc.enable()
        root.removeHandler(verdict)
        root.setLevel(level)
        root.propagate = propagate
    if verdict.error is not None:
        scenario.result.error = f"{type(verdict.error).__name__}: {verdict.error}"
    return scenario.result
