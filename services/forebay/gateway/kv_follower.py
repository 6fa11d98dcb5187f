"""Keeps a gateway's index of KV blocks in step with what the workers tell through Redis.

Of every worker's life it knows the last batch it has applied (its position) and, from the step
stream, the last batch the worker has made. A batch that is missing, a stream that has been
trimmed, flushed or set back, is noticed by one of the two; a snapshot then takes the place of what
was known. Nobody waits for it: until a worker is in step again it is not fresh.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Iterator

from google.protobuf.message import DecodeError

from forebay.core import clock
from forebay.core.errors import Unavailable
from forebay.gateway.kv_life import KvLife
from forebay.kv.block_hash import HASH_BYTES
from forebay.router.index import KvIndex, Tier
from forebay.rpc.v1 import kv_events_pb2
from forebay.store.kv_events import KvEntry, KvEventSource, KvPosition

log = logging.getLogger(__name__)

MAX_ENTRIES = 32
"""Of one stream in one read."""
BLOCK_S = 0.5
"""How long a read waits in Redis for something new."""
PAUSE_S = 0.05
PAUSE_A_STREAM_S = 0.0001
"""Between two reads: the more streams, the longer, so that asking costs little."""
RETRY_S = 0.5
SLICE_BLOCKS = 2048
"""Applied at once; then others have their turn."""
PIECE_BLOCKS = 32
"""What it costs to apply anything at all, in blocks."""
SWEEP_BLOCKS = 8192
SWEEP_S = 0.01
_TIERS: dict[int, Tier] = {
    kv_events_pb2.KV_TIER_DEVICE: Tier.DEVICE,
    kv_events_pb2.KV_TIER_HOST: Tier.HOST,
    kv_events_pb2.KV_TIER_DISK: Tier.DISK,
}

_Piece = tuple[Tier, bytes, bytes]
"""Some blocks stored and removed, for `KvIndex.apply`."""


class KvFollower:
    """`index` is written by nobody else, predictions apart. `stale_s`: how far behind its worker
    the index may be and still be trusted.

    num_gaps: times that a batch was found missing. num_resyncs: snapshots applied to a worker that
    was in step before. num_applied: blocks stored or removed by events and snapshots."""

    def __init__(self, source: KvEventSource, index: KvIndex, *, stale_s: float) -> None:
        self.num_gaps = 0
        self.num_resyncs = 0
        self.num_applied = 0
        self._source = source
        self._index = index
        self._stale_s = stale_s
        self._resync_after_s = stale_s / 2
        self._lives: dict[str, KvLife] = {}
        self._unanswered_since: float | None = None
        self._num_at_once = 0
        self._complaints: dict[str, str] = {}
        self._readable = asyncio.Event()
        self._must_heal = asyncio.Event()
        self._must_sweep = asyncio.Event()

    def follow(self, lives: Iterable[tuple[str, str]]) -> None:
        """(worker_id, epoch) of all workers there are; what was known of others is forgotten."""
        epochs = dict(lives)
        for worker_id, life in list(self._lives.items()):
            if epochs.get(worker_id) != life.epoch:
                life.leave()
                del self._lives[worker_id]
                self._index.leave(worker_id)
                self._must_sweep.set()
        for worker_id, epoch in epochs.items():
            if worker_id not in self._lives:
                slot = self._index.join(worker_id)
                self._lives[worker_id] = KvLife(worker_id, epoch, slot, clock.now())
                self._must_heal.set()

    def told(self, worker_id: str, epoch: str, seq: int) -> None:
        """The worker itself says that its last batch was `seq`."""
        life = self._lives.get(worker_id)
        if life is not None and life.epoch == epoch:
            life.told(seq, clock.now())

    async def run(self) -> None:
        """Until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._forever("read", self._read))
            tasks.create_task(self._forever("healed", self._heal))
            tasks.create_task(self._sweep_forever())

    async def close(self) -> None:
        """After `run` has ended."""
        await self._source.close()

    def is_fresh(self, worker_id: str) -> bool:
        """Whether the index says what that worker holds, or held a moment ago: one that misses a
        batch is of use until the snapshot comes."""
        life = self._lives.get(worker_id)
        return (
            life is not None
            and not life.is_empty
            and life.staleness_s(clock.now()) <= self._stale_s
        )

    @property
    def degraded(self) -> bool:
        """Whether the index is not to be used: Redis cannot be read, or of no worker is known what
        it holds."""
        if not self._lives:
            return False
        since = self._unanswered_since
        if since is not None and clock.now() - since > self._stale_s:
            return True
        return not any(self.is_fresh(worker_id) for worker_id in self._lives)

    @property
    def staleness_s(self) -> float:
        """Of the worker that the index is furthest behind."""
        now = clock.now()
        return max((life.staleness_s(now) for life in self._lives.values()), default=0.0)

    # Reading.

    async def _read(self) -> None:
        lives = [life for life in self._lives.values() if life.position is not None]
        if not lives:
            self._readable.clear()
            await self._readable.wait()
            return
        began = clock.now()
        if self._unanswered_since is None:
            self._unanswered_since = began
        positions = [KvPosition(life.worker_id, life.epoch, life.position or 0) for life in lives]
        streams = await self._source.read(positions, BLOCK_S, MAX_ENTRIES)
        self._unanswered_since = None
        for life, entries in zip(lives, streams, strict=True):
            await self._follow_up(life, entries)
            if len(entries) < MAX_ENTRIES:
                life.exhausted(began)
        await asyncio.sleep(max(PAUSE_S, PAUSE_A_STREAM_S * len(lives)))

    async def _follow_up(self, life: KvLife, entries: list[KvEntry]) -> None:
        for entry in entries:
            if life.position is None:
                return
            if entry.seq <= life.position:
                continue
            batch = _batch(entry)
            if batch is None or entry.seq > life.position + 1:
                self._lose(life, entry.seq if batch is None else entry.seq - 1)
                return
            pieces = (
                piece
                for changes in batch.changes
                for piece in _pieces(changes.tier, changes.stored, changes.removed)
            )
            if not await self._apply(life, pieces):
                return
            life.advance(entry.seq)

    def _lose(self, life: KvLife, needed: int) -> None:
        self.num_gaps += 1
        life.lose(needed, clock.now())
        self._must_heal.set()

    async def _apply(self, life: KvLife, pieces: Iterable[_Piece]) -> bool:
        """False when they became void on the way."""
        turn, slot = life.turn, life.slot
        for tier, stored, removed in pieces:
            self._index.apply(slot, tier, stored, removed)
            num_blocks = (len(stored) + len(removed)) // HASH_BYTES
            self.num_applied += num_blocks
            self._num_at_once += num_blocks + PIECE_BLOCKS
            if self._num_at_once > SLICE_BLOCKS:
                self._num_at_once = 0
                await asyncio.sleep(0)
                if life.turn != turn:
                    return False
        return True

    # Healing.

    async def _heal(self) -> None:
        self._must_heal.clear()
        for life in list(self._lives.values()):
            if life.retry_at <= clock.now() and life.wants_snapshot(self._resync_after_s):
                await self._heal_one(life)
        try:
            async with asyncio.timeout(RETRY_S):
                await self._must_heal.wait()
        except TimeoutError:
            return

    async def _heal_one(self, life: KvLife) -> None:
        data = await self._source.snapshot(life.worker_id, life.epoch)
        if self._lives.get(life.worker_id) is not life:
            return
        if not life.wants_snapshot(self._resync_after_s):
            return
        snapshot = _snapshot(data)
        if snapshot is None or snapshot.seq < life.least_useful:
            life.postpone(clock.now())
            await self._source.want(life.worker_id, life.epoch)
            return
        life.lose(snapshot.seq, clock.now())
        if not life.is_empty:
            self.num_resyncs += 1
            life.slot = self._index.join(life.worker_id)
            self._must_sweep.set()
        life.is_empty = False
        pieces = (
            piece for blocks in snapshot.tiers for piece in _pieces(blocks.tier, blocks.hashes, b"")
        )
        if await self._apply(life, pieces):
            life.in_step(snapshot.seq, clock.now())
            self._readable.set()

    async def _sweep_forever(self) -> None:
        """Slots that have been left are cleared in slices."""
        while True:
            await self._must_sweep.wait()
            self._must_sweep.clear()
            while self._index.sweep(SWEEP_BLOCKS):
                await asyncio.sleep(SWEEP_S)

    async def _forever(self, verb: str, turn: Callable[[], Awaitable[None]]) -> None:
        while True:
            try:
                await turn()
                self._complaints.pop(verb, None)
            except Unavailable as error:
                if self._complaints.get(verb) != error.message:
                    log.warning("the index of KV blocks is not %s: %s", verb, error.message)
                self._complaints[verb] = error.message
                await asyncio.sleep(RETRY_S)
            except Exception:
                log.exception("the index of KV blocks is not %s", verb)
                await asyncio.sleep(RETRY_S)


