"""Where workers tell which KV blocks they hold, and gateways read it; in memory for simulation.

Every life of a worker (worker_id, epoch) has a stream of numbered batches and a snapshot. What they
say is `kv_events.proto`'s matter; here they are bytes. Both go when nobody keeps them alive. Every
call returns within a few seconds or raises Unavailable; after that its effect is uncertain.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol


class KvEntry(NamedTuple):
    """One entry of a stream. An empty `batch` marks that what led to `seq` is not in the stream:
    only a snapshot says it."""

    seq: int
    batch: bytes


class KvPosition(NamedTuple):
    """`seq`: of the last entry that has been read."""

    worker_id: str
    epoch: str
    seq: int


@dataclass(frozen=True, slots=True)
class KvSnapshotWrite:
    """`keep_after`: entries up to that number are dropped from the stream."""

    data: bytes
    seq: int
    keep_after: int


@dataclass(frozen=True, slots=True)
class KvStreamState:
    """is_there: the stream and its snapshot exist. is_wanted: somebody has asked for a snapshot
    since this was last looked at."""

    is_there: bool
    is_wanted: bool


class KvEventSink(Protocol):
    """One life's own stream. `ttl_s`: how long it outlives its last sign of life."""

    async def append(self, entries: Sequence[KvEntry]) -> bool:
        """All or none; those that are there already count as appended. False: there is no stream
        any more, nothing was appended."""

    async def restart(
        self, entries: Sequence[KvEntry], snapshot: KvSnapshotWrite, ttl_s: float
    ) -> None:
        """A new stream that begins with `entries`, of which there is one at least."""

    async def put_snapshot(self, snapshot: KvSnapshotWrite, ttl_s: float) -> None: ...

    async def keep_alive(self, ttl_s: float) -> KvStreamState: ...

    async def remove(self) -> None: ...

    async def close(self) -> None: ...


class KvEventSource(Protocol):
    async def read(
        self, positions: Sequence[KvPosition], block_s: float, max_entries: int
    ) -> list[list[KvEntry]]:
        """What comes after each position, in order and at most `max_entries` of each. Waits up to
        `block_s` when there is nothing; need not wait when there are very many positions."""

    async def snapshot(self, worker_id: str, epoch: str) -> bytes | None: ...

    async def want(self, worker_id: str, epoch: str) -> None:
        """Asks the worker for a snapshot."""

    async def close(self) -> None: ...
