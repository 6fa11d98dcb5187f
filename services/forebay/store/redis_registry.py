"""The worker registry in Redis: a key with a time-to-live per worker, and a set of their ids."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from typing import cast

import redis.asyncio as redis
from google.protobuf.message import DecodeError
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from forebay.core.errors import ConfigurationError, Unavailable
from forebay.rpc.v1 import worker_pb2

log = logging.getLogger(__name__)

_IDS = "forebay:workers"
_TIMEOUT_S = 2.0


class RedisRegistry:
    """Implements `Registry`."""

    def __init__(self, client: redis.Redis) -> None:
        self._client = client

    @classmethod
    def connect(cls, url: str) -> RedisRegistry:
        """Connects on first use. Raises ConfigurationError for a URL that is none.

        The client's own timeouts stay off: on Python 3.11 they go through `asyncio.wait_for`,
        which can swallow a cancellation. One retry, for a connection that Redis has closed."""
        try:
            client = redis.Redis.from_url(
                url,
                socket_timeout=None,
                socket_connect_timeout=None,
                retry=Retry(NoBackoff(), 1),
            )
        except ValueError as error:
            raise ConfigurationError(f"Redis URL: {error}") from error
        return cls(client)

    async def publish(self, worker: worker_pb2.WorkerDescription, ttl_s: float) -> None:
        async with _translated(), self._client.pipeline(transaction=True) as pipe:
            record = worker.SerializeToString()
            pipe.set(_key(worker.worker_id), record, px=max(1, int(ttl_s * 1000)))
            pipe.sadd(_IDS, worker.worker_id)
            await pipe.execute()

    async def remove(self, worker_id: str) -> None:
        async with _translated(), self._client.pipeline(transaction=True) as pipe:
            pipe.delete(_key(worker_id))
            pipe.srem(_IDS, worker_id)
            await pipe.execute()

    async def list_workers(self) -> list[worker_pb2.WorkerDescription]:
        async with _translated():
            members = await cast("Awaitable[set[bytes]]", self._client.smembers(_IDS))
            ids = sorted(member.decode() for member in members)
            records = await self._client.mget([_key(i) for i in ids]) if ids else []
            gone = [i for i, record in zip(ids, records, strict=True) if record is None]
            if gone:
                await self._client.srem(_IDS, *gone)
        workers = []
        for worker_id, record in zip(ids, records, strict=True):
            try:
                if record is not None:
                    worker = worker_pb2.WorkerDescription.FromString(cast(bytes, record))
                    workers.append(worker)
            except DecodeError:
                log.warning("the record of worker %s cannot be read", worker_id)
        return workers

    async def close(self) -> None:
        await self._client.aclose()


def _key(worker_id: str) -> str:
    return f"forebay:worker:{worker_id}"


@asynccontextmanager
async def _translated() -> AsyncIterator[None]:
    """One call to Redis, within `_TIMEOUT_S`."""
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            yield
    except TimeoutError as error:
        raise Unavailable(f"Redis did not answer within {_TIMEOUT_S:.0f} s") from error
    except (RedisError, OSError) as error:
        raise Unavailable(f"Redis: {error}") from error
