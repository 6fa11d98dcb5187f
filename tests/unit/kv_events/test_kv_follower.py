from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from kv_event_benches import (
    EPOCH,
    HEARTBEAT_S,
    STALE_S,
    FaultyRedis,
    FollowingGateway,
    PublishingWorker,
    held,
    in_virtual_time,
    running,
)

from forebay.gateway import kv_follower
from forebay.rpc.v1 import kv_events_pb2
from forebay.store.kv_events import KvEntry, KvSnapshotWrite
from forebay.worker import kv_publisher

LAG_S = 0.15
"""Enough for a change to be published and read."""
HEALED_S = 2.5
"""Enough for a wish to be seen, answered and read."""


class Bench:
    """Some workers, one gateway, and the Redis between them."""

    def __init__(self, num_workers: int = 1, num_blocks: int = 32) -> None:
        self.redis = FaultyRedis()
        self.workers = [
            PublishingWorker(self.redis, f"w{number}", num_blocks) for number in range(num_workers)
        ]
        self.gateway = FollowingGateway(self.redis)
        self.follower = self.gateway.follower

    @property
    def worker(self) -> PublishingWorker:
        return self.workers[0]

    @asynccontextmanager
    async def started(self) -> AsyncIterator[None]:
        self.gateway.follow(*self.workers)
        publishers = [worker.publisher.run() for worker in self.workers]
        async with running(*publishers, self.follower.run(), self._hear()):
            await asyncio.sleep(LAG_S)
            self.check()
            yield

    async def _hear(self) -> None:
        while True:
            self.gateway.hears(*self.workers)
            await asyncio.sleep(0.05)

    def in_step(self) -> bool:
        return all(self.gateway.knows(worker) == held(worker) for worker in self.workers)

    def check(self) -> None:
        for worker in self.workers:
            assert self.gateway.knows(worker) == held(worker)
            assert self.follower.is_fresh(worker.worker_id)
        assert not self.follower.degraded


def test_what_workers_hold_is_known_soon() -> None:
    async def main() -> None:
        bench = Bench(num_workers=3, num_blocks=8)
        async with bench.started():
            for number in range(60):
                for factor, worker in enumerate(bench.workers, start=1):
                    worker.store(number * factor % 50)
                await asyncio.sleep(0.02)
            await asyncio.sleep(LAG_S)
            bench.check()
            assert bench.follower.num_gaps == 0
            assert bench.follower.num_resyncs == 0
            assert bench.follower.staleness_s == 0

    in_virtual_time(main)


def test_a_gateway_that_comes_late_begins_with_the_snapshot() -> None:
    async def main() -> None:
        redis = FaultyRedis()
        worker = PublishingWorker(redis)
        worker.store(*range(20))
        async with running(worker.publisher.run()):
            await asyncio.sleep(0.2)
            worker.store(30)
            await asyncio.sleep(0.2)
            gateway = FollowingGateway(redis)
            gateway.follow(worker)
            assert not gateway.follower.is_fresh("w")
            assert gateway.follower.degraded
            async with running(gateway.follower.run()):
                await asyncio.sleep(LAG_S)
                assert gateway.knows(worker) == {*range(20), 30}
                assert gateway.follower.is_fresh("w")
                assert gateway.follower.num_resyncs == 0

    in_virtual_time(main)


def test_predictions_have_a_slot_before_anything_is_known() -> None:
    async def main() -> None:
        bench = Bench()
        bench.gateway.follow(bench.worker)
        assert bench.gateway.index.slot_of("w0") is not None

    in_virtual_time(main)


@pytest.mark.parametrize("is_last", [False, True])
def test_a_batch_that_was_dropped_is_made_good(is_last: bool) -> None:
    """In the middle the next one shows it; of the last one only the worker itself tells."""

    async def main() -> None:
        bench = Bench()
        async with bench.started():
            bench.worker.store(1)
            await asyncio.sleep(LAG_S)
            dropped = []
            bench.redis.after_append = lambda: dropped.append(bench.redis.drop("w0", 2))
            bench.worker.store(2)
            await asyncio.sleep(0.1)
            assert dropped == [1]
            if not is_last:
                bench.worker.store(3)
            await asyncio.sleep(LAG_S)
            assert not bench.in_step()
            await asyncio.sleep(HEALED_S + HEARTBEAT_S)
            bench.check()
            assert bench.follower.num_gaps == (not is_last)
            assert bench.follower.num_resyncs == 1

    in_virtual_time(main)


def test_a_stream_that_was_trimmed_ends_in_a_snapshot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_publisher, "SNAPSHOT_BLOCKS", 4)

    async def main() -> None:
        bench = Bench(num_blocks=4)
        async with bench.started():
            reads = bench.follower._source.read

            async def slow_read(*args: object) -> object:
                await asyncio.sleep(3)
                return await reads(*args)  # type: ignore[arg-type]

            bench.follower._source.read = slow_read  # type: ignore
            for number in range(100):
                bench.worker.store(number)
                await asyncio.sleep(0.1)
            bench.follower._source.read = reads  # type: ignore[method-assign]
            await asyncio.sleep(HEALED_S)
            bench.check()
            assert bench.follower.num_gaps > 0

    in_virtual_time(main)


