"""Publishers, a follower and its index over a real Valkey, while it is harmed."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import redis.asyncio as redis

from forebay.core.errors import Unavailable
from forebay.deploy.ports import free_ports
from forebay.deploy.valkey import EmbeddedValkey
from forebay.gateway.kv_follower import KvFollower
from forebay.kv.block_pool import BlockPool, Holder
from forebay.router.index import KvIndex
from forebay.store import redis_records
from forebay.store.kv_events import KvEntry, KvPosition, KvSnapshotWrite, KvStreamState
from forebay.store.redis_kv_events import RedisKvEventSink, RedisKvEventSource
from forebay.worker.kv_publisher import KvPublisher

STALE_S = 0.6
HEALED_S = 10.0
MAX_NUMBER = 500


@dataclass
class StoppableValkey:
    process: subprocess.Popen[bytes]
    url: str


@pytest.fixture
def own_valkey(tmp_path: Path) -> Iterator[StoppableValkey]:
    """One that may be stopped without harm to other tests."""
    (port,) = free_ports(1)
    server = EmbeddedValkey.prepare("127.0.0.1", port)
    process = server.spawn(tmp_path, tmp_path / "log", os.environ)
    try:
        yield StoppableValkey(process, server.url)
    finally:
        process.send_signal(signal.SIGCONT)
        process.terminate()
        process.wait(timeout=10)


def block_hash(number: int) -> bytes:
    return (number + 1).to_bytes(4, "little") * 4


class Worker:
    """Its pool fills up with random blocks; every life has an epoch of its own."""

    def __init__(self, url: str, worker_id: str, epoch: str = "1") -> None:
        self.worker_id = worker_id
        self.epoch = epoch
        self.pool = BlockPool(200, 16)
        self.sink = RedisKvEventSink.connect(url, worker_id, epoch)
        self.publisher = KvPublisher(self.pool, self.sink, interval_s=0.01, heartbeat_s=0.1)
        self.chance = random.Random(worker_id)

    def store(self, count: int) -> None:
        for _ in range(count):
            (block,) = self.pool.allocate(1, Holder.SEQUENCE)
            self.pool.register(block, block_hash(self.chance.randrange(MAX_NUMBER)))
            self.pool.release([block], Holder.SEQUENCE)


class Bench:
    def __init__(self, url: str, num_workers: int) -> None:
        self.url = url
        self.workers = [Worker(url, f"w{number}") for number in range(num_workers)]
        self.index = KvIndex(1 << 22)
        self.follower = KvFollower(RedisKvEventSource.connect(url), self.index, stale_s=STALE_S)

    def follow(self) -> None:
        self.follower.follow([(worker.worker_id, worker.epoch) for worker in self.workers])

    def hear(self) -> None:
        for worker in self.workers:
            self.follower.told(worker.worker_id, worker.epoch, worker.publisher.seq)

    def in_step(self) -> bool:
        if self.follower.degraded:
            return False
        for worker in self.workers:
            slot = self.index.slot_of(worker.worker_id)
            held = set(worker.pool.hashes())
            for number in range(MAX_NUMBER):
                block = block_hash(number)
                if bool(self.index.match([block]).num_blocks[slot]) != (block in held):
                    return False
        return True

    async def work(self, seconds: float, count: int = 7) -> None:
        end = asyncio.get_running_loop().time() + seconds
        while asyncio.get_running_loop().time() < end:
            for worker in self.workers:
                worker.store(count)
            self.hear()
            await asyncio.sleep(0.01)

    async def until(self, condition: Callable[[], bool], within_s: float = HEALED_S) -> None:
        async with asyncio.timeout(within_s):
            while not condition():
                self.hear()
                await asyncio.sleep(0.02)


@asynccontextmanager
async def bench_at(url: str, num_workers: int = 1) -> AsyncIterator[Bench]:
    async with redis.Redis.from_url(url) as client:
        while True:
            try:
                await client.flushall()
                break
            except redis.ConnectionError:
                await asyncio.sleep(0.02)
    bench = Bench(url, num_workers)
    bench.follow()
    tasks = [asyncio.create_task(worker.publisher.run()) for worker in bench.workers]
    tasks.append(asyncio.create_task(bench.follower.run()))
    try:
        await bench.work(0.1)
        await bench.until(bench.in_step)
        yield bench
        assert not any(task.done() for task in tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for worker in bench.workers:
            await worker.publisher.close()
        await bench.follower.close()


async def test_four_workers_at_once(valkey_url: str) -> None:
    async with bench_at(valkey_url, num_workers=4) as bench:
        await bench.work(0.5, count=40)
        await bench.until(bench.in_step)
        assert (bench.follower.num_gaps, bench.follower.num_resyncs) == (0, 0)
        assert bench.follower.num_applied > 1000


async def test_a_flush_under_load(valkey_url: str) -> None:
    async with bench_at(valkey_url, num_workers=2) as bench, redis.Redis.from_url(valkey_url) as r:
        for _ in range(3):
            await bench.work(0.1)
            await r.flushall()
            await bench.work(0.1)
        await bench.until(bench.in_step)
        late = Bench(valkey_url, 0)
        late.workers = bench.workers
        late.follow()
        task = asyncio.create_task(late.follower.run())
        await late.until(late.in_step)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await late.follower.close()


async def test_entries_that_vanish(valkey_url: str) -> None:
    async with bench_at(valkey_url) as bench, redis.Redis.from_url(valkey_url) as client:
        (worker,) = bench.workers
        stream = f"forebay:kv:{worker.worker_id}:{worker.epoch}"
        reading, may_read = bench.follower._source.read, asyncio.Event()

        async def read_late(*args: object) -> object:
            await may_read.wait()
            return await reading(*args)  # type: ignore[arg-type]

        bench.follower._source.read = read_late  # type: ignore
        await asyncio.sleep(0.3)
        bad = worker.publisher.seq + 2
        await bench.work(0.2)
        assert await client.xdel(stream, f"{bad}-0") == 1
        may_read.set()
        await bench.until(lambda: bench.follower.num_gaps > 0)
        await bench.until(bench.in_step)
        assert bench.follower.num_resyncs == 1


async def test_commands_that_are_held_back(own_valkey: StoppableValkey) -> None:
    async with (
        bench_at(own_valkey.url, num_workers=2) as bench,
        redis.Redis.from_url(own_valkey.url) as client,
    ):
        await client.execute_command("CLIENT", "PAUSE", "900", "ALL")
        await bench.work(0.8)
        assert bench.follower.degraded
        await bench.until(bench.in_step)
        assert (bench.follower.num_gaps, bench.follower.num_resyncs) == (0, 0)


async def test_a_server_that_is_stopped(
    own_valkey: StoppableValkey, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Longer than a call may take: it fails, and it is not known whether it had an effect."""
    monkeypatch.setattr(redis_records, "_TIMEOUT_S", 0.3)
    async with bench_at(own_valkey.url, num_workers=2) as bench:
        own_valkey.process.send_signal(signal.SIGSTOP)
        await bench.work(1.0)
        assert bench.follower.degraded
        assert all(worker.publisher.num_failures for worker in bench.workers)
        own_valkey.process.send_signal(signal.SIGCONT)
        await bench.until(bench.in_step)


