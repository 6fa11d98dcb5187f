"""KV events in Redis (6.2 or newer), or in anything that speaks its protocol.

`forebay:kv:{worker_id}:{epoch}` is the stream. Batch n has the id n-0, so that a batch that is sent
twice is refused, and a stream that was lost goes on with the numbers it had. A mark has n-1: it is
new to those that have not read n, and to nobody else. `...:snapshot` and `...:wanted` stand beside
the stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import redis.asyncio as redis
from redis.exceptions import RedisError, ResponseError

from forebay.store.kv_events import KvEntry, KvPosition, KvSnapshotWrite, KvStreamState
from forebay.store.redis_records import connect, translated

MAX_STREAMS = 512
"""Read by one command; more are read one command after the other, none of which waits."""
_FIELD = b"b"
_WANTED_TTL_MS = 30_000
_ALREADY_THERE = "equal or smaller"


def _stream(worker_id: str, epoch: str) -> str:
    return f"forebay:kv:{worker_id}:{epoch}"


def _snapshot(worker_id: str, epoch: str) -> str:
    return f"{_stream(worker_id, epoch)}:snapshot"


def _wanted(worker_id: str, epoch: str) -> str:
    return f"{_stream(worker_id, epoch)}:wanted"


class RedisKvEventSink:
    """Implements `KvEventSink`."""

    def __init__(self, client: redis.Redis, worker_id: str, epoch: str) -> None:
        self._client = client
        self._stream = _stream(worker_id, epoch)
        self._snapshot = _snapshot(worker_id, epoch)
        self._wanted = _wanted(worker_id, epoch)

    @classmethod
    def connect(cls, url: str, worker_id: str, epoch: str) -> RedisKvEventSink:
        """Connects on first use. Raises ConfigurationError for a URL that is none."""
        return cls(connect(url), worker_id, epoch)

    async def append(self, entries: Sequence[KvEntry]) -> bool:
        async with translated(), self._client.pipeline(transaction=len(entries) > 1) as pipe:
            for entry in entries:
                pipe.execute_command("XADD", self._stream, "NOMKSTREAM", *_added(entry))
            answers = await pipe.execute(raise_on_error=False)
            return not any(_is_refused(answer) for answer in answers)

    async def restart(
        self, entries: Sequence[KvEntry], snapshot: KvSnapshotWrite, ttl_s: float
    ) -> None:
        async with translated(), self._client.pipeline(transaction=True) as pipe:
            pipe.delete(self._stream)
            for entry in entries:
                pipe.execute_command("XADD", self._stream, *_added(entry))
            pipe.pexpire(self._stream, _ms(ttl_s))
            pipe.set(self._snapshot, snapshot.data, px=_ms(ttl_s))
            await pipe.execute()

    async def put_snapshot(self, snapshot: KvSnapshotWrite, ttl_s: float) -> None:
        async with translated(), self._client.pipeline(transaction=True) as pipe:
            pipe.set(self._snapshot, snapshot.data, px=_ms(ttl_s))
            pipe.execute_command("XTRIM", self._stream, "MINID", f"{snapshot.keep_after + 1}-0")
            await pipe.execute()

    async def keep_alive(self, ttl_s: float) -> KvStreamState:
        async with translated(), self._client.pipeline(transaction=False) as pipe:
            pipe.pexpire(self._stream, _ms(ttl_s))
            pipe.pexpire(self._snapshot, _ms(ttl_s))
            pipe.getdel(self._wanted)
            stream, snapshot, wanted = await pipe.execute()
        return KvStreamState(bool(stream and snapshot), wanted is not None)

    async def remove(self) -> None:
        async with translated():
            await self._client.unlink(self._stream, self._snapshot, self._wanted)

    async def close(self) -> None:
        await self._client.aclose()


class RedisKvEventSource:
    """Implements `KvEventSource`."""

    def __init__(self, client: redis.Redis) -> None:
        self._client = client

    @classmethod
    def connect(cls, url: str) -> RedisKvEventSource:
        """Connects on first use. Raises ConfigurationError for a URL that is none."""
        return cls(connect(url))

    async def read(
        self, positions: Sequence[KvPosition], block_s: float, max_entries: int
    ) -> list[list[KvEntry]]:
        if len(positions) <= MAX_STREAMS:
            return await self._read(positions, block_s, max_entries)
        entries: list[list[KvEntry]] = []
        for start in range(0, len(positions), MAX_STREAMS):
            chunk = positions[start : start + MAX_STREAMS]
            entries += await self._read(chunk, None, max_entries)
        return entries

    async def snapshot(self, worker_id: str, epoch: str) -> bytes | None:
        async with translated():
            return cast("bytes | None", await self._client.get(_snapshot(worker_id, epoch)))

    async def want(self, worker_id: str, epoch: str) -> None:
        async with translated():
            await self._client.set(_wanted(worker_id, epoch), b"1", px=_WANTED_TTL_MS)

    async def close(self) -> None:
        await self._client.aclose()

    async def _read(
        self, positions: Sequence[KvPosition], block_s: float | None, max_entries: int
    ) -> list[list[KvEntry]]:
        after: dict[Any, Any] = {
            _stream(worker_id, epoch).encode(): f"{seq}-1" for worker_id, epoch, seq in positions
        }
        block_ms = None if block_s is None else _ms(block_s)
        async with translated(block_s or 0.0):
            answer = await self._client.xread(after, count=max_entries, block=block_ms)
        found = dict(_rows(answer))
        return [found.get(key, []) for key in after]


def _added(entry: KvEntry) -> tuple[str, bytes, bytes]:
    return f"{entry.seq}-{0 if entry.batch else 1}", _FIELD, entry.batch


def _is_refused(answer: Any) -> bool:
    """Whether a batch was not taken for want of a stream."""
    if isinstance(answer, ResponseError) and _ALREADY_THERE in str(answer):
        return False
    if isinstance(answer, RedisError):
        raise answer
    return answer is None


def _rows(answer: Any) -> list[tuple[bytes, list[KvEntry]]]:
    """Of XREAD's answer, which is a list in RESP2 and a dictionary in RESP3."""
    rows = answer.items() if isinstance(answer, dict) else (answer or ())
    return [(key, [_entry(*item) for item in _flat(items)]) for key, items in rows]


def _flat(items: Any) -> Any:
    """redis-py wraps the entries of a stream once more in RESP3."""
    return items[0] if items and isinstance(items[0], list) else items


def _entry(entry_id: bytes, fields: dict[bytes, bytes]) -> KvEntry:
    return KvEntry(int(entry_id.partition(b"-")[0]), fields[_FIELD])


def _ms(seconds: float) -> int:
    return max(1, int(seconds * 1000))