def test_a_flush_needs_no_snapshot_where_all_had_been_read() -> None:
    async def main() -> None:
        bench = Bench()
        async with bench.started():
            bench.worker.store(1, 2)
            await asyncio.sleep(LAG_S)
            bench.redis.streams.flush()
            bench.worker.store(3)
            await asyncio.sleep(LAG_S)
            bench.check()
            bench.redis.streams.flush()
            await asyncio.sleep(HEARTBEAT_S * 1.5)
            bench.worker.store(4)
            await asyncio.sleep(LAG_S)
            bench.check()
            assert (bench.follower.num_gaps, bench.follower.num_resyncs) == (0, 0)

    in_virtual_time(main)


def test_a_gateway_behind_a_flush_takes_the_snapshot() -> None:
    async def main() -> None:
        bench = Bench()
        async with bench.started():
            bench.redis.after_append = lambda: bench.redis.streams.flush()
            bench.worker.store(1)
            await asyncio.sleep(LAG_S)
            bench.redis.after_append = None
            assert not bench.in_step()
            await asyncio.sleep(HEALED_S)
            bench.check()
            assert bench.follower.num_resyncs == 1

    in_virtual_time(main)


def test_a_worker_that_was_restarted_begins_anew() -> None:
    """Under the same name, as another life: what the one before held is forgotten at once."""

    async def main() -> None:
        bench = Bench()
        async with bench.started():
            bench.worker.store(1, 2)
            await asyncio.sleep(LAG_S)
            again = PublishingWorker(bench.redis, "w0", epoch="next")
            bench.workers[0] = again
            bench.gateway.follow(again)
            assert bench.gateway.knows(again) == set()
            assert not bench.follower.is_fresh("w0")
            bench.follower.told("w0", EPOCH, 1000)
            async with running(again.publisher.run()):
                again.store(7)
                await asyncio.sleep(HEALED_S)
                bench.check()
                assert bench.follower.num_resyncs == 0

    in_virtual_time(main)


def test_a_worker_that_has_gone_is_forgotten() -> None:
    async def main() -> None:
        bench = Bench(num_workers=2)
        async with bench.started():
            for worker in bench.workers:
                worker.store(5)
            await asyncio.sleep(LAG_S)
            gone = bench.workers.pop()
            bench.gateway.follow(*bench.workers)
            assert bench.gateway.index.slot_of("w1") is None
            assert not bench.follower.is_fresh("w1")
            gone.store(6)
            await asyncio.sleep(1)
            bench.check()
            bench.gateway.follow()
            await asyncio.sleep(1)
            assert bench.gateway.index.num_blocks == 0
            assert not bench.follower.degraded

    in_virtual_time(main)


@pytest.mark.parametrize("is_idle", [False, True])
def test_a_failover_that_lost_the_end(is_idle: bool) -> None:
    """Redis goes back to what a replica had; what the gateway had read by then does not matter."""

    async def main() -> None:
        bench = Bench()
        late = FollowingGateway(bench.redis)
        async with bench.started():
            bench.worker.store(1, 2)
            await asyncio.sleep(LAG_S)
            replica = bench.redis.saved()
            for number in (3, 4, 5):
                bench.worker.store(number)
                await asyncio.sleep(0.1)
            bench.redis.streams = replica
            late.follow(bench.worker)
            if not is_idle:
                bench.worker.store(6)
            async with running(late.follower.run()):
                await asyncio.sleep(HEALED_S + 2 * HEARTBEAT_S)
                bench.check()
                assert bench.follower.num_resyncs == 0
                assert late.knows(bench.worker) == held(bench.worker)
                assert late.follower.is_fresh("w0")

    in_virtual_time(main)


def test_a_redis_that_is_slow_costs_no_snapshot() -> None:
    async def main() -> None:
        bench = Bench()
        async with bench.started():
            bench.redis.delay_s = 1.3
            for number in range(40):
                bench.worker.store(number % 25)
                await asyncio.sleep(0.1)
            bench.redis.delay_s = 0.0
            await asyncio.sleep(HEALED_S)
            bench.check()
            assert bench.follower.num_gaps == 0
            assert bench.follower.num_resyncs == 0

    in_virtual_time(main)


def test_without_redis_the_gateway_is_degraded_and_comes_back_by_itself() -> None:
    async def main() -> None:
        bench = Bench()
        async with bench.started():
            bench.redis.is_down = True
            bench.worker.store(1)
            await asyncio.sleep(STALE_S / 2)
            assert not bench.follower.degraded, "a moment is nothing"
            await asyncio.sleep(STALE_S)
            assert bench.follower.degraded
            assert not bench.follower.is_fresh("w0")
            assert bench.follower.staleness_s > STALE_S
            bench.redis.is_down = False
            await asyncio.sleep(HEALED_S)
            bench.check()
            assert bench.follower.num_resyncs == 0

    in_virtual_time(main)


