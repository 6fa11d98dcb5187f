"""Interned sets of workers: many blocks, few different sets of workers that hold them."""

from __future__ import annotations

import sys
from enum import IntEnum

from forebay.router.dict_size import most_dict_bytes


class Tier(IntEnum):
    """Where a worker keeps a block; a worker may keep one in several tiers."""

    DEVICE = 0
    HOST = 1
    DISK = 2


Bits = tuple[int, int, int]
"""By tier: bit s is set when slot s has the block there."""

NOBODY = 0
"""The id of the empty set. It is never counted."""

_EMPTY: Bits = (0, 0, 0)
_TUPLE_BYTES = sys.getsizeof(_EMPTY) + 16
_MAX_SETS = 170_000
"""Keeps a resize of the dict of ids within 5 ms."""
_SHARED_PART = 7 / 8
"""Of the room, for sets of more than one; the rest is for workers by themselves."""


class WorkerSets:
    """Ids of sets, each with the number of blocks that point to it. A set that is pointed to by
    none is freed by `collect`, not before: ids stay what they are within one operation.

    max_bytes bounds `num_bytes`. When no room is left, `grown` gives the set it was given and
    `shrunk` the empty one, so that a set may say less than was told but never more.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._ids: dict[Bits, int] = {}
        self.bits: list[Bits] = [_EMPTY]
        self.counts: list[int] = [0]
        self._free: list[int] = []
        self._idle: list[int] = []
        self._held_bytes = 0

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def num_bytes(self) -> int:
        lists = sys.getsizeof(self.bits) + sys.getsizeof(self.counts) + sys.getsizeof(self._free)
        return self._held_bytes + lists + sys.getsizeof(self._ids)

    def grown(self, of: int, slot: int, tier: Tier, live: int) -> int:
        """The set `of` and `slot`; what is not in the mask `live` is left out on the way."""
        bits = [part & live for part in self.bits[of]]
        bits[tier] |= 1 << slot
        return self._intern((bits[0], bits[1], bits[2]), otherwise=of)

    def shrunk(self, of: int, slot: int, tier: Tier, live: int) -> int:
        bits = [part & live for part in self.bits[of]]
        bits[tier] &= ~(1 << slot)
        return self._intern((bits[0], bits[1], bits[2]), otherwise=NOBODY)

    def stripped(self, of: int, live: int) -> int:
        device, host, disk = self.bits[of]
        return self._intern((device & live, host & live, disk & live), otherwise=NOBODY)

    def moved(self, old: int, new: int, count: int = 1) -> None:
        """`count` blocks that pointed to `old` now point to `new`."""
        if new:
            self.counts[new] += count
        if old:
            self.counts[old] -= count
            if self.counts[old] <= 0:
                self._idle.append(old)

    def collect(self) -> None:
        """Frees what is pointed to by none; called at the end of every operation."""
        for at in self._idle:
            bits = self.bits[at]
            if self.counts[at] == 0 and bits is not _EMPTY:
                del self._ids[bits]
                self._held_bytes -= _size(bits)
                self.bits[at] = _EMPTY
                self._free.append(at)
        self._idle.clear()

    def check_integrity(self) -> None:
        assert not self._idle
        assert self.bits[NOBODY] is _EMPTY and self.counts[NOBODY] == 0
        assert all(self.bits[at] == bits for bits, at in self._ids.items())
        assert all(
            count > 0 for bits, count in zip(self.bits, self.counts, strict=True) if any(bits)
        )
        assert len(self._ids) + len(self._free) + 1 == len(self.bits) == len(self.counts)
        assert self._held_bytes == sum(map(_size, self._ids))
        assert self.num_bytes <= self.max_bytes or not self._ids

    def _intern(self, bits: Bits, *, otherwise: int) -> int:
        if not any(bits):
            return NOBODY
        found = self._ids.get(bits)
        if found is not None:
            return found
        if not self._has_room(bits):
            return otherwise
        if self._free:
            at = self._free.pop()
            self.bits[at] = bits
        else:
            at = len(self.bits)
            self.bits.append(bits)
            self.counts.append(0)
        self._ids[bits] = at
        self._idle.append(at)
        self._held_bytes += _size(bits)
        return at

    def _has_room(self, bits: Bits) -> bool:
        count = len(self._ids) + 1
        slots = len(self.bits) + 1
        lists = 3 * (sys.getsizeof(()) + 8 * slots + slots)
        most = self._held_bytes + _size(bits) + lists + most_dict_bytes(count)
        alone = sum(part.bit_count() for part in bits) == 1
        share = 1.0 if alone else _SHARED_PART
        return count <= _MAX_SETS * share and most <= self.max_bytes * share


def _size(bits: Bits) -> int:
    """Bytes of a set by itself. Small integers belong to the interpreter; a count may need one of
    its own."""
    integers = sum(sys.getsizeof(part) for part in bits if part > 256)
    return _TUPLE_BYTES + integers + sys.getsizeof(1 << 30)
