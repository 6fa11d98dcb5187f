"""Clients that leave, at every phase of their request."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial

from forebay.core.roles import WorkerRole
from forebay.simulator.client import End, Phase, SimClient
from forebay.simulator.faults import FaultKind, Verified, verified
from forebay.simulator.workload import kinds
from forebay.simulator.world import PATIENCE_S, World

_FINE_POLL_S = 0.001
_PATIENCE_S = 0.8


async def _watched_client(world: World) -> SimClient:
    """Greedy, so that the seed it is known by does not change its answer. It reads with short
    pauses: events that come together would leave no time to go between them."""
    fitting = [
        kind
        for kind in kinds()
        if kind.params.greedy and kind.params.n == 1 and kind.params.max_tokens > 5
    ]
    return await world.start_client(world.dice.pick(fitting), PATIENCE_S, 0.002)


async def _wait(client: SimClient, world: World, condition: Callable[[], bool]) -> bool:
    limit = world.now + _PATIENCE_S
    while not condition():
        if client.end is not None or world.now > limit:
            return False
        await asyncio.sleep(_FINE_POLL_S)
    return True


async def leave_queued(world: World, client: SimClient) -> bool:
    await asyncio.sleep(world.dice.between(0, 0.001))
    return client.phase is Phase.QUEUED


async def leave_at(phase: Phase, world: World, client: SimClient) -> bool:
    """In the very moment that the phase begins."""
    reached = False

    def watch(changed: SimClient) -> None:
        nonlocal reached
        if changed is client and client.phase is phase and client.end is None and not reached:
            reached = True
            world.loop.call_soon(client.leave)

    world.watchers.append(watch)
    await _wait(client, world, lambda: reached)
    world.watchers.remove(watch)
    return reached


async def leave_in_prefill(world: World, client: SimClient) -> bool:
    def computing() -> bool:
        process = world.holder_of(client, WorkerRole.PREFILL)
        return process is not None and world.is_computing(client, process)

    return await _wait(client, world, computing)


async def leave_in_transfer(world: World, client: SimClient) -> bool:
    """While a frame of it is being written on the decode worker."""

    def moving() -> bool:
        return any(
            lease.num_writes and request.start.params.seed == client.number
            for process in world.workers(WorkerRole.DECODE)
            for request in process.worker._requests
            for lease in process.worker.leases._leases.values()
            if lease.owner == request.key
        )

    return await _wait(client, world, moving)


async def leave(when: Callable[[World, SimClient], Awaitable[bool]], world: World) -> Verified:
    client = await _watched_client(world)
    reached = await when(world, client)
    world.note(f"FAULT: {client.name} leaves ({client.phase})")
    client.leave()
    await world.until(lambda: client.end is not None, 1.0)
    return verified(reached and client.end is End.LEFT)


KINDS = (
    FaultKind("client gone: queued", partial(leave, leave_queued)),
    FaultKind("client gone: placed", partial(leave, partial(leave_at, Phase.PLACED))),
    FaultKind("client gone: prefill", partial(leave, leave_in_prefill)),
    FaultKind("client gone: transfer", partial(leave, leave_in_transfer)),
    FaultKind("client gone: first token", partial(leave, partial(leave_at, Phase.FIRST_TOKEN))),
    FaultKind("client gone: decode", partial(leave, partial(leave_at, Phase.DECODE))),
    FaultKind("client gone: last token", partial(leave, partial(leave_at, Phase.LAST_TOKEN))),
)
