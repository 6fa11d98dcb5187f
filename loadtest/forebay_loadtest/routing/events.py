"""`python -m forebay_loadtest.routing.events`: what KV events cost, from workers' pools through a
real Valkey into a gateway's index.

Publishers and follower run in one process, Valkey in another. The time it takes to change the pools
is counted, too.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import click

from forebay.deploy.ports import LOOPBACK, free_ports
from forebay.deploy.valkey import EmbeddedValkey
from forebay.gateway.kv_follower import KvFollower
from forebay.kv.block_pool import BlockPool, Holder
from forebay.router.index import KvIndex
from forebay.store.redis_kv_events import RedisKvEventSink, RedisKvEventSource
from forebay.worker.kv_publisher import KvPublisher
from forebay_loadtest.report import environment

WANTED_BLOCKS_A_S = 50_000
TICK_S = 0.01
STALE_S = 2.0
_INTERVAL_S = 0.05
_HEARTBEAT_S = 1.0
_IDLE_S = 3.0
_SETTLE_S = 20.0
_MIB = 1 << 20
_MAX_TICKS = 5
"""Of missing changes are made up for at once."""


@dataclass(slots=True)
class Load:
    """num_changed: blocks stored or removed. pools_s: CPU time of that. late_s: how long after it
    was made a worker's newest batch was known, looked at once a tick."""

    num_changed: int = 0
    pools_s: float = 0.0
    late_s: list[float] = field(default_factory=list)


class ChangingPool:
    """Always full once it has been filled: every block stored removes another one."""

    def __init__(self, num_blocks: int, seed: int) -> None:
        self.pool = BlockPool(num_blocks, 16)
        self._random = random.Random(seed)

    def change(self, count: int) -> int:
        """Stores `count` blocks; returns how many changes that were."""
        pool = self.pool
        num_free = pool.counts().free
        blocks = pool.allocate(count, Holder.SEQUENCE)
        for block in blocks:
            pool.register(block, self._random.randbytes(16))
        pool.release(blocks, Holder.SEQUENCE)
        return count + max(0, count - num_free)


class Workers:
    """Pools with their publishers, at one Valkey, and the gateway that follows them."""

    def __init__(self, url: str, num_workers: int, num_blocks: int) -> None:
        self.pools = [ChangingPool(num_blocks, seed) for seed in range(num_workers)]
        self.publishers = [
            KvPublisher(
                pool.pool,
                RedisKvEventSink.connect(url, f"w{number}", "1"),
                interval_s=_INTERVAL_S,
                heartbeat_s=_HEARTBEAT_S,
            )
            for number, pool in enumerate(self.pools)
        ]
        self.index = KvIndex(64 * _MIB + 400 * num_workers * num_blocks)
        self.follower = KvFollower(RedisKvEventSource.connect(url), self.index, stale_s=STALE_S)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        self.follower.follow((f"w{number}", "1") for number in range(len(self.pools)))
        tasks = [asyncio.create_task(publisher.run()) for publisher in self.publishers]
        tasks.append(asyncio.create_task(self.follower.run()))
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for publisher in self.publishers:
                await publisher.close()
            await self.follower.close()

    def hear(self) -> None:
        for number, publisher in enumerate(self.publishers):
            self.follower.told(f"w{number}", "1", publisher.seq)

    async def settle(self) -> None:
        limit = time.monotonic() + _SETTLE_S
        while time.monotonic() < limit:
            await asyncio.sleep(3 * _INTERVAL_S)
            self.hear()
            if self.follower.staleness_s == 0.0 and not self.follower.degraded:
                return

    def agree(self) -> bool:
        """Whether the index says what the pools hold, and no more."""
        return all(
            bool(self.index.match([block]).num_blocks[self.index.slot_of(f"w{number}")])
            for number, pool in enumerate(self.pools)
            for block in pool.pool.hashes()
        ) and self.index.num_blocks == sum(len(pool.pool.hashes()) for pool in self.pools)


