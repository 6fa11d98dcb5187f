"""Blocks that this gateway expects on workers because it sent requests there."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import compress, islice
from operator import is_not

from forebay.router.dict_size import most_dict_bytes

_MAX_BLOCKS = 170_000
"""Keeps a resize of the dict within 5 ms."""
_MAX_EXPIRED_AT_ONCE = 4_096
_HASH_BYTES = 64
"""A 16-byte `bytes` object as CPython allocates it, and the pointer to it is 8 more."""
_RECORD_BYTES = 400


@dataclass(slots=True, eq=False)
class Prediction:
    """Of one request: `hashes` on the worker that was given `slot` in its life `life`."""

    slot: int
    life: int
    until: float
    hashes: list[bytes]


Held = Prediction | tuple[Prediction, ...]


class Predictions:
    """By hash, who may hold it, each until a time on the caller's clock. Bounded: the ones that
    end first go first when there is no room."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._by_hash: dict[bytes, Held] = {}
        self._ending: list[tuple[float, int, Prediction]] = []
        self._serial = 0
        self._now = float("-inf")
        self._num_hashes = 0
        self._num_shared = 0

    def __len__(self) -> int:
        """Blocks expected somewhere, those whose time is over but not yet cleared among them."""
        return len(self._by_hash)

    @property
    def num_bytes(self) -> int:
        return self._other_bytes() + sys.getsizeof(self._by_hash)

    def add(self, slot: int, life: int, hashes: Sequence[bytes], until: float) -> None:
        if until <= self._now:
            return
        made = Prediction(slot, life, until, list(hashes[: self._most_hashes()]))
        self._make_room(len(made.hashes))
        self._serial += 1
        heappush(self._ending, (until, self._serial, made))
        self._num_hashes += len(made.hashes)
        by_hash = self._by_hash
        held: Held | None = None
        joined: Held = made
        num_joined = more = 0
        for block_hash in made.hashes:
            before = by_hash.setdefault(block_hash, made)
            if before is made:
                continue
            if before is not held:
                self._num_shared += num_joined * more
                held, joined, num_joined = before, _joined(before, made), 0
                more = len(_each(joined)) - len(_each(before))
            by_hash[block_hash] = joined
            num_joined += 1
        self._num_shared += num_joined * more

    def drop(self, slot: int, life: int, block_hash: bytes) -> None:
        """The worker has told that it removed this block."""
        held = self._by_hash.get(block_hash)
        made = next((p for p in _each(held) if (p.slot, p.life) == (slot, life)), None)
        if isinstance(held, tuple) and made is not None:
            self._by_hash[block_hash] = _without(held, made)
            self._num_shared -= 1
        elif made is not None:
            del self._by_hash[block_hash]

    def expire(self, now: float) -> None:
        """What ends by now is not found any more; its memory is let go over this call and, if it is
        much, the next ones."""
        self._now = max(self._now, now)
        budget = _MAX_EXPIRED_AT_ONCE
        while budget > 0 and self._ending and self._ending[0][0] <= self._now:
            budget -= 1 + self._forget_first()

    def runs(self, hashes: Sequence[bytes], lives: Mapping[int, int]) -> list[tuple[int, int]]:
        """(start, mask of slots) for every stretch of `hashes` with the same mask, from 0 on; empty
        if nothing is expected. lives: slot to its present life."""
        found = list(map(self._by_hash.get, hashes))
        if not found or found.count(None) == len(found):
            return []
        changes = compress(range(1, len(found)), map(is_not, found, islice(found, 1, None)))
        return [(start, self._mask(found[start], lives)) for start in (0, *changes)]

    def check_integrity(self) -> None:
        records = {id(made) for _, _, made in self._ending}
        shared = 0
        for block_hash, held in self._by_hash.items():
            each = _each(held)
            shared += len(each) - 1
            assert each and all(id(p) in records for p in each)
            assert len({(p.slot, p.life) for p in each}) == len(each)
            assert any(block_hash in p.hashes for p in each)
        assert shared == self._num_shared
        assert self._num_hashes == sum(len(made.hashes) for _, _, made in self._ending)
        assert self.num_bytes <= self._max_bytes or not self._ending

    def _mask(self, held: Held | None, lives: Mapping[int, int]) -> int:
        mask = 0
        for made in _each(held):
            if made.until > self._now and lives.get(made.slot) == made.life:
                mask |= 1 << made.slot
        return mask

    def _other_bytes(self) -> int:
        per_hash = self._num_hashes * (_HASH_BYTES + 8)
        return per_hash + len(self._ending) * _RECORD_BYTES + self._num_shared * 72

    def _most_hashes(self) -> int:
        return min(_MAX_BLOCKS, self._max_bytes // 512)

    def _make_room(self, count: int) -> None:
        while self._ending:
            blocks = len(self._by_hash) + count
            more = count * (_HASH_BYTES + 8 + 72) + _RECORD_BYTES
            most = self._other_bytes() + more + most_dict_bytes(blocks)
            if blocks <= _MAX_BLOCKS and most <= self._max_bytes:
                return
            self._forget_first()

    def _forget_first(self) -> int:
        _, _, made = heappop(self._ending)
        self._num_hashes -= len(made.hashes)
        by_hash = self._by_hash
        seen: Held | None = None
        left: Held = made
        for block_hash in made.hashes:
            held = by_hash.get(block_hash)
            if held is made:
                del by_hash[block_hash]
            elif isinstance(held, tuple):
                if held is not seen:
                    seen, left = held, _without(held, made)
                if left is not held:
                    by_hash[block_hash] = left
                    self._num_shared -= 1
        return len(made.hashes)


def _each(held: Held | None) -> tuple[Prediction, ...]:
    if held is None:
        return ()
    return held if isinstance(held, tuple) else (held,)


def _without(held: tuple[Prediction, ...], made: Prediction) -> Held:
    """`held` itself if `made` is not in it."""
    left = tuple(p for p in held if p is not made)
    if len(left) == len(held):
        return held
    return left if len(left) > 1 else left[0]


def _joined(held: Held, made: Prediction) -> Held:
    """The later one of two for the same worker stays."""
    each = _each(held)
    others = tuple(p for p in each if (p.slot, p.life) != (made.slot, made.life))
    if len(others) < len(each):
        same = next(p for p in each if p not in others)
        if same.until > made.until:
            return held
    return (*others, made) if others else made
