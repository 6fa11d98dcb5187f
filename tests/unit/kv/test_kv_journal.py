from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from forebay.kv.block_pool import BlockPool, Holder
from forebay.kv.journal import KvChanges, KvJournal

A, B, C = (bytes([i]) * 16 for i in range(3))


def test_the_last_state_of_a_hash_wins() -> None:
    journal = KvJournal()
    journal.stored(A)
    journal.stored(B)
    journal.removed(A)
    journal.removed(C)
    journal.stored(C)
    assert journal.take() == KvChanges((B, C), (A,))
    assert not journal.take()


def test_changes_come_in_the_order_of_their_last_change() -> None:
    journal = KvJournal()
    for block_hash in (A, B, C):
        journal.stored(block_hash)
    journal.removed(A)
    journal.stored(A)
    assert journal.take().stored == (B, C, A)


def test_only_batches_with_something_in_them_are_numbered() -> None:
    journal = KvJournal()
    assert (len(journal.take()), journal.seq) == (0, 0)
    journal.stored(A)
    assert (len(journal.take()), journal.seq) == (1, 1)
    assert (len(journal.take()), journal.seq) == (0, 1)
    journal.removed(A)
    assert (len(journal.take()), journal.seq) == (1, 2)


def test_a_journal_says_once_that_it_is_not_empty() -> None:
    calls: list[int] = []
    journal = KvJournal(lambda: calls.append(len(journal)))
    journal.stored(A)
    journal.stored(B)
    assert calls == [1]
    journal.take()
    journal.removed(A)
    assert calls == [1, 1]


@given(st.lists(st.tuples(st.integers(0, 11), st.booleans()), max_size=60))
def test_replaying_all_batches_gives_the_pool(steps: list[tuple[int, bool]]) -> None:
    pool = BlockPool(6, 2)
    journal = pool.journal = KvJournal()
    mirror: set[bytes] = set()
    for number, take in steps:
        (block,) = pool.allocate(1, Holder.SEQUENCE)
        pool.register(block, bytes([number]) * 16)
        pool.release([block], Holder.SEQUENCE)
        if take:
            changes = journal.take()
            assert not set(changes.stored) & set(changes.removed)
            mirror = (mirror | set(changes.stored)) - set(changes.removed)
            assert mirror == set(pool.hashes())
    changes = journal.take()
    assert (mirror | set(changes.stored)) - set(changes.removed) == set(pool.hashes())


def test_hashes_come_in_the_order_in_which_they_became_findable() -> None:
    pool = BlockPool(4, 2)
    blocks = pool.allocate(3, Holder.SEQUENCE)
    for block, block_hash in zip(reversed(blocks), (A, B, C), strict=True):
        pool.register(block, block_hash)
    assert pool.hashes() == [A, B, C]
    pool.release(blocks, Holder.SEQUENCE)
    pool.allocate(2, Holder.LEASE)
    assert len(pool.hashes()) == 2
