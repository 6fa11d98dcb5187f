from __future__ import annotations

import pytest

from forebay.kv.block_pool import BlockPool, Holder, OutOfBlocks

HASHES = [bytes([i]) * 16 for i in range(8)]


def cached_chain(pool: BlockPool, count: int) -> list[int]:
    blocks = pool.allocate(count, Holder.SEQUENCE)
    for block, block_hash in zip(blocks, HASHES, strict=False):
        pool.register(block, block_hash)
    pool.release(blocks, Holder.SEQUENCE)
    return blocks


def test_a_chain_loses_its_end_before_its_beginning() -> None:
    pool = BlockPool(4, 16)
    blocks = cached_chain(pool, 4)
    pool.allocate(2, Holder.SEQUENCE)
    assert pool.match(HASHES[:4]) == blocks[:2]
    pool.check_integrity()


def test_least_recently_used_chain_goes_first() -> None:
    pool = BlockPool(4, 16)
    old = cached_chain(pool, 2)
    pool.retain(old, Holder.SEQUENCE)
    newer = pool.allocate(2, Holder.SEQUENCE)
    for block, block_hash in zip(newer, HASHES[2:], strict=False):
        pool.register(block, block_hash)
    pool.release(newer, Holder.SEQUENCE)
    pool.release(old, Holder.SEQUENCE)
    pool.allocate(2, Holder.LEASE)
    assert pool.match(HASHES[:2]) == old
    assert pool.match(HASHES[2:4]) == []


def test_match_stops_at_the_first_gap() -> None:
    pool = BlockPool(4, 16)
    blocks = cached_chain(pool, 3)
    assert pool.match([HASHES[0], HASHES[5], HASHES[2]]) == blocks[:1]
    assert pool.match([HASHES[1]]) == blocks[1:2]


def test_first_block_of_a_hash_stays() -> None:
    pool = BlockPool(4, 16)
    first, second = pool.allocate(2, Holder.SEQUENCE)
    pool.register(first, HASHES[0])
    pool.register(second, HASHES[0])
    pool.register(first, HASHES[1])
    assert pool.match([HASHES[0]]) == [first]
    assert pool.match([HASHES[1]]) == []
    pool.release([first, second], Holder.SEQUENCE)
    counts = pool.counts()
    assert (counts.cached, counts.free) == (1, 3)


def test_too_many_blocks_wanted_takes_none() -> None:
    pool = BlockPool(2, 16)
    pool.allocate(1, Holder.LEASE)
    with pytest.raises(OutOfBlocks):
        pool.allocate(2, Holder.LEASE)
    assert pool.counts().leased == 1
    assert pool.allocate(0, Holder.LEASE) == []


def test_misuse_is_noticed() -> None:
    pool = BlockPool(2, 16)
    (block,) = pool.allocate(1, Holder.LEASE)
    with pytest.raises(AssertionError):
        pool.release([block], Holder.SEQUENCE)
    pool.release([block], Holder.LEASE)
    for misuse in (pool.retain, pool.release):
        with pytest.raises(AssertionError):
            misuse([block], Holder.LEASE)
    with pytest.raises(AssertionError):
        pool.register(block, HASHES[0])


@pytest.mark.parametrize(("num_tokens", "blocks"), [(0, 0), (1, 1), (16, 1), (17, 2)])
def test_blocks_for(num_tokens: int, blocks: int) -> None:
    assert BlockPool(1, 16).blocks_for(num_tokens) == blocks
