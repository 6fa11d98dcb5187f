from __future__ import annotations

import pytest

from forebay.core.errors import KvTransferError
from forebay.kv.block_pool import BlockPool, Holder, OutOfBlocks
from forebay.kv.leases import LeaseTable


@pytest.fixture
def pool() -> BlockPool:
    return BlockPool(4, 2)


@pytest.fixture
def leases(pool: BlockPool) -> LeaseTable:
    return LeaseTable(pool, "epoch")


def test_blocks_of_a_released_lease_wait_for_the_write_under_way(
    pool: BlockPool, leases: LeaseTable
) -> None:
    lease = leases.grant("a", "owner", [], 6)
    leases.begin_write(lease)
    leases.begin_write(lease)
    leases.release(lease)
    assert pool.counts().quarantined == 3
    with pytest.raises(OutOfBlocks):
        pool.allocate(2, Holder.SEQUENCE)
    leases.end_write(lease)
    assert pool.counts().quarantined == 3
    leases.end_write(lease)
    assert pool.counts().free == 4
    leases.check_integrity()


def test_a_lease_of_another_life_is_void(leases: LeaseTable) -> None:
    lease = leases.grant("a", "owner", [], 2)
    assert leases.get("a", "epoch") is lease
    for lease_id, epoch in (("a", "other"), ("b", "epoch"), ("", "")):
        with pytest.raises(KvTransferError, match="no lease"):
            leases.get(lease_id, epoch)


def test_a_failed_grant_holds_nothing(pool: BlockPool, leases: LeaseTable) -> None:
    (block,) = pool.allocate(1, Holder.SEQUENCE)
    pool.register(block, b"h" * 16)
    pool.release([block], Holder.SEQUENCE)
    with pytest.raises(OutOfBlocks):
        leases.grant("a", "owner", [b"h" * 16], 10)
    counts = pool.counts()
    assert (counts.cached, counts.free, counts.leased) == (1, 3, 0)


def test_cached_blocks_lead_the_table(pool: BlockPool, leases: LeaseTable) -> None:
    (block,) = pool.allocate(1, Holder.SEQUENCE)
    pool.register(block, b"h" * 16)
    pool.release([block], Holder.SEQUENCE)
    lease = leases.grant("a", "owner", [b"h" * 16, b"i" * 16], 5)
    assert lease.block_table[0] == block
    assert (lease.num_cached_tokens, len(lease.block_table)) == (2, 3)
    assert leases.take(lease) == lease.block_table
    counts = pool.counts()
    assert (counts.used, counts.leased) == (3, 0)
