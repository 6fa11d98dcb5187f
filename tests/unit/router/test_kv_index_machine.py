"""The index against dicts of sets: it says what they say, whatever happens in which order."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from forebay.router.index import TIER_WEIGHTS, KvIndex, Tier

HALVES = [1, 2, 3 << 62, (1 << 64) - 1, *(n * 0x9E3779B97F4A7C15 % 2**64 for n in range(1, 9))]
HASHES = [
    low.to_bytes(8, "little") + high.to_bytes(8, "little") for low in HALVES for high in HALVES[:7]
]
"""Many share a half with others."""

workers = st.sampled_from(["a", "b", "c", "d"])
tiers = st.sampled_from(Tier)
few = st.lists(st.sampled_from(HASHES), max_size=6, unique=True)
"""Applied one by one; `many` in bulk."""
many = st.tuples(st.integers(0, len(HASHES) - 1), st.integers(25, 60)).map(
    lambda drawn: (HASHES[drawn[0] :] + HASHES[: drawn[0]])[: drawn[1]]
)
chains = st.one_of(few, many)


class IndexMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.index = KvIndex(1 << 20)
        self.told: dict[int, dict[bytes, set[Tier]]] = {}
        self.expected: dict[int, dict[bytes, float]] = {}
        self.all_swept = True
        self.now = 0.0
        self.index.expire(self.now)

    def slot(self, worker_id: str) -> int:
        slot = self.index.slot_of(worker_id)
        return self.joined(worker_id) if slot is None else slot

    def joined(self, worker_id: str) -> int:
        self.forget(self.index.slot_of(worker_id))
        slot = self.index.join(worker_id)
        assert slot not in self.told
        self.told[slot], self.expected[slot] = {}, {}
        return slot

    def forget(self, slot: int | None) -> None:
        if slot is not None:
            del self.told[slot], self.expected[slot]
            self.all_swept = False

    @rule(worker_id=workers)
    def join(self, worker_id: str) -> None:
        assert self.joined(worker_id) == self.index.slot_of(worker_id)

    @rule(worker_id=workers)
    def leave(self, worker_id: str) -> None:
        self.forget(self.index.slot_of(worker_id))
        self.index.leave(worker_id)
        assert self.index.slot_of(worker_id) is None

    @rule(budget=st.sampled_from([1000, 5000, 1 << 40]))
    def sweep(self, budget: int) -> None:
        self.all_swept = not self.index.sweep(budget) or self.all_swept

    @rule(worker_id=workers, tier=tiers, stored=chains, removed=chains)
    def apply(self, worker_id: str, tier: Tier, stored: list[bytes], removed: list[bytes]) -> None:
        slot = self.slot(worker_id)
        removed = [block_hash for block_hash in removed if block_hash not in stored]
        self.index.apply(slot, tier, b"".join(stored), b"".join(removed))
        for block_hash in stored:
            self.told[slot].setdefault(block_hash, set()).add(tier)
        for block_hash in removed:
            self.told[slot].get(block_hash, set()).discard(tier)
            self.expected[slot].pop(block_hash, None)

    @rule(worker_id=workers, hashes=chains, ahead=st.integers(0, 5))
    def predict(self, worker_id: str, hashes: list[bytes], ahead: int) -> None:
        slot = self.slot(worker_id)
        self.index.predict(slot, hashes, self.now + ahead)
        for block_hash in hashes:
            before = self.expected[slot].get(block_hash, 0.0)
            self.expected[slot][block_hash] = max(before, self.now + ahead)

    @rule(passed=st.integers(0, 4))
    def expire(self, passed: int) -> None:
        self.now += passed
        self.index.expire(self.now)

    @rule(hashes=chains, events=st.booleans())
    def match(self, hashes: list[bytes], events: bool) -> None:
        matches = self.index.match(hashes, events=events)
        assert len(matches.num_blocks) == len(matches.weighted) == self.index.num_slots
        for slot in range(self.index.num_slots):
            weights = []
            for block_hash in hashes:
                tiers = set(self.told.get(slot, {}).get(block_hash, ())) if events else set()
                if self.expected.get(slot, {}).get(block_hash, 0.0) > self.now:
                    tiers.add(Tier.DEVICE)
                if not tiers:
                    break
                weights.append(max(TIER_WEIGHTS[tier] for tier in tiers))
            assert matches.num_blocks[slot] == len(weights)
            assert matches.weighted[slot] == sum(weights)

    @invariant()
    def whole(self) -> None:
        self.index.check_integrity()
        if self.all_swept:
            known = {h for told in self.told.values() for h, tiers in told.items() if tiers}
            assert self.index.num_blocks == len(known)


IndexMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=25)
TestIndexMachine = IndexMachine.TestCase
