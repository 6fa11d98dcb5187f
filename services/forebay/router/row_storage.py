"""The memory of a block table: four columns, reserved whole and taken from the system as used."""

from __future__ import annotations

import mmap

import numpy as np

_WAYS = 8
_LOW_BYTES = 8
_BUCKET_LOW_BYTES = _WAYS * _LOW_BYTES
_NO_LOW = bytes(_LOW_BYTES)


class RowStorage:
    """Columns by row: both halves of the hash, value, stamp. A free row has value 0 and low half
    0; its high half and its stamp mean nothing."""

    def __init__(self, max_rows: int) -> None:
        self._low_memory = _reserve(max_rows * _LOW_BYTES)
        self.low = np.frombuffer(self._low_memory, dtype="<u8")
        self.high = np.frombuffer(_reserve(max_rows * 8), dtype="<u8")
        self.values = np.frombuffer(_reserve(max_rows * 4), dtype=np.uint32)
        self.stamps = np.frombuffer(_reserve(max_rows * 4), dtype=np.uint32)
        self.low_by_bucket = self.low.reshape(-1, _WAYS)
        self.values_by_bucket = self.values.reshape(-1, _WAYS)
        self._high_at = self.high.data
        self._value_at = self.values.data
        self._stamp_at = self.stamps.data

    def find(self, block_hash: bytes, bucket: int) -> int:
        """The row of a hash in a bucket, or -1."""
        low = block_hash[:_LOW_BYTES]
        start = bucket * _BUCKET_LOW_BYTES
        end = start + _BUCKET_LOW_BYTES
        at = self._low_memory.find(low, start, end)
        while at >= 0:
            row, inside = divmod(at, _LOW_BYTES)
            if not inside and self._value_at[row]:
                high = int.from_bytes(block_hash[_LOW_BYTES:], "little")
                if self._high_at[row] == high:
                    return row
            at = self._low_memory.find(low, at + 1, end)
        return -1

    def free_row(self, first: int, second: int) -> int:
        """In the bucket that has room earlier, the first if both are alike; -1 if neither has."""
        one, other = self._first_free(first), self._first_free(second)
        place = min(one, other)
        if place == _WAYS:
            return -1
        return (first if one <= other else second) * _WAYS + place

    def put(self, row: int, block_hash: bytes, value: int, stamp: int) -> None:
        at = row * _LOW_BYTES
        self._low_memory[at : at + _LOW_BYTES] = block_hash[:_LOW_BYTES]
        self._high_at[row] = int.from_bytes(block_hash[_LOW_BYTES:], "little")
        self._value_at[row] = value
        self._stamp_at[row] = stamp

    def value(self, row: int) -> int:
        return self._value_at[row]

    def set_value(self, row: int, value: int) -> None:
        self._value_at[row] = value

    def stamp(self, row: int, stamp: int) -> None:
        self._stamp_at[row] = stamp

    def clear(self, row: int) -> None:
        at = row * _LOW_BYTES
        self._low_memory[at : at + _LOW_BYTES] = _NO_LOW
        self._value_at[row] = 0

    def move(self, source: slice, target: slice, low_bit: int) -> None:
        """The rows of `source` whose low half has a bit set, to an equal number of free ones."""
        moves = (self.low[source] & np.uint64(low_bit)) != 0
        for column in (self.low, self.high, self.values, self.stamps):
            column[target] = np.where(moves, column[source], 0)
        self.low[source][moves] = 0
        self.values[source][moves] = 0

    def _first_free(self, bucket: int) -> int:
        """Its place in the bucket, _WAYS if there is none."""
        start = bucket * _BUCKET_LOW_BYTES
        end = start + _BUCKET_LOW_BYTES
        at = self._low_memory.find(_NO_LOW, start, end)
        while at >= 0:
            if at % _LOW_BYTES == 0:
                return (at - start) // _LOW_BYTES
            at = self._low_memory.find(_NO_LOW, at + 1, end)
        return _WAYS


def _reserve(num_bytes: int) -> mmap.mmap:
    """Zeros that take no memory until they are written, page by page: huge pages are not asked for,
    because clearing one takes milliseconds on virtual machines."""
    return mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
