"""KV events in the simulated Redis: the server's part, and the clients'."""

from __future__ import annotations

import asyncio
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from forebay.core import clock
from forebay.rpc.connector import Routes
from forebay.simulator.redis_client import RedisClient, redis_method
from forebay.store.kv_events import KvEntry, KvPosition, KvSnapshotWrite, KvStreamState

_WANTED_TTL_S = 30.0

Life = tuple[str, str]
Entries = tuple[KvEntry, ...]


APPEND = redis_method("KvAppend")
RESTART = redis_method("KvRestart")
PUT_SNAPSHOT = redis_method("KvPutSnapshot")
KEEP_ALIVE = redis_method("KvKeepAlive")
REMOVE_STREAM = redis_method("KvRemove")
READ = redis_method("KvRead")
SNAPSHOT = redis_method("KvSnapshot")
WANT = redis_method("KvWant")


@dataclass(slots=True, eq=False)
class _Stream:
    """Entries by number, a mark behind the batch of its number. top: of all there have been."""

    until: float
    entries: list[KvEntry] = field(default_factory=list)
    top: tuple[int, int] = (0, 0)

    def add(self, entry: KvEntry, *, vanishes: bool) -> bool:
        """Whether it was new."""
        is_new = _order(entry) > self.top
        if is_new:
            self.top = _order(entry)
            if not vanishes:
                self.entries.append(entry)
        return is_new

    def after(self, seq: int, max_entries: int) -> Entries:
        start = bisect_right(self.entries, (seq, 1), key=_order)
        return tuple(self.entries[start : start + max_entries])


def _order(entry: KvEntry) -> tuple[int, int]:
    return entry.seq, 0 if entry.batch else 1


class SimKvStreams:
    """All streams of one life of Redis. What has run out is forgotten when it is looked at.
    num_doomed: entries that will vanish as soon as they have been appended."""

    def __init__(self) -> None:
        self.num_doomed = 0
        self._streams: dict[Life, _Stream] = {}
        self._snapshots: dict[Life, tuple[float, bytes]] = {}
        self._wanted: dict[Life, float] = {}
        self._readers: list[asyncio.Future[None]] = []

    def __len__(self) -> int:
        return len(self._streams) + len(self._snapshots)

    def routes(self) -> Routes:
        return Routes(
            unary=[
                (APPEND, self.append),
                (RESTART, self.restart),
                (PUT_SNAPSHOT, self.put_snapshot),
                (KEEP_ALIVE, self.keep_alive),
                (REMOVE_STREAM, self.remove),
                (READ, self.read),
                (SNAPSHOT, self.snapshot),
                (WANT, self.want),
            ]
        )

    def flush(self) -> None:
        self._streams.clear()
        self._snapshots.clear()
        self._wanted.clear()

    def drop_entries(self, life: Life, wrong: Callable[[KvEntry], bool]) -> int:
        """As XDEL does. How many there were."""
        stream = self._stream(life)
        if stream is None:
            return 0
        kept = [entry for entry in stream.entries if not wrong(entry)]
        num_dropped = len(stream.entries) - len(kept)
        stream.entries = kept
        return num_dropped

    async def append(self, message: tuple[Life, Entries]) -> bool:
        life, entries = message
        stream = self._stream(life)
        if stream is None:
            return False
        self._add(stream, entries)
        return True

    async def restart(self, message: tuple[Life, Entries, KvSnapshotWrite, float]) -> tuple[()]:
        life, entries, snapshot, ttl_s = message
        stream = self._streams[life] = _Stream(clock.now() + ttl_s)
        self._snapshots[life] = (clock.now() + ttl_s, snapshot.data)
        self._add(stream, entries)
        return ()

    async def put_snapshot(self, message: tuple[Life, KvSnapshotWrite, float]) -> tuple[()]:
        life, snapshot, ttl_s = message
        self._snapshots[life] = (clock.now() + ttl_s, snapshot.data)
        self.drop_entries(life, lambda entry: entry.seq <= snapshot.keep_after)
        return ()

    async def keep_alive(self, message: tuple[Life, float]) -> KvStreamState:
        life, ttl_s = message
        stream, snapshot = self._stream(life), self._snapshot(life)
        until = clock.now() + ttl_s
        if stream is not None:
            stream.until = until
        if snapshot is not None:
            self._snapshots[life] = (until, snapshot)
        is_wanted = self._wanted.pop(life, 0.0) > clock.now()
        return KvStreamState(stream is not None and snapshot is not None, is_wanted)

    async def remove(self, life: Life) -> tuple[()]:
        for kind in (self._streams, self._snapshots, self._wanted):
            kind.pop(life, None)
        return ()

    async def read(self, message: tuple[tuple[KvPosition, ...], float, int]) -> tuple[Entries, ...]:
        positions, block_s, max_entries = message
        until = clock.now() + block_s
        while True:
            found = [self._after(position, max_entries) for position in positions]
            if any(found) or clock.now() >= until:
                return tuple(found)
            reader = asyncio.get_running_loop().create_future()
            self._readers.append(reader)
            try:
                async with asyncio.timeout_at(until):
                    await reader
            except TimeoutError:
                self._readers = [known for known in self._readers if known is not reader]

    async def snapshot(self, life: Life) -> bytes | None:
        return self._snapshot(life)

    async def want(self, life: Life) -> tuple[()]:
        self._wanted[life] = clock.now() + _WANTED_TTL_S
        return ()

    def _after(self, position: KvPosition, max_entries: int) -> Entries:
        stream = self._stream((position.worker_id, position.epoch))
        return () if stream is None else stream.after(position.seq, max_entries)

    def _add(self, stream: _Stream, entries: Sequence[KvEntry]) -> None:
        for entry in entries:
            vanishes = self.num_doomed > 0
            if stream.add(entry, vanishes=vanishes) and vanishes:
                self.num_doomed -= 1
        readers, self._readers = self._readers, []
        for reader in readers:
            if not reader.done():
                reader.set_result(None)

    def _stream(self, life: Life) -> _Stream | None:
        stream = self._streams.get(life)
        return stream if stream is not None and stream.until > clock.now() else None

    def _snapshot(self, life: Life) -> bytes | None:
        until, data = self._snapshots.get(life, (0.0, b""))
        return data if until > clock.now() else None


