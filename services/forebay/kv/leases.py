"""Leases: KV blocks a worker keeps for KV that is on its way and has not been committed yet: of a
prompt that it will decode, or of a prefix that it will not compute.

How long one lasts is its request's matter (forebay.worker.request_table). It ends by `take` (the
KV is whole, a sequence goes on with the blocks), by `keep` (a prefix is there, and cached) or by
`release`. Blocks of a lease that ends while a write to them may still land go into quarantine until
the write is over.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from forebay.core.errors import KvTransferError
from forebay.kv.block_pool import BlockPool, Holder


@dataclass(slots=True)
class Lease:
    """owner: whose tokens these are. block_table: blocks of all `num_tokens`, the leading
    `num_cached_tokens` of which already hold their KV. is_prefix: full blocks for the prefix cache,
    of which fewer may come; no sequence takes them over."""

    lease_id: str
    owner: Hashable
    block_table: list[int]
    num_cached_tokens: int
    num_tokens: int
    is_prefix: bool = False
    num_writes: int = 0
    ended: bool = False


class LeaseTable:
    """The leases of one worker process; `epoch` names the process's life."""

    def __init__(self, pool: BlockPool, epoch: str) -> None:
        self.epoch = epoch
        self._pool = pool
        self._leases: dict[str, Lease] = {}
        self._quarantined: dict[str, Lease] = {}

    def __len__(self) -> int:
        return len(self._leases)

    def grant(
        self,
        lease_id: str,
        owner: Hashable,
        hashes: Sequence[bytes],
        num_tokens: int,
        *,
        is_prefix: bool = False,
    ) -> Lease:
        """Holds blocks for `num_tokens`, of which `hashes` are the full blocks' hashes. Raises
        OutOfBlocks, and then holds nothing."""
        assert lease_id not in self._leases
        cached = self._pool.match(hashes)
        self._pool.retain(cached, Holder.LEASE)
        try:
            fresh = self._pool.allocate(
                self._pool.blocks_for(num_tokens) - len(cached), Holder.LEASE
            )
        except BaseException:
            self._pool.release(cached, Holder.LEASE)
            raise
        lease = Lease(
            lease_id=lease_id,
            owner=owner,
            block_table=cached + fresh,
            num_cached_tokens=len(cached) * self._pool.block_size,
            num_tokens=num_tokens,
            is_prefix=is_prefix,
        )
        self._leases[lease_id] = lease
        return lease

    def get(self, lease_id: str, epoch: str) -> Lease:
        """Raises KvTransferError for a lease of another life, or one that has ended."""
        lease = self._leases.get(lease_id)
        if epoch != self.epoch or lease is None:
            raise KvTransferError(f"no lease {lease_id!r} is held here in epoch {epoch!r}")
        return lease

    def begin_write(self, lease: Lease) -> None:
        lease.num_writes += 1

    def end_write(self, lease: Lease) -> None:
        """Must follow every `begin_write`, whatever became of the lease."""
        assert lease.num_writes > 0
        lease.num_writes -= 1
        if lease.ended and lease.num_writes == 0:
            del self._quarantined[lease.lease_id]
            self._pool.release(lease.block_table, Holder.QUARANTINE)

    def take(self, lease: Lease) -> list[int]:
        """Ends the lease; its blocks are now held once as a sequence's."""
        assert lease.num_writes == 0
        self._end(lease)
        self._pool.move(lease.block_table, Holder.LEASE, Holder.SEQUENCE)
        return lease.block_table

    def keep(self, lease: Lease, hashes: Sequence[bytes]) -> None:
        """Ends the lease; its leading blocks, whose hashes these are, are now in the prefix
        cache."""
        assert lease.is_prefix and lease.num_writes == 0
        for block, block_hash in zip(lease.block_table, hashes, strict=False):
            self._pool.register(block, block_hash)
        self.release(lease)

    def release(self, lease: Lease) -> None:
        self._end(lease)
        if lease.num_writes == 0:
            self._pool.release(lease.block_table, Holder.LEASE)
        else:
            self._quarantined[lease.lease_id] = lease
            self._pool.move(lease.block_table, Holder.LEASE, Holder.QUARANTINE)

    def check_integrity(self) -> None:
        assert all(not lease.ended for lease in self._leases.values())
        assert all(lease.ended and lease.num_writes for lease in self._quarantined.values())

    def _end(self, lease: Lease) -> None:
        assert not lease.ended
        lease.ended = True
        del self._leases[lease.lease_id]