def _batch(entry: KvEntry) -> kv_events_pb2.KvEventBatch | None:
    """None for a mark, and for what cannot be read."""
    if not entry.batch:
        return None
    try:
        batch = kv_events_pb2.KvEventBatch.FromString(entry.batch)
    except DecodeError:
        return None
    whole = all(_is_whole(row.stored) and _is_whole(row.removed) for row in batch.changes)
    return batch if batch.seq == entry.seq and whole else None


def _snapshot(data: bytes | None) -> kv_events_pb2.KvSnapshot | None:
    """None for what cannot be read, too."""
    if data is None:
        return None
    try:
        snapshot = kv_events_pb2.KvSnapshot.FromString(data)
    except DecodeError:
        return None
    return snapshot if all(_is_whole(row.hashes) for row in snapshot.tiers) else None


def _is_whole(hashes: bytes) -> bool:
    return len(hashes) % HASH_BYTES == 0


def _pieces(kv_tier: int, stored: bytes, removed: bytes) -> Iterator[_Piece]:
    """None for a tier that is unknown here."""
    tier = _TIERS.get(kv_tier)
    if tier is None:
        return
    size = SLICE_BLOCKS * HASH_BYTES
    for start in range(0, len(removed), size):
        yield tier, b"", removed[start : start + size]
    for start in range(0, len(stored), size):
        yield tier, stored[start : start + size], b""
