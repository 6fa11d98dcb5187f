"""What can befall the KV events of a running platform; each fault is proved to have happened."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from enum import StrEnum
from typing import Any, cast

import redis.asyncio as redis

from forebay.deploy.processes import ProcessRecord
from forebay_loadtest import proc
from forebay_loadtest.local_platform import PlatformError
from forebay_loadtest.routing.bare_platform import BarePlatform, Child

PAUSE_S = 5.0
DROP_ROUNDS = 4
DROP_S = 0.6
"""A gateway stands still this long, and misses what is deleted meanwhile: less than the silence
after which clients or workers give it up."""
_BETWEEN_DROPS_S = 0.3
_STRIKE_LIMIT_S = 10.0
_POLL_S = 0.02
_STREAMS = "forebay:kv:*"


class NotStruck(Exception):
    """A fault left no trace of having happened."""


class Fault(StrEnum):
    FLUSH = "FLUSHALL"
    STOP = "SIGSTOP of Valkey"
    PAUSE = "CLIENT PAUSE"
    RESTART = "worker restarted, same address"
    DROP = "events dropped (XDEL)"


async def strike(fault: Fault, platform: BarePlatform) -> str:
    """Returns the evidence once the fault is over (the worker's new life may still be starting).
    Raises NotStruck."""
    strikes = {
        Fault.FLUSH: _flush,
        Fault.STOP: _stop_valkey,
        Fault.PAUSE: _pause_clients,
        Fault.RESTART: _restart_worker,
        Fault.DROP: _drop_events,
    }
    return await strikes[fault](platform)


async def _flush(platform: BarePlatform) -> str:
    async with _console(platform) as console:
        before = await console.dbsize()
        async with console.pipeline(transaction=True) as pipe:
            pipe.flushall()
            pipe.dbsize()
            _, after = await pipe.execute()
    if not before or after:
        raise NotStruck(f"{before} keys before FLUSHALL, {after} after")
    return f"{before} keys gone"


async def _stop_valkey(platform: BarePlatform) -> str:
    victim = _record(platform.valkey.pid)
    victim.signal(signal.SIGSTOP)
    began = time.monotonic()
    await _until_state(victim, stopped=True)
    await asyncio.sleep(PAUSE_S)
    victim.signal(signal.SIGCONT)
    await _until_state(victim, stopped=False)
    return f"process {victim.pid} in state T for {time.monotonic() - began:.1f} s"


async def _pause_clients(platform: BarePlatform) -> str:
    async with _console(platform) as console, _console(platform) as probe:
        await cast("Any", probe.ping())
        began = time.monotonic()
        await console.client_pause(int(PAUSE_S * 1000))
        await cast("Any", probe.ping())
        held_s = time.monotonic() - began
    if held_s < 0.9 * PAUSE_S:
        raise NotStruck(f"a PING was answered after {held_s:.2f} s")
    return f"a PING took {held_s:.1f} s"


async def _restart_worker(platform: BarePlatform) -> str:
    """Under the same port, with empty caches, as soon as the old process is gone."""
    worker = platform.workers[0]
    victim = worker.record
    worker.kill()
    if victim.alive or proc.port_open(worker.port):
        raise NotStruck(f"port {worker.port} is still open")
    worker.start()
    await worker.until(lambda: proc.port_open(worker.port))
    return f"process {victim.pid} gone, {worker.record.pid} listens on the same port"


async def _drop_events(platform: BarePlatform) -> str:
    """The first gateway is stopped while the others go on, and everything that workers tell
    meanwhile is deleted before it can be read there."""
    gateway = platform.gateways[0]
    num_deleted = 0
    async with _console(platform) as console:
        for _ in range(DROP_ROUNDS):
            num_deleted += await _delete_unseen(console, gateway)
            await asyncio.sleep(_BETWEEN_DROPS_S)
    if not num_deleted:
        raise NotStruck("no event was there to be deleted")
    return f"{num_deleted} entries deleted before {gateway.name} had read them"


async def _delete_unseen(console: redis.Redis, gateway: Child) -> int:
    """The first entry of each stream after the stop may be in the gateway's socket already: it
    answers a read that was waiting."""
    victim = gateway.record
    victim.signal(signal.SIGSTOP)
    try:
        await _until_state(victim, stopped=True)
        streams = [key async for key in console.scan_iter(match=_STREAMS, _type="stream")]
        last = {key: await _last_id(console, key) for key in streams}
        num_deleted = 0
        end = time.monotonic() + DROP_S
        skipped = set()
        while time.monotonic() < end:
            await asyncio.sleep(_POLL_S)
            for key in streams:
                ids = _ids(await console.xrange(key, min=f"({last[key]}"))
                if not ids:
                    continue
                last[key] = ids[-1]
                fresh = ids if key in skipped else ids[1:]
                skipped.add(key)
                if fresh:
                    num_deleted += await console.xdel(key, *fresh)
        return num_deleted
    finally:
        victim.signal(signal.SIGCONT)


async def _last_id(console: redis.Redis, key: bytes) -> str:
    newest = _ids(await console.xrevrange(key, count=1))
    return newest[0] if newest else "0-0"


def _ids(entries: Any) -> list[str]:
    return [entry_id.decode() for entry_id, _ in entries]


def _record(pid: int) -> ProcessRecord:
    found = ProcessRecord.of(pid)
    if found is None:
        raise PlatformError(f"process {pid} has ended")
    return found


async def _until_state(victim: ProcessRecord, *, stopped: bool) -> None:
    """Raises NotStruck."""
    end = time.monotonic() + _STRIKE_LIMIT_S
    while (proc.state(victim.pid) == "T") is not stopped:
        if time.monotonic() > end:
            raise NotStruck(f"process {victim.pid} is in state {proc.state(victim.pid)}")
        await asyncio.sleep(_POLL_S)


@asynccontextmanager
async def _console(platform: BarePlatform) -> AsyncIterator[redis.Redis]:
    client = redis.Redis.from_url(platform.redis_url, socket_timeout=4 * PAUSE_S)
    try:
        yield client
    finally:
        await client.aclose()
