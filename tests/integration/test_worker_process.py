"""A worker process's place in the registry, over a real Valkey."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from forebay.core.errors import InternalError, Unavailable
from forebay.core.settings import EngineSettings, WorkerSettings
from forebay.deploy.ports import free_ports
from forebay.store.redis_registry import RedisRegistry
from forebay.worker.process import WorkerProcess

SETTINGS = WorkerSettings(
    heartbeat_s=0.02,
    registry_ttl_s=0.5,
    engine=EngineSettings(engine="sim", model_id="sim", num_blocks=16),
)


async def listed(registry: RedisRegistry, address: str) -> bool:
    workers = await registry.list_workers()
    return any(rank.address == address for worker in workers for rank in worker.endpoints)


async def until_gone(registry: RedisRegistry, address: str) -> None:
    async with asyncio.timeout(15):
        while await listed(registry, address):
            await asyncio.sleep(0.02)


async def test_a_worker_is_listed_from_its_start_to_its_stop(valkey_url: str) -> None:
    process = WorkerProcess(replace(SETTINGS, redis_url=valkey_url, registry_ttl_s=60))
    with pytest.raises(InternalError, match="not started"):
        process.check_health()
    await process.start()
    registry = RedisRegistry.connect(valkey_url)
    try:
        assert await listed(registry, process.address)
        process.check_health()
    finally:
        await process.stop(0)
    assert not await listed(registry, process.address)
    await registry.close()


@pytest.mark.parametrize("harm", ["steps fail", "the loop dies"])
async def test_a_worker_that_is_not_healthy_falls_silent(valkey_url: str, harm: str) -> None:
    process = WorkerProcess(replace(SETTINGS, redis_url=valkey_url))
    await process.start()
    registry = RedisRegistry.connect(valkey_url)
    try:
        assert await listed(registry, process.address)
        if harm == "steps fail":
            assert process._worker is not None
            process._worker._loop._num_failed = 3
        else:
            process._tasks["worker"].cancel()
        await until_gone(registry, process.address)
        with pytest.raises(InternalError):
            process.check_health()
    finally:
        await process.stop(0)
        await registry.close()


async def test_no_redis_at_the_start_is_unavailable() -> None:
    (port,) = free_ports(1)
    process = WorkerProcess(replace(SETTINGS, redis_url=f"redis://127.0.0.1:{port}/0"))
    with pytest.raises(Unavailable):
        await process.start()
    await process.stop(0)
