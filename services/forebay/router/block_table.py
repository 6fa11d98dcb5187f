"""A hash table from block hashes to small numbers, in flat memory that numpy reads in bulk.

A segment is a run of buckets, a bucket has eight rows, and a hash may lie in two buckets of one
segment, one in each half of it: the low half of the hash names the segment, the high half the
buckets. A segment without room is split in two while there are segments left (so growing never
moves more than one), and loses its oldest rows when there are none. A row: 16 bytes of hash, a
value, a stamp of its last use.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from forebay.router.row_storage import RowStorage

Keys = npt.NDArray[np.uint64]
"""n x 2: the low and the high half of each hash."""
Rows = npt.NDArray[np.intp]

_WAYS = 8
_BUCKET_BYTES = _WAYS * 24
_USUAL_BUCKETS = 128
_SEGMENT_EXTRA = 128
"""Bytes of bookkeeping of a segment, at most."""
_WORD = 0xFFFFFFFF
_EVICTED_SHARE = 16
_halves = struct.Struct("<QQ").unpack
ABSENT = -1


def keys_of(hashes: bytes) -> Keys:
    """Of concatenated 16-byte hashes."""
    return np.frombuffer(hashes, dtype="<u8").reshape(-1, 2)


class BlockTable:
    """Values are positive; 0 means absent. `evicted` is told the values of rows that were dropped
    for want of room. The one hash whose low half is zero marks free rows and is never kept.

    A row is a place, good until the next insertion.
    """

    def __init__(self, max_bytes: int, evicted: Callable[[npt.NDArray[np.uint32]], None]) -> None:
        self._evicted = evicted
        usual = _USUAL_BUCKETS * _BUCKET_BYTES
        depth = max(0, (max_bytes // usual).bit_length() - 1)
        self._max_segments = 1 << depth
        room = max_bytes // self._max_segments - _SEGMENT_EXTRA
        self._half = max(1, room // _BUCKET_BYTES // 2)
        self._buckets = 2 * self._half
        self._rows = self._buckets * _WAYS
        self._storage = RowStorage(self._max_segments * self._rows)
        self._directory = np.zeros(self._max_segments, dtype=np.int32)
        self._segment_of = self._directory.data
        self._low_bits = self._max_segments - 1
        self._depths = [0]
        self._prefixes = [0]
        self._clock = 0
        self.num_live = 0
        self.num_evictions = 0
        self.values = self._storage.values
        """By row, for reading and for changing one positive value into another."""

    @property
    def num_segments(self) -> int:
        return len(self._depths)

    @property
    def num_rows(self) -> int:
        """Rows 0 .. num_rows - 1 are in use or free; it only grows."""
        return self.num_segments * self._rows

    @property
    def max_rows(self) -> int:
        return self._max_segments * self._rows

    @property
    def num_bytes(self) -> int:
        segment = self._buckets * _BUCKET_BYTES + _SEGMENT_EXTRA - 4
        return self.num_segments * segment + self._directory.nbytes

    def find(self, block_hash: bytes) -> int:
        """The row of a hash, or ABSENT."""
        low, high = _halves(block_hash)
        base = self._segment_of[low & self._low_bits] * self._buckets
        row = self._storage.find(block_hash, base + ((high & _WORD) * self._half >> 32))
        if row == ABSENT:
            second = self._half + ((high >> 32) * self._half >> 32)
            row = self._storage.find(block_hash, base + second)
        return row

    def add(self, block_hash: bytes, value: int) -> bool:
        """Puts in a hash that is absent; False if it can't be kept."""
        low, high = _halves(block_hash)
        if low == 0:
            return False
        first = (high & _WORD) * self._half >> 32
        second = self._half + ((high >> 32) * self._half >> 32)
        while True:
            segment = self._segment_of[low & self._low_bits]
            base = segment * self._buckets
            row = self._storage.free_row(base + first, base + second)
            if row >= 0:
                break
            if not self._split(segment):
                self._evict(segment, base + first, base + second)
        self._clock += 1
        self._storage.put(row, block_hash, value, self._clock & _WORD)
        self.num_live += 1
        return True

    def locate(self, keys: Keys) -> Rows:
        """Rows by key, ABSENT where there is none."""
        storage = self._storage
        pairs = self._bucket_pairs(keys)
        low = keys[:, 0]
        same = storage.low_by_bucket.take(pairs, axis=0).reshape(-1, 2 * _WAYS) == low[:, None]
        at = same.argmax(axis=1)
        each = np.arange(len(keys))
        rows: Rows = pairs.ravel().take(each * 2 + (at >> 3)) * _WAYS + (at & 7)
        found = same.ravel().take(each * (2 * _WAYS) + at)
        right = storage.high.take(rows) == keys[:, 1]
        twins = found & ~right & (low != 0)
        rows[~(found & right & (storage.values.take(rows) != 0))] = ABSENT
        for index in np.flatnonzero(twins):
            rows[index] = self.find(keys[index].tobytes())
        return rows

    def add_all(self, keys: Keys, value: int) -> int:
        """Puts in hashes that are absent; how many went in, those that were evicted again among
        them. Of two equal ones, one. The first of them are the last to be evicted."""
        storage = self._storage
        before = self.num_live + self.num_evictions
        stamps = self._descending(len(keys))
        left = np.flatnonzero(keys[:, 0])
        while len(left):
            pairs = self._bucket_pairs(keys[left])
            free = (storage.values_by_bucket.take(pairs, axis=0) == 0).reshape(-1, 2 * _WAYS)
            at = _first_free(free)
            fits = at >= 0
            homeless = left[~fits]
            tried, at, pairs = left[fits], at[fits], pairs[fits]
            rows = pairs.ravel().take(np.arange(len(tried)) * 2 + (at >> 3)) * _WAYS + (at & 7)
            storage.low[rows] = keys[tried, 0]
            storage.high[rows] = keys[tried, 1]
            storage.values[rows] = value
            storage.stamps[rows] = stamps[tried]
            self.num_live += int(np.count_nonzero(storage.stamps.take(rows) == stamps[tried]))
            taken = (storage.low.take(rows) == keys[tried, 0]) & (
                storage.high.take(rows) == keys[tried, 1]
            )
            for index in homeless:
                block_hash = keys[index].tobytes()
                if self.find(block_hash) < 0:
                    self.add(block_hash, value)
            left = tried[~taken]
        return self.num_live + self.num_evictions - before

    def remove(self, rows: Rows) -> None:
        """Rows in use, each once."""
        self._storage.values[rows] = 0
        self._storage.low[rows] = 0
        self.num_live -= len(rows)

    def remove_one(self, row: int) -> None:
        self._storage.clear(row)
        self.num_live -= 1

    def touch(self, rows: Rows) -> None:
        """They were used; the first of them are the last to be evicted."""
        self._storage.stamps[rows] = self._descending(len(rows))

    def value(self, row: int) -> int:
        return self._storage.value(row)

    def set_value(self, row: int, value: int) -> None:
        self._storage.set_value(row, value)

    def touch_one(self, row: int) -> None:
        self._clock += 1
        self._storage.stamp(row, self._clock & _WORD)

    def check_integrity(self) -> None:
        """Recounts; every row is where `find` looks for it and nowhere else."""
        storage, used = self._storage, self.num_rows
        live = np.flatnonzero(storage.values[:used])
        assert len(live) == self.num_live
        assert not storage.values[used:].any()
        assert (storage.low[:used][storage.values[:used] == 0] == 0).all()
        keys = np.stack([storage.low[live], storage.high[live]], axis=1)
        assert (self.locate(keys) == live).all()
        assert all(self.find(key.tobytes()) == row for key, row in zip(keys, live, strict=True))
        assert set(self._directory.tolist()) == set(range(self.num_segments))

    def _descending(self, count: int) -> npt.NDArray[np.uint32]:
        self._clock += count
        first = np.uint64(self._clock)
        stamps = first - np.arange(count, dtype=np.uint64)
        return stamps.astype(np.uint32)

    def _bucket_pairs(self, keys: Keys) -> Rows:
        low = keys[:, 0] & np.uint64(self._low_bits)
        base = self._directory.take(low.astype(np.intp)) * np.intp(self._buckets)
        high = keys[:, 1]
        half = np.uint64(self._half)
        pairs = np.empty((len(keys), 2), dtype=np.intp)
        pairs[:, 0] = (high & np.uint64(_WORD)) * half >> np.uint64(32)
        pairs[:, 1] = (high >> np.uint64(32)) * half >> np.uint64(32)
        pairs[:, 0] += base
        pairs[:, 1] += base + self._half
        return pairs

    def _split(self, segment: int) -> bool:
        """Moves half of a segment's rows to a new one, to the same buckets and places there."""
        if self.num_segments == self._max_segments:
            return False
        depth, prefix, new = self._depths[segment], self._prefixes[segment], self.num_segments
        if 1 << depth == self._max_segments:
            return False
        bit = 1 << depth
        self._storage.move(self._slice(segment), self._slice(new), low_bit=bit)
        self._directory[prefix | bit :: bit << 1] = new
        self._depths[segment] = depth + 1
        self._depths.append(depth + 1)
        self._prefixes.append(prefix | bit)
        return True

    def _evict(self, segment: int, *full: int) -> None:
        """Drops the oldest rows of a segment, the oldest of the buckets `full` among them."""
        storage, span = self._storage, self._slice(segment)
        live = np.flatnonzero(storage.values[span]) + span.start
        count = max(1, len(live) // _EVICTED_SHARE)
        ages = np.uint32(self._clock & _WORD) - storage.stamps[live]
        oldest = live[np.argpartition(ages, len(live) - count)[len(live) - count :]]
        in_full = np.concatenate([np.arange(_WAYS) + bucket * _WAYS for bucket in set(full)])
        if not np.isin(in_full, oldest).any():
            ages = np.uint32(self._clock & _WORD) - storage.stamps[in_full]
            oldest = np.append(oldest, in_full[ages.argmax()])
        values = storage.values[oldest]
        self.remove(oldest)
        self.num_evictions += len(oldest)
        self._evicted(values)

    def _slice(self, segment: int) -> slice:
        return slice(segment * self._rows, (segment + 1) * self._rows)


def _first_free(free: npt.NDArray[np.bool_]) -> Rows:
    """Of n x 16 flags of two buckets each: the place in the bucket that has room earlier, the first
    of the two if both are alike; -1 if neither has any."""
    halves = free.reshape(-1, 2, _WAYS)
    at = halves.argmax(axis=2)
    at[~halves.any(axis=2)] = _WAYS
    second = at[:, 1] < at[:, 0]
    best = np.where(second, at[:, 1], at[:, 0])
    return np.where(best == _WAYS, -1, best + second * _WAYS)
