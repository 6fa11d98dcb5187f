from __future__ import annotations

import asyncio

import pytest
from kv_event_benches import (
    HEARTBEAT_S,
    INTERVAL_S,
    FaultyRedis,
    PublishingWorker,
    block_hash,
    held,
    in_virtual_time,
    running,
    split,
)

from forebay.core.errors import Unavailable
from forebay.store.kv_events import KvEntry
from forebay.worker import kv_publisher
from forebay.worker.kv_publisher import RETRY_S


def content(worker: PublishingWorker) -> set[bytes]:
    return {block_hash(number) for number in held(worker)}


def replayed(redis: FaultyRedis, worker: PublishingWorker) -> tuple[int, set[bytes]]:
    """What a gateway that begins now makes of snapshot and stream."""
    snapshot = redis.snapshot(worker.worker_id)
    assert snapshot is not None
    seq, blocks = snapshot
    for batch in redis.batches(worker.worker_id):
        if batch.seq <= seq:
            continue
        assert batch.seq == seq + 1
        seq = batch.seq
        for changes in batch.changes:
            blocks |= set(split(changes.stored))
            blocks -= set(split(changes.removed))
    return seq, blocks


def test_a_worker_begins_with_an_empty_snapshot_and_a_mark() -> None:
    async def main() -> None:
        redis = FaultyRedis()
        worker = PublishingWorker(redis)
        await worker.publisher.publish()
        assert redis.snapshot("w") == (0, set())
        assert worker.publisher.seq == 0
        (entry,) = redis.streams._streams["w", "epoch"].entries
        assert entry == KvEntry(0, b"")

    in_virtual_time(main)


def test_batches_are_numbered_and_net_out() -> None:
    async def main() -> None:
        redis = FaultyRedis()
        worker = PublishingWorker(redis, num_blocks=4)
        await worker.publisher.publish()
        worker.store(1, 2, 3, 4)
        await worker.publisher.publish()
        worker.store(5, 6, 1)
        await worker.publisher.publish()
        _, first, second = redis.batches("w")
        assert (first.seq, split(first.changes[0].stored)) == (1, [*map(block_hash, (1, 2, 3, 4))])
        assert second.seq == 2
        assert split(second.changes[0].stored) == [*map(block_hash, (5, 6, 1))]
        assert split(second.changes[0].removed) == [*map(block_hash, (2, 3))]
        assert replayed(redis, worker) == (2, content(worker))

    in_virtual_time(main)


def test_nothing_but_signs_of_life_is_sent_without_a_change() -> None:
    async def main() -> None:
        redis = FaultyRedis()
        worker = PublishingWorker(redis)
        async with running(worker.publisher.run()):
            await asyncio.sleep(10 * HEARTBEAT_S + 0.5)
            assert redis.calls == ["KvRestart"] + ["KvKeepAlive"] * 10
            worker.store(1)
            await asyncio.sleep(INTERVAL_S / 2)
            worker.store(2)
            await asyncio.sleep(INTERVAL_S)
            assert redis.calls[11:] == ["KvAppend"]
            assert replayed(redis, worker) == (1, content(worker))

    in_virtual_time(main)


def test_the_stream_expires_behind_a_worker_that_was_killed() -> None:
    async def main() -> None:
        redis = FaultyRedis()
        worker = PublishingWorker(redis)
        async with running(worker.publisher.run()):
            await asyncio.sleep(100 * HEARTBEAT_S)
            assert redis.streams._stream(("w", "epoch")) is not None
        await asyncio.sleep(kv_publisher.TTL_HEARTBEATS * HEARTBEAT_S)
        assert redis.streams._stream(("w", "epoch")) is None

    in_virtual_time(main)


@pytest.mark.parametrize("has_news", [True, False])
def test_a_flushed_redis_gets_everything_again(has_news: bool) -> None:
    async def main() -> None:
        redis = FaultyRedis()
        worker = PublishingWorker(redis)
        async with running(worker.publisher.run()):
            worker.store(1, 2)
            await asyncio.sleep(0.5)
            redis.streams.flush()
            if has_news:
                worker.store(3)
            await asyncio.sleep(INTERVAL_S * 1.5 if has_news else HEARTBEAT_S)
            assert replayed(redis, worker) == (1 + has_news, content(worker))
            entries = redis.streams._streams["w", "epoch"].entries
            assert [(e.seq, bool(e.batch)) for e in entries] == [(1 + has_news, has_news)]

    in_virtual_time(main)


def test_batches_wait_for_a_redis_that_is_away() -> None:
    async def main() -> None:
        redis = FaultyRedis()
        worker = PublishingWorker(redis)
        async with running(worker.publisher.run()):
            await asyncio.sleep(0.1)
            redis.is_down = True
            for number in range(4):
                worker.store(number)
                await asyncio.sleep(RETRY_S * 1.2)
            assert worker.publisher.seq == 4, "the truth does not wait for Redis"
            redis.is_down = False
            await asyncio.sleep(RETRY_S)
            assert [batch.seq for batch in redis.batches("w")] == [0, 1, 2, 3, 4]
            assert worker.publisher.num_snapshots == 1
            assert worker.publisher.num_failures > 3
            assert replayed(redis, worker) == (4, content(worker))

    in_virtual_time(main)


