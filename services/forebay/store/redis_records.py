"""Records with a time-to-live in Redis: a key each, and a set of their ids."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from typing import cast

import redis.asyncio as redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from forebay.core.errors import ConfigurationError, Unavailable

_TIMEOUT_S = 2.0


def connect(url: str) -> redis.Redis:
    """Connects on first use. Raises ConfigurationError for a URL that is none.

    The client's own timeouts stay off: on Python 3.11 they go through `asyncio.wait_for`, which
    can swallow a cancellation. One retry, for a connection that Redis has closed."""
    try:
        return redis.Redis.from_url(
            url,
            socket_timeout=None,
            socket_connect_timeout=None,
            retry=Retry(NoBackoff(), 1),
        )
    except ValueError as error:
        raise ConfigurationError(f"Redis URL: {error}") from error


class RedisRecords:
    """All records of one kind: `forebay:<kind>:<id>`, ids in `forebay:<kind>s`. Every call raises
    Unavailable when Redis does not answer in time."""

    def __init__(self, client: redis.Redis, kind: str) -> None:
        self._client = client
        self._ids = f"forebay:{kind}s"
        self._prefix = f"forebay:{kind}:"

    async def put(self, record_id: str, record: bytes, ttl_s: float) -> None:
        async with translated(), self._client.pipeline(transaction=True) as pipe:
            pipe.set(self._prefix + record_id, record, px=max(1, int(ttl_s * 1000)))
            pipe.sadd(self._ids, record_id)
            await pipe.execute()

    async def remove(self, record_id: str) -> None:
        async with translated(), self._client.pipeline(transaction=True) as pipe:
            pipe.delete(self._prefix + record_id)
            pipe.srem(self._ids, record_id)
            await pipe.execute()

    async def list(self) -> dict[str, bytes]:
        """By id, in the order of the ids. Forgets the ids of records that have run out."""
        async with translated():
            members = await cast("Awaitable[set[bytes]]", self._client.smembers(self._ids))
            ids = sorted(member.decode() for member in members)
            found = await self._client.mget([self._prefix + i for i in ids]) if ids else []
            records = dict(zip(ids, found, strict=True))
            gone = [i for i, record in records.items() if record is None]
            if gone:
                await self._client.srem(self._ids, *gone)
        return {i: cast(bytes, record) for i, record in records.items() if record is not None}


@asynccontextmanager
async def translated(wait_s: float = 0.0) -> AsyncIterator[None]:
    """One call to Redis, which is to wait for `wait_s` there. Raises Unavailable when the answer
    takes `_TIMEOUT_S` longer."""
    try:
        async with asyncio.timeout(wait_s + _TIMEOUT_S):
            yield
    except TimeoutError as error:
        raise Unavailable(f"Redis did not answer within {_TIMEOUT_S:.0f} s") from error
    except (RedisError, OSError) as error:
        raise Unavailable(f"Redis: {error}") from error
