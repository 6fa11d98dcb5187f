"""What a decision costs a gateway: the router as it runs there, its index filled from snapshots of
workers, through streams in memory."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence

from forebay.core.roles import WorkerRole
from forebay.core.settings import GatewaySettings
from forebay.gateway.router import Router
from forebay.router.view import RouteRequest, WorkerFacts, WorkerLoad
from forebay.rpc.v1 import kv_events_pb2
from forebay.simulator.kv_events import SimKvEventSink, SimKvEventSource, SimKvStreams
from forebay.simulator.redis_client import LocalRedisClient
from forebay.simulator.registry import MemoryRegistry
from forebay.store.kv_events import KvEntry, KvSnapshotWrite
from forebay_loadtest.routing.call_times import CallTimes

BLOCK_TOKENS = 64
_MODEL = "model"
_NUM_PROMPTS = 50
_NUM_SHARED = 8
_NUM_CALLS = 3000
_TTL_S = 3600.0
_POLL_S = 0.05


def decision_times(rng: random.Random, num_workers: int, num_blocks: int) -> dict[str, object]:
    """Of prompts of `num_blocks`, which begin alike, over prefill and decode workers in equal
    numbers; each worker has leading parts of five of the prompts."""
    return asyncio.run(_measure(rng, num_workers, num_blocks))


async def _measure(rng: random.Random, num_workers: int, num_blocks: int) -> dict[str, object]:
    shared = [rng.randbytes(16) for _ in range(_NUM_SHARED)]
    prompts = [
        [*shared, *(rng.randbytes(16) for _ in range(num_blocks - _NUM_SHARED))]
        for _ in range(_NUM_PROMPTS)
    ]
    client = LocalRedisClient(SimKvStreams().routes())
    router = Router(GatewaySettings(), MemoryRegistry(), SimKvEventSource(client), "gateway")
    lives = [(f"worker-{number}", "epoch") for number in range(num_workers)]
    for number, (worker_id, epoch) in enumerate(lives):
        held = _parts(rng, prompts)
        await _publish(SimKvEventSink(client, worker_id, epoch), held)
        role = (WorkerRole.PREFILL, WorkerRole.DECODE)[number % 2]
        router.join(WorkerFacts(worker_id, role, _MODEL, "kv", BLOCK_TOKENS))
        load = _load(rng)
        router.changed(worker_id, lambda load=load: load)  # type: ignore[misc]
    router.follow(lives)
    following = asyncio.create_task(router.follower.run())
    while not all(router.follower.is_fresh(worker_id) for worker_id, _ in lives):
        await asyncio.sleep(_POLL_S)
    router.follow(lives)
    times = await _decide(router, prompts)
    following.cancel()
    await asyncio.gather(following, return_exceptions=True)
    await router.close()
    return times


async def _decide(router: Router, prompts: Sequence[list[bytes]]) -> dict[str, object]:
    times = CallTimes()
    num_cached = 0
    for number in range(_NUM_CALLS):
        hashes = [bytes(bytearray(h)) for h in prompts[number % len(prompts)]]
        request = RouteRequest(f"{number}", _MODEL, len(hashes) * BLOCK_TOKENS + 1, hashes)
        decision = times.call(lambda r=request: router.choose(r))  # type: ignore[misc]
        assert decision is not None
        num_cached += bool(decision.matched)
        await asyncio.sleep(0)
    assert num_cached == _NUM_CALLS, "the index finds nothing"
    return dict(times.as_json())


def _parts(rng: random.Random, prompts: Sequence[list[bytes]]) -> list[bytes]:
    parts = (prompt[: rng.randint(_NUM_SHARED, len(prompt))] for prompt in rng.sample(prompts, 5))
    return list(dict.fromkeys(block for part in parts for block in part))


async def _publish(sink: SimKvEventSink, held: Sequence[bytes]) -> None:
    blocks = kv_events_pb2.KvTierBlocks(tier=kv_events_pb2.KV_TIER_DEVICE, hashes=b"".join(held))
    snapshot = kv_events_pb2.KvSnapshot(seq=0, tiers=[blocks])
    write = KvSnapshotWrite(snapshot.SerializeToString(), seq=0, keep_after=0)
    await sink.restart([KvEntry(0, b"")], write, _TTL_S)


def _load(rng: random.Random) -> WorkerLoad:
    return WorkerLoad(
        num_sequences=rng.randrange(20),
        num_queued_tokens=rng.randrange(3000),
        prefill_room_tokens=1024,
        kv_usage=rng.random(),
    )
