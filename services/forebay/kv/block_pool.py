"""Ownership of KV blocks and the prefix cache over them.

A block is held by sequences, by leases or by quarantine, each with a count of its own. A block
that nobody holds is cached while its content has a hash (evicted least recently used first) and
free otherwise. Every block is in exactly one state, so
free + cached + used + leased + quarantined = total at all times.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

from forebay.kv.journal import KvJournal


class Holder(Enum):
    """Who keeps a block alive. The first that has a count names the block's state."""

    SEQUENCE = "used"
    LEASE = "leased"
    QUARANTINE = "quarantined"
    """A lease that ended while a write to its blocks could still land."""


_FREE = "free"
_CACHED = "cached"


class OutOfBlocks(Exception):
    """Not enough free or evictable blocks; nothing was taken. Callers preempt or refuse."""


@dataclass(frozen=True, slots=True)
class BlockCounts:
    total: int
    free: int
    cached: int
    used: int
    leased: int
    quarantined: int


class BlockPool:
    """Blocks 0 .. num_blocks - 1 of `block_size` tokens. Holds no KV bytes itself. `journal`, when
    there is one, is told which hashes become findable and which no longer are."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.journal: KvJournal | None = None
        self._refs = {holder: [0] * num_blocks for holder in Holder}
        self._free = deque(range(num_blocks))
        self._lru: dict[int, None] = {}
        self._hash_of: list[bytes | None] = [None] * num_blocks
        self._by_hash: dict[bytes, int] = {}
        self._counts = dict.fromkeys((_FREE, _CACHED, *(h.value for h in Holder)), 0)
        self._counts[_FREE] = num_blocks

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` could give: free ones and cached ones."""
        return len(self._free) + len(self._lru)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def allocate(self, count: int, holder: Holder) -> list[int]:
        """`count` blocks with no content, held once by `holder`. Raises OutOfBlocks."""
        if count > self.num_available:
            raise OutOfBlocks(f"{count} blocks wanted, {self.num_available} available")
        blocks = []
        for _ in range(count):
            block = self._free.popleft() if self._free else self._evict()
            self._refs[holder][block] = 1
            self._counts[_FREE] -= 1
            self._counts[holder.value] += 1
            blocks.append(block)
        return blocks

    def match(self, hashes: Sequence[bytes]) -> list[int]:
        """Blocks of the longest prefix of `hashes` that is here. Takes no hold: `retain` them
        before anything else is allocated."""
        blocks = []
        for block_hash in hashes:
            block = self._by_hash.get(block_hash)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def retain(self, blocks: Iterable[int], holder: Holder) -> None:
        for block in blocks:
            before = self._state(block)
            assert before != _FREE, f"block {block} is free"
            self._refs[holder][block] += 1
            self._moved(block, before)

    def release(self, blocks: Sequence[int], holder: Holder) -> None:
        """Drops one hold on each. Later blocks become evictable first, so that a chain loses its
        end before its beginning."""
        for block in reversed(blocks):
            before = self._state(block)
            assert self._refs[holder][block] > 0, f"block {block} is not held as {holder.value}"
            self._refs[holder][block] -= 1
            self._moved(block, before)

    def move(self, blocks: Sequence[int], source: Holder, target: Holder) -> None:
        """Turns one hold of `source` into one of `target`."""
        self.retain(blocks, target)
        self.release(blocks, source)

    def num_holds(self, block: int) -> int:
        return sum(refs[block] for refs in self._refs.values())

    def register(self, block: int, block_hash: bytes) -> None:
        """Makes a full, computed, held block findable. The first block of a hash stays."""
        assert self.num_holds(block) > 0, f"block {block} is not held"
        if self._hash_of[block] is None and block_hash not in self._by_hash:
            self._hash_of[block] = block_hash
            self._by_hash[block_hash] = block
            if self.journal is not None:
                self.journal.stored(block_hash)

    def hashes(self) -> list[bytes]:
        """Of all findable blocks, in the order in which they became so."""
        return list(self._by_hash)

    def counts(self) -> BlockCounts:
        return BlockCounts(total=self.num_blocks, **self._counts)

    def check_integrity(self) -> None:
        """Recomputes every state from scratch; AssertionError names what disagrees."""
        states = [self._state(block) for block in range(self.num_blocks)]
        for state, count in self._counts.items():
            assert states.count(state) == count, f"{state}: {states.count(state)} != {count}"
        assert sum(self._counts.values()) == self.num_blocks
        assert sorted(self._free) == [b for b, s in enumerate(states) if s == _FREE]
        assert sorted(self._lru) == [b for b, s in enumerate(states) if s == _CACHED]
        assert all(min(refs, default=0) >= 0 for refs in self._refs.values())
        hashed = {h: b for b, h in enumerate(self._hash_of) if h is not None}
        assert hashed == self._by_hash

    def _state(self, block: int) -> str:
        for holder, refs in self._refs.items():
            if refs[block]:
                return holder.value
        return _FREE if self._hash_of[block] is None else _CACHED

    def _moved(self, block: int, before: str) -> None:
        after = self._state(block)
        if before == after:
            return
        self._counts[before] -= 1
        self._counts[after] += 1
        if before == _CACHED:
            del self._lru[block]
        if after == _CACHED:
            self._lru[block] = None
        elif after == _FREE:
            self._free.append(block)

    def _evict(self) -> int:
        """Turns the least recently used cached block into a free one, not yet on the free list."""
        block = next(iter(self._lru))
        del self._lru[block]
        block_hash = self._hash_of[block]
        assert block_hash is not None
        del self._by_hash[block_hash]
        self._hash_of[block] = None
        if self.journal is not None:
            self.journal.removed(block_hash)
        self._counts[_CACHED] -= 1
        self._counts[_FREE] += 1
        return block
