"""The worker registry over a real Valkey."""

from __future__ import annotations

import asyncio
import random
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import redis.asyncio as redis

from forebay.core.errors import ConfigurationError, Unavailable
from forebay.deploy.ports import free_ports
from forebay.rpc.v1 import worker_pb2
from forebay.store.redis_registry import RedisRegistry


def worker(worker_id: str, running: int = 0) -> worker_pb2.WorkerDescription:
    return worker_pb2.WorkerDescription(
        worker_id=worker_id, load=worker_pb2.WorkerLoad(num_running=running)
    )


@asynccontextmanager
async def registry_at(url: str) -> AsyncIterator[RedisRegistry]:
    registry = RedisRegistry.connect(url)
    try:
        yield registry
    finally:
        await registry.close()


async def flush(url: str) -> None:
    async with redis.Redis.from_url(url) as client:
        await client.flushdb()


@asynccontextmanager
async def empty_registry(url: str) -> AsyncIterator[RedisRegistry]:
    await flush(url)
    try:
        async with registry_at(url) as registry:
            yield registry
    finally:
        await flush(url)


async def test_workers_are_listed_in_order_with_their_latest_record(valkey_url: str) -> None:
    async with empty_registry(valkey_url) as registry:
        assert await registry.list_workers() == []
        for worker_id in ("b", "a", "c"):
            await registry.publish(worker(worker_id), 60)
        await registry.publish(worker("b", running=3), 60)
        assert await registry.list_workers() == [worker("a"), worker("b", 3), worker("c")]
        async with registry_at(valkey_url) as other:
            assert await other.list_workers() == await registry.list_workers()


async def test_a_removed_worker_is_gone_and_may_come_back(valkey_url: str) -> None:
    async with empty_registry(valkey_url) as registry:
        await registry.publish(worker("a"), 60)
        await registry.remove("a")
        await registry.remove("a")
        await registry.remove("never there")
        assert await registry.list_workers() == []
        await registry.publish(worker("a"), 60)
        assert await registry.list_workers() == [worker("a")]


async def test_a_silent_worker_expires_and_leaves_nothing_behind(valkey_url: str) -> None:
    async with empty_registry(valkey_url) as registry:
        await registry.publish(worker("stays"), 60)
        await registry.publish(worker("goes"), 0.001)
        async with asyncio.timeout(10):
            while len(await registry.list_workers()) > 1:
                await asyncio.sleep(0.005)
        assert await registry.list_workers() == [worker("stays")]
        client = redis.Redis.from_url(valkey_url)
        assert await client.smembers("forebay:workers") == {b"stays"}
        await client.aclose()


async def test_a_flushed_server_has_the_worker_again_with_the_next_heartbeat(
    valkey_url: str,
) -> None:
    async with empty_registry(valkey_url) as registry:
        await registry.publish(worker("a"), 60)
        client = redis.Redis.from_url(valkey_url)
        await client.flushall()
        await client.aclose()
        assert await registry.list_workers() == []
        await registry.publish(worker("a"), 60)
        assert await registry.list_workers() == [worker("a")]


async def test_a_connection_that_the_server_closed_is_opened_again(valkey_url: str) -> None:
    async with empty_registry(valkey_url) as registry:
        await registry.publish(worker("a"), 60)
        client = redis.Redis.from_url(valkey_url)
        await client.execute_command("CLIENT", "KILL", "SKIPME", "yes", "TYPE", "normal")
        await client.aclose()
        assert await registry.list_workers() == [worker("a")]


async def test_a_server_that_is_not_there_is_unavailable_at_once() -> None:
    (port,) = free_ports(1)
    async with registry_at(f"redis://127.0.0.1:{port}/0") as registry:
        for call in (
            registry.list_workers(),
            registry.publish(worker("a"), 1),
            registry.remove("a"),
        ):
            with pytest.raises(Unavailable):
                async with asyncio.timeout(1.5):
                    await call


async def test_a_server_that_does_not_answer_is_unavailable_in_time() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        async with registry_at(f"redis://127.0.0.1:{silent.getsockname()[1]}/0") as registry:
            with pytest.raises(Unavailable, match="did not answer"):
                async with asyncio.timeout(10):
                    await registry.list_workers()


async def test_a_cancelled_call_is_cancelled(valkey_url: str) -> None:
    """Wherever it stands: a task that follows the registry must end when it is told to."""
    async with empty_registry(valkey_url) as registry:
        await registry.publish(worker("a"), 60)
        chance = random.Random(1)
        num_cancelled = 0
        for _ in range(1500):
            task = asyncio.create_task(registry.list_workers())
            for _ in range(chance.randrange(12)):
                await asyncio.sleep(0)
            if chance.random() < 0.5:
                await asyncio.sleep(chance.random() * 0.0004)
            if task.cancel():
                num_cancelled += 1
                with pytest.raises(asyncio.CancelledError):
                    await task
        assert num_cancelled > 100
        assert await registry.list_workers() == [worker("a")]


def test_a_url_that_is_none_is_a_configuration_error() -> None:
    with pytest.raises(ConfigurationError, match="Redis URL"):
        RedisRegistry.connect("127.0.0.1:6379")


async def test_poison_is_listed_until_it_runs_out(valkey_url: str) -> None:
    async with empty_registry(valkey_url) as registry:
        assert await registry.list_poison() == []
        await registry.add_poison("b", 60)
        await registry.add_poison("a", 60)
        await registry.add_poison("short", 0.05)
        assert "a" in await registry.list_poison()
        await asyncio.sleep(0.1)
        assert await registry.list_poison() == ["a", "b"]
        assert await registry.list_workers() == []
