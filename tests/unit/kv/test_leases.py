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


def test_a_kept_prefix_is_cached_as_far_as_it_came(pool: BlockPool, leases: LeaseTable) -> None:
    hashes = [bytes([i]) * 16 for i in range(3)]
    lease = leases.grant("a", "owner", hashes, 6, is_prefix=True)
    leases.keep(lease, hashes[:2])
    counts = pool.counts()
    assert (counts.cached, counts.free, counts.leased) == (2, 2, 0)
    assert pool.match(hashes) == lease.block_table[:2]
    pool.allocate(3, Holder.SEQUENCE)
    assert pool.match(hashes) == lease.block_table[:1], "its end goes first"
    leases.check_integrity()
    pool.check_integrity()
    with pytest.raises(KvTransferError):
        leases.get("a", "epoch")


def test_a_prefix_that_came_twice_is_kept_once(pool: BlockPool, leases: LeaseTable) -> None:
    hashes = [b"h" * 16]
    first = leases.grant("a", "owner", hashes, 2, is_prefix=True)
    second = leases.grant("b", "other", hashes, 2, is_prefix=True)
    leases.keep(first, hashes)
    leases.keep(second, hashes)
    assert pool.match(hashes) == first.block_table
    assert (pool.counts().cached, pool.counts().free) == (1, 3)
    pool.check_integrity()


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
