"""Every order of operations on a block pool and its leases, with the invariants after each."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from forebay.core.errors import KvTransferError
from forebay.kv.block_hash import HashChain, cache_root
from forebay.kv.block_pool import BlockPool, Holder, OutOfBlocks
from forebay.kv.leases import Lease, LeaseTable

NUM_BLOCKS = 8
BLOCK_SIZE = 2
EPOCH = "epoch"
ROOT = cache_root(b"salt")
prompts = st.lists(st.integers(0, 1), min_size=1, max_size=10)


def hashes(prompt: list[int]) -> list[bytes]:
    return list(HashChain(ROOT, BLOCK_SIZE).upto(prompt))


class PoolMachine(RuleBasedStateMachine):
    """`tables` and `leases` may name what has ended already: rules skip those."""

    tables = Bundle("tables")
    leases = Bundle("leases")

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(NUM_BLOCKS, BLOCK_SIZE)
        self.leased = LeaseTable(self.pool, EPOCH)
        self.held: list[list[int]] = []
        self.writing: list[Lease] = []
        self.num_granted = 0
        self.granted: list[Lease] = []

    @rule(target=tables, prompt=prompts)
    def start(self, prompt: list[int]) -> list[int]:
        cached = self.pool.match(hashes(prompt))
        self.pool.retain(cached, Holder.SEQUENCE)
        try:
            fresh = self.pool.allocate(
                self.pool.blocks_for(len(prompt)) - len(cached), Holder.SEQUENCE
            )
        except OutOfBlocks:
            self.pool.release(cached, Holder.SEQUENCE)
            return []
        table = cached + fresh
        self.held.append(table)
        for block, block_hash in zip(table, hashes(prompt), strict=False):
            self.pool.register(block, block_hash)
        assert self.pool.match(hashes(prompt)) != [] or len(prompt) < BLOCK_SIZE
        return table

    @rule(target=tables, table=tables)
    def fork(self, table: list[int]) -> list[int]:
        if not table or not self._is_held(table):
            return []
        twin = list(table)
        self.pool.retain(twin, Holder.SEQUENCE)
        self.held.append(twin)
        return twin

    @rule(table=consumes(tables))
    def end(self, table: list[int]) -> None:
        if self._is_held(table):
            self.held = [other for other in self.held if other is not table]
            self.pool.release(table, Holder.SEQUENCE)

    @rule(target=leases, prompt=prompts)
    def grant(self, prompt: list[int]) -> Lease | None:
        self.num_granted += 1
        before = self.pool.counts()
        try:
            lease = self.leased.grant(
                f"lease-{self.num_granted}",
                self.num_granted,
                hashes(prompt),
                len(prompt),
            )
        except OutOfBlocks:
            assert self.pool.counts() == before
            return None
        self.granted.append(lease)
        assert len(lease.block_table) == self.pool.blocks_for(len(prompt))
        assert lease.num_cached_tokens <= len(prompt)
        return lease

    @rule(lease=leases)
    def begin_write(self, lease: Lease | None) -> None:
        if lease is not None and not lease.ended:
            self.leased.begin_write(lease)
            self.writing.append(lease)

    @rule(data=st.data())
    def end_write(self, data: st.DataObject) -> None:
        if self.writing:
            lease = self.writing.pop(data.draw(st.integers(0, len(self.writing) - 1)))
            self.leased.end_write(lease)

    @rule(lease=leases)
    def release_lease(self, lease: Lease | None) -> None:
        if lease is not None and not lease.ended:
            self.leased.release(lease)
            with pytest.raises(KvTransferError):
                self.leased.get(lease.lease_id, EPOCH)

    @rule(target=tables, lease=leases)
    def take(self, lease: Lease | None) -> list[int]:
        if lease is None or lease.ended or lease.num_writes:
            return []
        table = self.leased.take(lease)
        self.held.append(table)
        return table

    @rule()
    def fill_up(self) -> None:
        """Allocation of all that is available evicts the cache and never touches a held block."""
        blocks = self.pool.allocate(self.pool.num_available, Holder.SEQUENCE)
        taken = {b for table in self.held for b in table}
        taken |= {b for lease in self.writing for b in lease.block_table}
        assert not taken & set(blocks)
        with pytest.raises(OutOfBlocks):
            self.pool.allocate(1, Holder.LEASE)
        self.pool.release(blocks, Holder.SEQUENCE)

    @invariant()
    def counts_add_up(self) -> None:
        self.pool.check_integrity()
        self.leased.check_integrity()
        counts = self.pool.counts()
        states = (counts.free, counts.cached, counts.used, counts.leased, counts.quarantined)
        assert sum(states) == counts.total == NUM_BLOCKS
        assert self.pool.num_available == counts.free + counts.cached
        assert counts.used == len({b for table in self.held for b in table})

    @invariant()
    def no_block_with_a_write_under_way_can_be_given_away(self) -> None:
        for lease in self.writing:
            assert all(self.pool.num_holds(block) > 0 for block in lease.block_table)

    def teardown(self) -> None:
        while self.writing:
            self.leased.end_write(self.writing.pop())
        for lease in self.granted:
            if not lease.ended:
                self.leased.release(lease)
        for table in self.held:
            self.pool.release(table, Holder.SEQUENCE)
        self.pool.check_integrity()
        counts = self.pool.counts()
        assert counts.free + counts.cached == NUM_BLOCKS
        assert len(self.leased) == 0

    def _is_held(self, table: list[int]) -> bool:
        return any(other is table for other in self.held)


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=60, stateful_step_count=40)
