"""Faults in the middle of a pull: of KV on its way from one worker's prefix cache to another's."""

from __future__ import annotations

import asyncio

from forebay.simulator.faults import FaultKind, Verified, not_seen, verified
from forebay.simulator.processes import WorkerProcess
from forebay.simulator.world import World

_POLL_S = 0.004
"""A pull lasts a few messages."""
_SOON_S = 0.6


async def _pull_under_way(world: World) -> tuple[WorkerProcess, WorkerProcess] | None:
    """Who fetches and who is asked, of some pull, once there is one, and a random moment later."""
    limit = world.now + _SOON_S
    while world.now < limit:
        await asyncio.sleep(_POLL_S)
        running = [p for p in world.platform.processes if p.node.running and not p.stopping]
        by_address = {process.address: process for process in running}
        for puller in running:
            for address in puller.worker._traffic.pulls.sources:
                if address in by_address:
                    await world.sleep(0, 4 * world.platform.options.latency_s)
                    return puller, by_address[address]
    return None


async def crash_puller(world: World) -> Verified:
    ends = await _pull_under_way(world)
    return not_seen if ends is None else await _crash(world, ends[0])


async def crash_source(world: World) -> Verified:
    ends = await _pull_under_way(world)
    return not_seen if ends is None else await _crash(world, ends[1])


async def _crash(world: World, process: WorkerProcess) -> Verified:
    if not process.node.running or process.stopping:
        return not_seen
    num_broken = world.kill_worker(process)
    await world.sleep(0.05, 0.8)
    world.start_worker(process)
    return verified(num_broken > 0)


async def freeze_source(world: World) -> Verified:
    ends = await _pull_under_way(world)
    if ends is None or not ends[1].node.running:
        return not_seen
    world.num_worker_losses += 1
    node = ends[1].node
    num_held = await world.freeze(node, world.dice.between(0.1, 3.0))
    if not node.dead:
        world.loop.thaw(node)
    return verified(num_held > 0)


async def cut_pull(world: World) -> Verified:
    ends = await _pull_under_way(world)
    if ends is None or world.network.link(ends[0].node, ends[1].node).is_cut:
        return not_seen
    puller, source = ends
    seconds = world.dice.between(0.2, 3.0)
    world.num_worker_losses += 1
    world.note(f"FAULT: {puller.node.name} - {source.node.name} is cut for {seconds:.3f} s")
    link = world.network.cut(puller.node, source.node)
    num_before = link.num_held + link.num_broken
    await asyncio.sleep(seconds)
    world.network.heal(link)
    return verified(link.num_held + link.num_broken > num_before)


KINDS = (
    FaultKind("crash while pulling", crash_puller),
    FaultKind("crash of a pull's source", crash_source),
    FaultKind("hang of a pull's source", freeze_source),
    FaultKind("cut in a pull", cut_pull),
)