class SimKvEventSink:
    """Implements `KvEventSink`."""

    def __init__(self, client: RedisClient, worker_id: str, epoch: str) -> None:
        self._client = client
        self._life = (worker_id, epoch)

    async def append(self, entries: Sequence[KvEntry]) -> bool:
        return bool(await self._client.call(APPEND, (self._life, tuple(entries))))

    async def restart(
        self, entries: Sequence[KvEntry], snapshot: KvSnapshotWrite, ttl_s: float
    ) -> None:
        await self._client.call(RESTART, (self._life, tuple(entries), snapshot, ttl_s))

    async def put_snapshot(self, snapshot: KvSnapshotWrite, ttl_s: float) -> None:
        await self._client.call(PUT_SNAPSHOT, (self._life, snapshot, ttl_s))

    async def keep_alive(self, ttl_s: float) -> KvStreamState:
        state = await self._client.call(KEEP_ALIVE, (self._life, ttl_s))
        assert isinstance(state, KvStreamState)
        return state

    async def remove(self) -> None:
        await self._client.call(REMOVE_STREAM, self._life)

    async def close(self) -> None:
        await self._client.close()


class SimKvEventSource:
    """Implements `KvEventSource`."""

    def __init__(self, client: RedisClient) -> None:
        self._client = client

    async def read(
        self, positions: Sequence[KvPosition], block_s: float, max_entries: int
    ) -> list[list[KvEntry]]:
        message = (tuple(positions), block_s, max_entries)
        return [list(entries) for entries in await self._client.call(READ, message, block_s)]

    async def snapshot(self, worker_id: str, epoch: str) -> bytes | None:
        data: bytes | None = await self._client.call(SNAPSHOT, (worker_id, epoch))
        return data

    async def want(self, worker_id: str, epoch: str) -> None:
        await self._client.call(WANT, (worker_id, epoch))

    async def close(self) -> None:
        await self._client.close()
