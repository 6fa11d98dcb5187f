"""Tells gateways, through Redis, which KV blocks this worker holds.

Changes of the pool are gathered for a moment, numbered, and appended to the worker's own stream.
Beside it lies a snapshot for those who come late or have lost the thread. What Redis does not take
waits, up to a bound; what has gone beyond the bound, or was in a stream that Redis has lost, is
covered by a new snapshot. No request waits for any of this.
"""

from __future__ import annotations

import asyncio
import logging

from forebay.core import clock
from forebay.core.errors import Unavailable
from forebay.kv.block_pool import BlockPool
from forebay.kv.journal import KvChanges, KvJournal
from forebay.rpc.v1 import kv_events_pb2
from forebay.store.kv_events import KvEntry, KvEventSink, KvSnapshotWrite

log = logging.getLogger(__name__)

SNAPSHOT_BLOCKS = 32_768
"""A snapshot is written after that many changed blocks, or after as many as it would hold."""
SNAPSHOT_BATCHES = 4096
MAX_PENDING_BLOCKS = 65_536
"""Changed blocks that may wait for Redis; a snapshot takes the place of more."""
MAX_PENDING_BATCHES = 1024
RETRY_S = 0.5
TTL_HEARTBEATS = 30
"""Signs of life that may be missed before stream and snapshot go."""


class KvPublisher:
    """Numbers the changes of `pool` from its start on: make it before the pool is used.
    `interval_s`: how long changes are gathered. `heartbeat_s`: how often the stream is kept alive
    when there is nothing to tell, and wishes for snapshots are looked for.

    num_snapshots, num_batches, num_failures: written; appended; calls that Redis did not answer."""

    def __init__(
        self, pool: BlockPool, sink: KvEventSink, *, interval_s: float, heartbeat_s: float
    ) -> None:
        self.num_snapshots = 0
        self.num_batches = 0
        self.num_failures = 0
        self._pool = pool
        self._sink = sink
        self._interval_s = interval_s
        self._heartbeat_s = heartbeat_s
        self._ttl_s = TTL_HEARTBEATS * heartbeat_s
        self._changed = asyncio.Event()
        self._journal = pool.journal = KvJournal(self._changed.set)
        self._pending: list[KvEntry] = []
        self._num_pending_blocks = 0
        self._must_restart = True
        self._snapshot_wanted = False
        self._snapshot_seq = 0
        self._num_blocks_since = 0
        self._num_batches_since = 0
        self._beat_at = 0.0
        self._complaint = ""

    @property
    def seq(self) -> int:
        """Number of the last batch that was made."""
        return self._journal.seq

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            try:
                await self.publish()
                self._complaint = ""
                await self._pause()
            except Unavailable as error:
                self._failed(error.message)
                await asyncio.sleep(RETRY_S)
            except Exception:
                log.exception("KV events cannot be published")
                self._must_restart = True
                await asyncio.sleep(RETRY_S)

    async def close(self) -> None:
        """After `run` has ended: takes the stream away."""
        try:
            await self._sink.remove()
        except Unavailable as error:
            log.warning("KV events stay until they expire: %s", error.message)
        await self._sink.close()

    async def publish(self) -> None:
        """Everything that there is to tell. Raises Unavailable; the rest then waits."""
        self._collect()
        if self._must_restart:
            await self._restart()
        elif self._pending:
            await self._append()
        if clock.now() >= self._beat_at:
            state = await self._sink.keep_alive(self._ttl_s)
            self._beat_at = clock.now() + self._heartbeat_s
            self._snapshot_wanted |= state.is_wanted
            if not state.is_there:
                self._must_restart = True
                await self._restart()
        if self._snapshot_wanted or self._snapshot_due():
            await self._put_snapshot()

    async def _pause(self) -> None:
        """Until there is something to tell and it has been gathered, or for a heartbeat."""
        if not (self._pending or self._must_restart):
            try:
                async with asyncio.timeout_at(self._beat_at):
                    await self._changed.wait()
            except TimeoutError:
                return
        await asyncio.sleep(self._interval_s)

    def _failed(self, message: str) -> None:
        self.num_failures += 1
        if message != self._complaint:
            log.warning("KV events wait: %s", message)
        self._complaint = message

    def _collect(self) -> None:
        """Makes a batch of what has changed. When too much waits already, the stream is begun anew
        instead."""
        self._changed.clear()
        changes = self._journal.take()
        if not len(changes):
            return
        self._pending.append(KvEntry(self.seq, _encoded(self.seq, changes)))
        self._num_pending_blocks += len(changes)
        self._num_blocks_since += len(changes)
        self._num_batches_since += 1
        if (
            self._num_pending_blocks > MAX_PENDING_BLOCKS
            or len(self._pending) > MAX_PENDING_BATCHES
        ):
            self._drop_pending()
            self._must_restart = True

    async def _append(self) -> None:
        """Without a stream, because Redis has been flushed, it is begun anew."""
        if await self._sink.append(self._pending):
            self.num_batches += len(self._pending)
            self._drop_pending()
        else:
            self._must_restart = True
            await self._restart()

    async def _restart(self) -> None:
        """Those that have read all before what is pending need no snapshot."""
        self._collect()
        snapshot = self._snapshot(keep_after=0)
        mark = KvEntry(snapshot.seq, b"")
        await self._sink.restart(self._pending or (mark,), snapshot, self._ttl_s)
        self._must_restart = False
        self.num_batches += len(self._pending)
        self._drop_pending()
        self._wrote(snapshot)
        self._beat_at = clock.now() + self._heartbeat_s

    async def _put_snapshot(self) -> None:
        """The stream keeps what has come since the snapshot before, for those who are behind."""
        self._collect()
        if self._must_restart:
            return
        snapshot = self._snapshot(keep_after=self._snapshot_seq)
        await self._sink.put_snapshot(snapshot, self._ttl_s)
        self._wrote(snapshot)

    def _wrote(self, snapshot: KvSnapshotWrite) -> None:
        self._snapshot_seq = snapshot.seq
        self._snapshot_wanted = False
        self._num_blocks_since = self._num_batches_since = 0
        self.num_snapshots += 1

    def _snapshot_due(self) -> bool:
        return (
            self._num_blocks_since > max(SNAPSHOT_BLOCKS, self._pool.num_blocks)
            or self._num_batches_since > SNAPSHOT_BATCHES
        )

    def _snapshot(self, keep_after: int) -> KvSnapshotWrite:
        """Of this moment: call it after `_collect` with nothing awaited in between."""
        message = kv_events_pb2.KvSnapshot(seq=self.seq)
        message.tiers.add(tier=kv_events_pb2.KV_TIER_DEVICE, hashes=b"".join(self._pool.hashes()))
        return KvSnapshotWrite(message.SerializeToString(), self.seq, keep_after)

    def _drop_pending(self) -> None:
        self._pending = []
        self._num_pending_blocks = 0


def _encoded(seq: int, changes: KvChanges) -> bytes:
    message = kv_events_pb2.KvEventBatch(seq=seq)
    message.changes.add(
        tier=kv_events_pb2.KV_TIER_DEVICE,
        stored=b"".join(changes.stored),
        removed=b"".join(changes.removed),
    )
    return message.SerializeToString()
