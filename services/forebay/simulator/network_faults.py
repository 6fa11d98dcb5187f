"""Faults of the network, of single messages, and of Redis."""

from __future__ import annotations

import asyncio
from functools import partial

from forebay.core.roles import WorkerRole
from forebay.simulator.fabric import Link
from forebay.simulator.faults import FaultKind, Verified, not_seen, verified
from forebay.simulator.loop import Node
from forebay.simulator.tampering import ArmedKvFault, KvFault, LostAnswer, Replay
from forebay.simulator.world import World

ANSWERS = ("Reserve", "Prefill", "Abort", "Push", "SendPrefix")
REPEATED = ("Reserve", "Prefill", "Abort", "Push", "Push", "SendPrefix")


def _gateway_and_worker(world: World) -> tuple[Node, Node] | None:
    gateways = [g.node for g in world.platform.gateways if g.node.running]
    workers = [p.node for p in world.platform.processes if p.node.running]
    if not gateways or not workers:
        return None
    return world.dice.pick(gateways), world.dice.pick(workers)


def _two_pools(world: World) -> tuple[Node, Node] | None:
    prefills, decodes = world.workers(WorkerRole.PREFILL), world.workers(WorkerRole.DECODE)
    if not prefills or not decodes:
        return None
    return world.dice.pick(prefills).node, world.dice.pick(decodes).node


async def slow_link(world: World) -> Verified:
    pick = _two_pools if world.dice.chance(0.6) else _gateway_and_worker
    ends = pick(world)
    if ends is None:
        return not_seen
    link = world.network.link(*ends)
    link.extra_s = world.dice.between(0.05, 0.5)
    world.note(f"FAULT: {ends[0].name} - {ends[1].name} is slow by {link.extra_s:.3f} s")
    num_before = link.num_slowed
    await world.sleep(0.4, 1.5)
    link.extra_s = 0.0
    return verified(link.num_slowed > num_before)


async def cut_gateway(world: World) -> Verified:
    return await _cut(world, _gateway_and_worker(world))


async def cut_pools(world: World) -> Verified:
    return await _cut(world, _two_pools(world))


async def _cut(world: World, ends: tuple[Node, Node] | None) -> Verified:
    if ends is None or world.network.link(*ends).is_cut:
        return not_seen
    world.num_worker_losses += 1
    seconds = world.dice.between(0.2, 3.0)
    world.note(f"FAULT: {ends[0].name} - {ends[1].name} is cut for {seconds:.3f} s")
    link: Link = world.network.cut(*ends)
    num_before = link.num_held + link.num_broken
    await asyncio.sleep(seconds)
    world.note(f"{ends[0].name} - {ends[1].name} is whole again")
    world.network.heal(link)
    return verified(link.num_held + link.num_broken > num_before)


async def tamper_with_kv(kind: KvFault, world: World) -> Verified:
    fault = ArmedKvFault(
        kind,
        commit=world.dice.chance(0.3),
        skip=world.dice.below(4),
        late_s=world.dice.between(0.05, 3.0),
    )
    world.network.tampering.arm(fault)
    await world.until(lambda: fault.num_hit > 0, 0.5)
    return lambda: fault.num_hit > 0


async def lose_answer(world: World) -> Verified:
    fault = LostAnswer(world.dice.pick(ANSWERS), silent=world.dice.chance(0.3))
    world.network.tampering.arm(fault)
    await world.until(lambda: fault.num_hit > 0, 0.5)
    return lambda: fault.num_hit > 0


async def repeat_call(world: World) -> Verified:
    fault = Replay(world.dice.pick(REPEATED), late_s=world.dice.between(0, 0.5))
    world.network.tampering.arm(fault)
    await world.until(lambda: fault.num_hit > 0, 1.0)
    return lambda: fault.num_hit > 0


async def reset_stream(world: World) -> Verified:
    """A single step stream breaks; both processes and their other calls live on."""
    ends = _gateway_and_worker(world)
    if ends is None:
        return not_seen
    calls = world.network.calls_between(*ends, "Steps")
    for call in calls:
        world.note(f"FAULT: the step stream of {ends[0].name} to {ends[1].name} is reset")
        world.network.break_call(call, "the stream was reset")
    return verified(bool(calls))


def _num_redis_failures(world: World) -> int:
    registries = [g.registry for g in world.platform.gateways]
    registries += [p.registry for p in world.platform.processes]
    return sum(registry.num_failures for registry in registries)


async def lose_redis(world: World) -> Verified:
    redis = world.platform.redis
    if not redis.node.running:
        return not_seen
    num_before = _num_redis_failures(world)
    world.note("FAULT: Redis is killed")
    world.platform.kill(redis.node)
    await world.sleep(0.6, 2.5)
    num_failures = _num_redis_failures(world) - num_before
    world.note("Redis starts, empty")
    world.platform.start_redis()
    return verified(num_failures > 0)


async def freeze_redis(world: World) -> Verified:
    node = world.platform.redis.node
    if not node.running:
        return not_seen
    num_held = await world.freeze(node, world.dice.between(0.3, 3.0))
    if not node.dead:
        world.loop.thaw(node)
    return verified(num_held > 0)


async def flush_redis(world: World) -> Verified:
    num_records = world.platform.redis.redis.flush()
    world.note(f"FAULT: Redis forgets {num_records} records")
    return verified(num_records > 0)


async def drop_kv_events(world: World) -> Verified:
    """Redis says that it has taken them, and nobody ever reads them."""
    streams = world.platform.redis.redis.kv_streams
    num_doomed = streams.num_doomed = 1 + world.dice.below(4)
    world.note(f"FAULT: {num_doomed} batches of KV events will vanish")
    await world.until(lambda: streams.num_doomed == 0, 3.0)
    num_vanished = num_doomed - streams.num_doomed
    streams.num_doomed = 0
    return verified(num_vanished > 0)


async def slow_redis(world: World) -> Verified:
    redis = world.platform.redis.node
    others = [g.node for g in world.platform.gateways] + [p.node for p in world.platform.processes]
    links = [world.network.link(redis, node) for node in others]
    extra_s = world.dice.between(0.2, 2.5)
    world.note(f"FAULT: Redis is slow by {extra_s:.3f} s")
    for link in links:
        link.extra_s = extra_s
    num_before = sum(link.num_slowed for link in links)
    await world.sleep(0.6, 2.0)
    for link in links:
        link.extra_s = 0.0
    return verified(sum(link.num_slowed for link in links) > num_before)


KINDS = (
    FaultKind("slow link", slow_link),
    FaultKind("cut gateway - worker", cut_gateway),
    FaultKind("cut between the pools", cut_pools),
    *(FaultKind(f"KV message {kind}", partial(tamper_with_kv, kind)) for kind in KvFault),
    FaultKind("lost answer", lose_answer),
    FaultKind("repeated call", repeat_call),
    FaultKind("reset step stream", reset_stream),
    FaultKind("Redis lost", lose_redis),
    FaultKind("Redis frozen", freeze_redis),
    FaultKind("Redis flushed", flush_redis),
    FaultKind("Redis slow", slow_redis),
    FaultKind("KV events dropped", drop_kv_events),
)