async def test_a_worker_restarted_under_its_name(valkey_url: str) -> None:
    async with bench_at(valkey_url) as bench:
        (before,) = bench.workers
        again = Worker(valkey_url, before.worker_id, epoch="2")
        bench.workers = [again]
        bench.follow()
        task = asyncio.create_task(again.publisher.run())
        await bench.work(0.2)
        await bench.until(bench.in_step)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await before.publisher.close()


async def test_what_the_store_promises(valkey_url: str) -> None:
    sink = RedisKvEventSink.connect(valkey_url, "w", "e")
    source = RedisKvEventSource.connect(valkey_url)

    async def entries(seq: int, worker_id: str = "w") -> list[KvEntry]:
        (found,) = await source.read([KvPosition(worker_id, "e", seq)], 0.001, 10)
        return found

    a, b, c = (KvEntry(number, bytes([number])) for number in (1, 2, 3))
    try:
        assert not await sink.append([a])
        assert not await sink.append([a, b])
        assert await sink.keep_alive(60) == KvStreamState(False, False)
        assert await source.snapshot("w", "e") is None
        await sink.restart([KvEntry(0, b"")], KvSnapshotWrite(b"none", 0, 0), 60)
        assert await entries(0) == []
        assert await sink.append([a])
        assert await sink.append([a, b]), "what is there already counts as appended"
        assert await sink.append([b])
        assert await entries(0) == [a, b]
        assert await entries(1) == [b]
        assert await entries(0, "nobody") == []
        await sink.restart([KvEntry(2, b"")], KvSnapshotWrite(b"two", 2, 0), 60)
        assert await entries(1) == [KvEntry(2, b"")]
        assert await entries(2) == []
        assert await source.snapshot("w", "e") == b"two"
        assert await sink.append([c])
        await sink.put_snapshot(KvSnapshotWrite(b"three", 3, 2), 60)
        assert await entries(0) == [c]
        await source.want("w", "e")
        assert await sink.keep_alive(60) == KvStreamState(True, True)
        assert await sink.keep_alive(0.001) == KvStreamState(True, False)
        async with asyncio.timeout(5):
            while (await sink.keep_alive(0.001)).is_there:
                await asyncio.sleep(0.002)
        await sink.restart([c], KvSnapshotWrite(b"three", 3, 0), 60)
        await sink.remove()
        assert await entries(0) == []
    finally:
        await sink.remove()
        await sink.close()
        await source.close()