def test_a_redis_that_never_answers_is_one_that_cannot_be_read() -> None:
    async def main() -> None:
        bench = Bench()
        async with bench.started():
            bench.redis.delay_s = 3600.0
            await asyncio.sleep(STALE_S + 0.5)
            assert bench.follower.is_fresh("w0"), "nothing has changed"
            assert bench.follower.degraded

    in_virtual_time(main)


def test_one_worker_that_lags_does_not_degrade_the_gateway() -> None:
    async def main() -> None:
        bench = Bench(num_workers=2)
        async with bench.started():
            bench.follower.told("w1", EPOCH, 5)
            await asyncio.sleep(STALE_S + 0.5)
            assert bench.follower.is_fresh("w0")
            assert not bench.follower.is_fresh("w1")
            assert not bench.follower.degraded
            assert STALE_S < bench.follower.staleness_s < STALE_S + 1

    in_virtual_time(main)


def test_a_snapshot_is_applied_while_events_flow() -> None:
    async def main() -> None:
        bench = Bench(num_blocks=24)
        async with bench.started():
            bench.redis.after_append = lambda: bench.redis.drop("w0", 10)
            for number in range(120):
                bench.worker.store(number % 40)
                await asyncio.sleep(0.05)
            await asyncio.sleep(HEALED_S + HEARTBEAT_S)
            bench.check()
            assert bench.follower.num_resyncs > 0

    in_virtual_time(main)


def test_a_batch_is_cut_short_when_its_worker_leaves(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(kv_follower, "SLICE_BLOCKS", 1)

    async def main() -> None:
        bench = Bench(num_blocks=100)
        index, calls = bench.gateway.index, []
        apply = index.apply

        def apply_and_leave(*args: Any) -> None:
            calls.append(args)
            apply(*args)
            if len(calls) == 10:
                asyncio.get_running_loop().call_soon(bench.gateway.follow)

        async with bench.started():
            monkeypatch.setattr(index, "apply", apply_and_leave)
            bench.worker.store(*range(100))
            await asyncio.sleep(LAG_S)
            assert len(calls) == bench.follower.num_applied == 10
            bench.gateway.follow(bench.worker)
            await asyncio.sleep(HEALED_S)
            bench.check()

    in_virtual_time(main)
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []


def _hashes(tier: kv_events_pb2.KvTier.ValueType, hashes: bytes, seq: int = 1) -> bytes:
    batch = kv_events_pb2.KvEventBatch(seq=seq)
    batch.changes.add(tier=tier, stored=hashes)
    return batch.SerializeToString()


@pytest.mark.parametrize(
    "batch",
    [
        b"\xff\xff\xff",
        _hashes(kv_events_pb2.KV_TIER_DEVICE, b"x" * 17),
        _hashes(kv_events_pb2.KV_TIER_DEVICE, b"x" * 16, seq=7),
    ],
)
def test_a_batch_that_cannot_be_read_is_one_that_is_missing(batch: bytes) -> None:
    async def main() -> None:
        redis = FaultyRedis()
        gateway = FollowingGateway(redis)
        gateway.follower.follow([("w", EPOCH)])
        snapshot = kv_events_pb2.KvSnapshot(seq=0).SerializeToString()
        write = KvSnapshotWrite(snapshot, 0, 0)
        await redis.streams.restart((("w", EPOCH), (KvEntry(1, batch),), write, 60.0))
        async with running(gateway.follower.run()):
            await asyncio.sleep(0.5)
            assert gateway.follower.num_gaps == 1
            assert gateway.follower.is_fresh("w"), "what is known is of use for a while"
            assert ("w", EPOCH) in redis.streams._wanted
            await asyncio.sleep(2.5)
            assert not gateway.follower.is_fresh("w")

    in_virtual_time(main)


def test_tiers_are_kept_apart_and_unknown_ones_ignored() -> None:
    async def main() -> None:
        redis = FaultyRedis()
        gateway = FollowingGateway(redis)
        gateway.follower.follow([("w", EPOCH)])
        batch = kv_events_pb2.KvEventBatch(seq=1)
        batch.changes.add(tier=kv_events_pb2.KV_TIER_DEVICE, stored=b"a" * 16)
        batch.changes.add(tier=kv_events_pb2.KV_TIER_HOST, stored=b"b" * 16)
        batch.changes.add(tier=9, stored=b"c" * 16)  # type: ignore[arg-type]
        snapshot = kv_events_pb2.KvSnapshot(seq=0).SerializeToString()
        write = KvSnapshotWrite(snapshot, 0, 0)
        entry = KvEntry(1, batch.SerializeToString())
        await redis.streams.restart((("w", EPOCH), (entry,), write, 60.0))
        async with running(gateway.follower.run()):
            await asyncio.sleep(0.5)
            assert gateway.follower.is_fresh("w")
            matches = gateway.index.match([b"a" * 16, b"b" * 16, b"c" * 16])
            slot = gateway.index.slot_of("w")
            assert (matches.num_blocks[slot], matches.weighted[slot]) == (2, 1.75)

    in_virtual_time(main)