async def change_all(workers: Workers, changes_a_s: int, seconds: float) -> Load:
    """At that pace as long as the machine keeps up with it."""
    load = Load()
    began = time.monotonic()
    most = int(_MAX_TICKS * TICK_S * changes_a_s)
    while (elapsed := time.monotonic() - began) < seconds:
        missing = min(most, int(elapsed * changes_a_s) - load.num_changed)
        before = time.process_time()
        for pool in workers.pools:
            load.num_changed += pool.change(max(1, missing // (2 * len(workers.pools))))
        load.pools_s += time.process_time() - before
        workers.hear()
        load.late_s.append(workers.follower.staleness_s)
        await asyncio.sleep(TICK_S)
    return load


def cpu_s(process_id: int) -> float:
    fields = Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    num_workers: int
    num_blocks: int
    changes_a_s: int
    seconds: float


async def measure(url: str, valkey_id: int, options: Options) -> dict[str, object]:
    """Of a gateway that follows workers whose pools change without end; it ends where they end."""
    workers = Workers(url, options.num_workers, options.num_blocks)
    async with workers.running():
        for pool in workers.pools:
            pool.change(options.num_blocks)
        await workers.settle()
        idle_s = cpu_s(valkey_id)
        await asyncio.sleep(_IDLE_S)
        idle_s = cpu_s(valkey_id) - idle_s
        applied = workers.follower.num_applied
        valkey_s, own_s = cpu_s(valkey_id), time.process_time()
        load = await change_all(workers, options.changes_a_s, options.seconds)
        own_s, valkey_s = time.process_time() - own_s, cpu_s(valkey_id) - valkey_s
        late_blocks = applied + load.num_changed - workers.follower.num_applied
        await workers.settle()
        late_gateway = await load_snapshots(url, options)
    quantiles = statistics.quantiles(load.late_s, n=100)
    return {
        "changed_blocks": load.num_changed,
        "blocks_a_s": round(load.num_changed / options.seconds),
        "blocks_on_their_way_at_the_end": late_blocks,
        "index_agrees": workers.agree(),
        "num_gaps": workers.follower.num_gaps,
        "num_resyncs": workers.follower.num_resyncs,
        "cpu_s": {
            "pools_and_journals": round(load.pools_s, 3),
            "publishers_and_follower": round(own_s - load.pools_s, 3),
            "valkey": round(valkey_s, 3),
        },
        "blocks_a_cpu_s": round(load.num_changed / (own_s + valkey_s)),
        "late_s": {"p50": round(quantiles[49], 4), "p99": round(quantiles[98], 4)},
        "valkey_cpu_share_idle": round(idle_s / _IDLE_S, 4),
        "late_gateway": late_gateway,
    }


async def load_snapshots(url: str, options: Options) -> dict[str, float]:
    """Of a gateway that starts later, and finds everything in snapshots."""
    index = KvIndex(64 * _MIB + 400 * options.num_workers * options.num_blocks)
    follower = KvFollower(RedisKvEventSource.connect(url), index, stale_s=STALE_S)
    names = [f"w{number}" for number in range(options.num_workers)]
    began = time.monotonic()
    follower.follow((name, "1") for name in names)
    task = asyncio.create_task(follower.run())
    while not all(follower.is_fresh(name) for name in names):
        await asyncio.sleep(0.005)
    seconds = time.monotonic() - began
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await follower.close()
    return {
        "seconds": round(seconds, 3),
        "blocks_a_s": round(follower.num_applied / seconds),
    }


async def with_valkey(options: Options) -> dict[str, object]:
    (port,) = free_ports(1)
    server = EmbeddedValkey.prepare(LOOPBACK, port)
    with tempfile.TemporaryDirectory() as folder:
        process = server.spawn(Path(folder), Path(folder) / "log", os.environ)
        try:
            while not server.answers():
                await asyncio.sleep(0.05)
            return await measure(server.url, process.pid, options)
        finally:
            process.terminate()
            process.wait(timeout=10)


@click.command()
@click.option("--workers", default=8, show_default=True, type=click.IntRange(1))
@click.option("--blocks", default=20_000, show_default=True, help="Of one worker's pool.")
@click.option("--pace", default=60_000, show_default=True, help="Changed blocks a second, in all.")
@click.option("--seconds", default=10.0, show_default=True)
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="Write JSON here.")
def main(workers: int, blocks: int, pace: int, seconds: float, output: Path | None) -> None:
    """Exits with 1 when the events of one core's CPU seconds are fewer than wanted, or the index
    does not say what the pools hold."""
    options = Options(num_workers=workers, num_blocks=blocks, changes_a_s=pace, seconds=seconds)
    figures = asyncio.run(with_valkey(options))
    for name, value in figures.items():
        click.echo(f"{name}: {json.dumps(value)}")
    if output is not None:
        report = {**environment(), "options": dataclasses.asdict(options), **figures}
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(report, indent=1) + "\n")
    pace_text = f"{figures['blocks_a_cpu_s']} blocks a CPU second (wanted {WANTED_BLOCKS_A_S})"
    short = []
    if int(str(figures["blocks_a_cpu_s"])) < WANTED_BLOCKS_A_S:
        short.append(pace_text)
    if not figures["index_agrees"]:
        short.append("the index does not say what the pools hold")
    click.echo("SHORT: " + "; ".join(short) if short else f"OK: {pace_text}, nothing lost")
    sys.exit(1 if short else 0)


if __name__ == "__main__":
    main()