async def test_very_many_streams_are_read(valkey_url: str) -> None:
    source = RedisKvEventSource.connect(valkey_url)
    sinks = [RedisKvEventSink.connect(valkey_url, f"w{n}", "e") for n in (0, 700, 1199)]
    try:
        for sink in sinks:
            await sink.restart([KvEntry(1, b"x")], KvSnapshotWrite(b"", 1, 0), 60)
        positions = [KvPosition(f"w{number}", "e", 0) for number in range(1200)]
        found = await source.read(positions, 60.0, 10)
        assert [n for n, entries in enumerate(found) if entries] == [0, 700, 1199]
    finally:
        for sink in sinks:
            await sink.remove()
            await sink.close()
        await source.close()


async def test_a_cancelled_call_is_cancelled(valkey_url: str) -> None:
    """Wherever it stands, and the next one gets its own answer."""
    sink = RedisKvEventSink.connect(valkey_url, "w", "e")
    source = RedisKvEventSource.connect(valkey_url)
    chance = random.Random(1)
    await sink.restart([KvEntry(1, b"x")], KvSnapshotWrite(b"snapshot", 1, 0), 60)
    for number in range(2, 200):
        calls = [
            source.read([KvPosition("w", "e", 10**6)], 0.05, 10),
            source.snapshot("w", "e"),
            sink.append([KvEntry(number, b"x"), KvEntry(number + 1, b"x")]),
        ]
        tasks = [asyncio.create_task(call) for call in calls]
        for _ in range(chance.randrange(8)):
            await asyncio.sleep(0)
        await asyncio.sleep(chance.random() * 0.0004)
        for task in tasks:
            if task.cancel():
                with pytest.raises(asyncio.CancelledError):
                    await task
    assert await source.snapshot("w", "e") == b"snapshot"
    assert await sink.append([KvEntry(1000, b"end")])
    assert await source.read([KvPosition("w", "e", 999)], 1.0, 10) == [[KvEntry(1000, b"end")]]
    await sink.remove()
    await sink.close()
    await source.close()


async def test_no_server_is_unavailable() -> None:
    (port,) = free_ports(1)
    url = f"redis://127.0.0.1:{port}/0"
    sink, source = RedisKvEventSink.connect(url, "w", "e"), RedisKvEventSource.connect(url)
    for call in (
        sink.append([KvEntry(1, b"x")]),
        sink.keep_alive(1),
        source.read([KvPosition("w", "e", 0)], 0.1, 1),
        source.want("w", "e"),
    ):
        with pytest.raises(Unavailable):
            await call
    await sink.close()
    await source.close()
