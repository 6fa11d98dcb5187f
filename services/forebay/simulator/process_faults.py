"""Faults of processes: killed, frozen, stuck, drained, replaced by another version."""

from __future__ import annotations

import asyncio
from functools import partial

from forebay.core.roles import WorkerRole
from forebay.rpc.methods import PROTOCOL_VERSION
from forebay.simulator.executor import SimExecutor
from forebay.simulator.faults import FaultKind, Verified, not_seen, verified
from forebay.simulator.processes import GatewayProcess, WorkerProcess
from forebay.simulator.world import World

POOLS = (WorkerRole.PREFILL, WorkerRole.DECODE)
_MAX_ROUNDS = 6


async def crash_worker(role: WorkerRole, world: World) -> Verified:
    process = await world.busy_worker(role)
    if process is None:
        return not_seen
    num_requests = world.num_requests(process)
    num_broken = world.kill_worker(process)
    await world.sleep(0.05, 0.8)
    world.start_worker(process)
    return verified(num_broken > 0 and num_requests > 0)


async def hang_worker(role: WorkerRole, comes_back: bool, world: World) -> Verified:
    """Stopped, and then either continued or killed and replaced."""
    process = await world.busy_worker(role)
    if process is None:
        return not_seen
    world.num_worker_losses += 1
    num_held = await world.freeze(process.node, world.dice.between(0.1, 3.0))
    if process.node.dead:
        return not_seen
    if comes_back:
        world.note(f"{process.node.name} goes on")
        world.loop.thaw(process.node)
    else:
        world.kill_worker(process)
        world.start_worker(process)
    return verified(num_held > 0)


async def stick_step(world: World) -> Verified:
    """A step that outlives its limit: the worker says so, and is replaced."""
    process = await world.busy_worker(world.dice.pick(POOLS))
    if process is None or not isinstance(process.executor, SimExecutor):
        return not_seen
    executor = process.executor
    limit_s = world.platform.options.worker.step_timeout_s
    executor.stall_s = limit_s * world.dice.between(1.5, 3)
    world.note(f"FAULT: {process.node.name} will be stuck for {executor.stall_s:.3f} s")
    took_place = await world.until(lambda: executor.num_stalls > 0, 1.0)
    if not took_place:
        executor.stall_s = 0.0
        return not_seen
    world.num_worker_losses += 1
    return verified(await world.until(lambda: process.unhealthy, 2 * limit_s + 2))


async def drain_worker(world: World) -> Verified:
    """Scale-down, and up again later."""
    process = await world.busy_worker(world.dice.pick(POOLS))
    if process is None:
        return not_seen
    num_requests = world.num_requests(process)
    await _stop(world, process, world.dice.between(0, 1.0))
    await world.sleep(0.1, 0.5)
    if process.over:
        world.start_worker(process, anew=True)
    return verified(process.over and num_requests > 0)


async def roll_update(world: World) -> Verified:
    """To the next version, worker by worker, a new one before an old one goes: both pools wholly,
    or one worker of each for the time being."""
    version = PROTOCOL_VERSION + 1
    fresh: list[WorkerProcess] = []

    def old(role: WorkerRole) -> list[WorkerProcess]:
        return [
            process
            for process in world.platform.processes
            if process.role is role and process.protocol_version != version and not process.stopping
        ]

    for _ in range(_MAX_ROUNDS if world.dice.chance(0.5) else 1):
        for role in POOLS:
            for process in old(role)[:1]:
                fresh.append(world.start_worker(process, version=version, anew=True))
                await world.sleep(0.4, 0.7)
                await world.until(partial(_runs_or_is_dead, process), 10)
                if process.node.running and not process.stopping:
                    await _stop(world, process, world.dice.between(0, 0.5))
        await world.start_some_client()
        await world.start_some_client()
    await world.sleep(0.2, 0.4)
    return verified(any(process.worker._requests.num_accepted for process in fresh))


def _runs_or_is_dead(process: WorkerProcess) -> bool:
    return process.node.running or process.node.dead


async def crash_gateway(world: World) -> Verified:
    gateway = await _busy_gateway(world)
    if gateway is None:
        return not_seen
    number = world.platform.gateways.index(gateway)
    num_clients = len(world.active_clients(gateway))
    world.kill_gateway(gateway)
    await world.sleep(0.1, 0.6)
    world.platform.start_gateway(number)
    return verified(num_clients > 0)


async def hang_gateway(world: World) -> Verified:
    gateway = await _busy_gateway(world)
    if gateway is None:
        return not_seen
    num_held = await world.freeze(gateway.node, world.dice.between(0.1, 3.0))
    world.note(f"{gateway.node.name} goes on")
    world.loop.thaw(gateway.node)
    return verified(num_held > 0)


async def drain_gateway(world: World) -> Verified:
    """No new clients; ends once the last one has its answer."""
    gateway = await _busy_gateway(world)
    if gateway is None or sum(not g.stopping for g in world.platform.gateways) < 2:
        return not_seen
    number = world.platform.gateways.index(gateway)
    num_clients = len(world.active_clients(gateway))
    world.note(f"FAULT: {gateway.node.name} drains with {num_clients} clients")
    gateway.stopping = True
    await world.until(lambda: not world.active_clients(gateway), 60.0)
    stopping = world.loop.spawn(gateway.node, gateway.service.stop())
    await asyncio.wait((stopping,), timeout=10.0)
    if not stopping.done():
        world.verdict.report(AssertionError("I6: a gateway that drained does not stop"))
    world.platform.kill(gateway.node)
    world.platform.start_gateway(number)
    return verified(num_clients > 0)


async def _busy_gateway(world: World) -> GatewayProcess | None:
    def busy() -> list[GatewayProcess]:
        return [
            gateway
            for gateway in world.platform.gateways
            if gateway.node.running and not gateway.stopping and world.active_clients(gateway)
        ]

    await world.until(lambda: bool(busy()), 0.4)
    return world.dice.pick(found) if (found := busy()) else None


async def _stop(world: World, process: WorkerProcess, grace_s: float) -> None:
    """Returns when the process has ended, in order or by another fault."""
    num_requests = world.num_requests(process)
    world.note(
        f"FAULT: {process.node.name} drains for {grace_s:.3f} s with {num_requests} requests"
    )
    process.stopping = True
    world.loop.spawn(process.node, process.stop(grace_s))
    await world.until(lambda: process.over or process.node.dead, grace_s + 30)
    if process.over:
        world.note(f"{process.node.name} has ended")
        world.platform.forget(process)
    elif not process.node.dead:
        world.verdict.report(AssertionError(f"I6: {process.node.name} drains without an end"))


KINDS = (
    FaultKind("crash prefill", partial(crash_worker, WorkerRole.PREFILL)),
    FaultKind("crash decode", partial(crash_worker, WorkerRole.DECODE)),
    FaultKind("crash gateway", crash_gateway),
    FaultKind("hang prefill", partial(hang_worker, WorkerRole.PREFILL, False)),
    FaultKind("hang decode", partial(hang_worker, WorkerRole.DECODE, False)),
    FaultKind("hang and thaw prefill", partial(hang_worker, WorkerRole.PREFILL, True)),
    FaultKind("hang and thaw decode", partial(hang_worker, WorkerRole.DECODE, True)),
    FaultKind("hang and thaw gateway", hang_gateway),
    FaultKind("stuck step", stick_step),
    FaultKind("drain worker", drain_worker),
    FaultKind("drain gateway", drain_gateway),
    FaultKind("rolling update", roll_update),
)
