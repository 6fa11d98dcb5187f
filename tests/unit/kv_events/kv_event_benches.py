"""A Redis that fails on demand, pools that change on demand, and a look into the index."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

from forebay.core.errors import Unavailable
from forebay.gateway.kv_follower import KvFollower
from forebay.kv.block_pool import BlockPool, Holder
from forebay.router.index import KvIndex
from forebay.rpc.connector import Method
from forebay.rpc.v1 import kv_events_pb2
from forebay.simulator.kv_events import SimKvEventSink, SimKvEventSource, SimKvStreams
from forebay.simulator.loop import run
from forebay.simulator.redis_client import LocalRedisClient
from forebay.worker.kv_publisher import KvPublisher

EPOCH = "epoch"
INTERVAL_S = 0.05
HEARTBEAT_S = 1.0
STALE_S = 2.0


def in_virtual_time(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    run(main())


def block_hash(number: int) -> bytes:
    return (number + 1).to_bytes(2, "little") * 8


class FaultyRedis:
    """is_down: calls fail. num_lost_answers: that many calls fail after they took effect. delay_s:
    before every call takes effect. after_append: called before anybody can read what was appended.
    calls: their names."""

    def __init__(self) -> None:
        self.streams = SimKvStreams()
        self.is_down = False
        self.num_lost_answers = 0
        self.delay_s = 0.0
        self.after_append: Callable[[], object] | None = None
        self.calls: list[str] = []

    async def call(self, method: Method[Any, Any], message: Any, wait_s: float = 0.0) -> Any:
        self.calls.append(method.name)
        if self.delay_s:
            await asyncio.sleep(self.delay_s)
        if self.is_down:
            raise Unavailable("Redis: down")
        answer = await LocalRedisClient(self.streams.routes()).call(method, message, wait_s)
        if method.name == "KvAppend" and self.after_append is not None:
            self.after_append()
        if self.num_lost_answers and method.name != "KvRead":
            self.num_lost_answers -= 1
            raise Unavailable("Redis: the answer was lost")
        return answer

    async def close(self) -> None:
        pass

    def drop(self, worker_id: str, seq: int, epoch: str = EPOCH) -> int:
        return self.streams.drop_entries((worker_id, epoch), lambda entry: entry.seq == seq)

    def saved(self) -> SimKvStreams:
        """What a replica has of it now."""
        twin = SimKvStreams()
        twin._streams = copy.deepcopy(self.streams._streams)
        twin._snapshots = dict(self.streams._snapshots)
        twin._wanted = dict(self.streams._wanted)
        return twin

    def batches(self, worker_id: str) -> list[kv_events_pb2.KvEventBatch]:
        """Of the worker's stream; None stands for a mark."""
        stream = self.streams._streams.get((worker_id, EPOCH))
        entries = stream.entries if stream else []
        return [kv_events_pb2.KvEventBatch.FromString(entry.batch) for entry in entries]

    def snapshot(self, worker_id: str) -> tuple[int, set[bytes]] | None:
        known = self.streams._snapshots.get((worker_id, EPOCH))
        if known is None:
            return None
        message = kv_events_pb2.KvSnapshot.FromString(known[1])
        return message.seq, {h for tier in message.tiers for h in split(tier.hashes)}


def split(hashes: bytes) -> list[bytes]:
    return [hashes[i : i + 16] for i in range(0, len(hashes), 16)]


class PublishingWorker:
    """A pool and its publisher."""

    def __init__(
        self, redis: FaultyRedis, worker_id: str = "w", num_blocks: int = 32, epoch: str = EPOCH
    ) -> None:
        self.worker_id = worker_id
        self.epoch = epoch
        self.pool = BlockPool(num_blocks, 16)
        self.publisher = KvPublisher(
            self.pool,
            SimKvEventSink(redis, worker_id, epoch),
            interval_s=INTERVAL_S,
            heartbeat_s=HEARTBEAT_S,
        )

    def store(self, *numbers: int) -> None:
        """Blocks with these contents become findable; the oldest go when there is no room."""
        for number in numbers:
            (block,) = self.pool.allocate(1, Holder.SEQUENCE)
            self.pool.register(block, block_hash(number))
            self.pool.release([block], Holder.SEQUENCE)

    def evict(self, count: int) -> None:
        """Through need of room: what is free goes first."""
        num_free = self.pool.counts().free
        blocks = self.pool.allocate(min(num_free + count, self.pool.num_available), Holder.LEASE)
        self.pool.release(blocks, Holder.LEASE)


class FollowingGateway:
    def __init__(self, redis: FaultyRedis) -> None:
        self.index = KvIndex(1 << 20)
        self.follower = KvFollower(SimKvEventSource(redis), self.index, stale_s=STALE_S)

    def hears(self, *workers: PublishingWorker) -> None:
        """Over their step streams."""
        for worker in workers:
            self.follower.told(worker.worker_id, worker.epoch, worker.publisher.seq)

    def follow(self, *workers: PublishingWorker) -> None:
        self.follower.follow([(worker.worker_id, worker.epoch) for worker in workers])
        self.hears(*workers)

    def knows(self, worker: PublishingWorker, max_number: int = 256) -> set[int]:
        slot = self.index.slot_of(worker.worker_id)
        if slot is None:
            return set()
        found = (self.index.match([block_hash(n)]).num_blocks[slot] for n in range(max_number))
        return {number for number, count in enumerate(found) if count}


def held(worker: PublishingWorker) -> set[int]:
    return {int.from_bytes(h[:2], "little") - 1 for h in worker.pool.hashes()}


@asynccontextmanager
async def running(*tasks: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    started = [asyncio.create_task(task) for task in tasks]
    try:
        yield
    finally:
        for task in started:
            assert not task.done()
            task.cancel()
        await asyncio.gather(*started, return_exceptions=True)