@pytest.mark.parametrize("bound", ["MAX_PENDING_BLOCKS", "MAX_PENDING_BATCHES"])
def test_a_snapshot_takes_the_place_of_too_much_that_waits(
    bound: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_publisher, bound, 3)

    async def main() -> None:
        redis = FaultyRedis()
        worker = PublishingWorker(redis)
        await worker.publisher.publish()
        redis.is_down = True
        for number in range(6):
            worker.store(number)
            with pytest.raises(Unavailable):
                await worker.publisher.publish()
            assert len(worker.publisher._pending) <= 3
        redis.is_down = False
        await worker.publisher.publish()
        assert worker.publisher.seq == 6
        assert redis.snapshot("w") == (6, content(worker))
        assert [batch.seq for batch in redis.batches("w")] == [5, 6]

    in_virtual_time(main)


def test_an_answer_that_was_lost_repeats_nothing() -> None:
    async def main() -> None:
        redis = FaultyRedis()
        worker = PublishingWorker(redis)
        redis.num_lost_answers = 1
        for number in (1, 2, 3):
            with pytest.raises(Unavailable):
                await worker.publisher.publish()
            worker.store(number)
            redis.num_lost_answers = 1
        redis.num_lost_answers = 0
        await worker.publisher.publish()
        assert replayed(redis, worker) == (3, content(worker))
        seqs = [batch.seq for batch in redis.batches("w")]
        assert seqs == sorted(set(seqs))

    in_virtual_time(main)


def test_a_snapshot_now_and_then_shortens_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stream keeps what came since the snapshot before: who is a little behind may go on."""
    monkeypatch.setattr(kv_publisher, "SNAPSHOT_BLOCKS", 8)

    async def main() -> None:
        redis = FaultyRedis()
        worker = PublishingWorker(redis, num_blocks=8)
        longest = 0
        for number in range(100):
            worker.store(number)
            await worker.publisher.publish()
            assert replayed(redis, worker) == (number + 1, content(worker))
            longest = max(longest, len(redis.batches("w")))
        assert 5 <= longest < 25
        snapshot = redis.snapshot("w")
        assert snapshot is not None
        assert redis.batches("w")[0].seq < snapshot[0] < 100

    in_virtual_time(main)


def test_a_snapshot_that_is_wanted_is_written_at_the_next_sign_of_life() -> None:
    async def main() -> None:
        redis = FaultyRedis()
        worker = PublishingWorker(redis)
        async with running(worker.publisher.run()):
            await asyncio.sleep(0.1)
            worker.store(1)
            await asyncio.sleep(0.1)
            assert redis.snapshot("w") == (0, set())
            await redis.streams.want(("w", "epoch"))
            await asyncio.sleep(HEARTBEAT_S)
            assert redis.snapshot("w") == (1, content(worker))
            assert worker.publisher.num_snapshots == 2
            await asyncio.sleep(3 * HEARTBEAT_S)
            assert worker.publisher.num_snapshots == 2

    in_virtual_time(main)


def test_a_snapshot_taken_while_events_flow_is_that_of_its_number() -> None:
    async def main() -> None:
        redis = FaultyRedis()
        redis.delay_s = 0.03
        worker = PublishingWorker(redis, num_blocks=6)
        async with running(worker.publisher.run()):
            for number in range(60):
                worker.store(number)
                if number % 7 == 0:
                    await redis.streams.want(("w", "epoch"))
                await asyncio.sleep(0.04)
                if redis.snapshot("w") is not None:
                    replayed(redis, worker)
            await asyncio.sleep(1)
            assert replayed(redis, worker) == (worker.publisher.seq, content(worker))
            assert worker.publisher.num_snapshots > 1

    in_virtual_time(main)


def test_a_worker_that_ends_takes_its_stream_away() -> None:
    async def main() -> None:
        redis = FaultyRedis()
        worker = PublishingWorker(redis)
        worker.store(1)
        await worker.publisher.publish()
        await redis.streams.want(("w", "epoch"))
        await worker.publisher.close()
        assert len(redis.streams) == 0
        redis.is_down = True
        await worker.publisher.close()

    in_virtual_time(main)


def test_what_nobody_has_foreseen_ends_in_a_new_stream(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        redis = FaultyRedis()
        worker = PublishingWorker(redis)
        async with running(worker.publisher.run()):
            await asyncio.sleep(0.1)
            redis.streams._streams["w", "epoch"].top = None  # type: ignore[assignment]
            worker.store(1)
            await asyncio.sleep(1)
            assert "cannot be published" in caplog.text
            assert replayed(redis, worker) == (1, content(worker))

    in_virtual_time(main)
