"""The gateway's mirror of what KV blocks the workers hold: block hash to set of workers by tier."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from forebay.kv.block_hash import HASH_BYTES
from forebay.router.bit_rows import added_up
from forebay.router.block_table import ABSENT, BlockTable, Rows, keys_of
from forebay.router.predictions import Predictions
from forebay.router.worker_sets import NOBODY, Bits, Tier, WorkerSets

__all__ = ["TIER_WEIGHTS", "KvIndex", "Matches", "Tier"]

TIER_WEIGHTS = {Tier.DEVICE: 1.0, Tier.HOST: 0.75, Tier.DISK: 0.25}
"""What a cached block is worth, of what it would cost to compute it."""

MIN_BYTES = 1 << 16
_FEW_BLOCKS = 24
"""Up to here one by one is faster than in bulk."""
_FIRST_LOOK = 128
"""A prompt of which nobody has the block here is looked up no further than this."""
_MEMBER_BYTES = 512
"""Of a worker: its id, its slot, the places it takes in dicts and lists, at most."""


@dataclass(frozen=True, slots=True)
class Matches:
    """By slot, zero for slots that no worker has. num_blocks: longest leading run of blocks that
    the worker holds in any tier or is expected to hold. weighted: the same run with each block
    counted by TIER_WEIGHTS of the best tier it is in (an expected one counts 1); the very same
    array where every block is in the first tier."""

    num_blocks: npt.NDArray[np.float32]
    weighted: npt.NDArray[np.float32]


class KvIndex:
    """What was stored and not yet removed, as far as `max_bytes` go: what it forgets for want of
    room it forgets wholly, and it never says more than it was told.

    Times are those of the caller's clock. `apply` takes about 6 microseconds for one block and less
    than 1 a block in a batch of hundreds; whoever has many to tell does it in pieces of a few
    thousand. `leave` and joining again leave work to `sweep`, `predict` to `expire`: both are to be
    called every now and then.
    """

    def __init__(self, max_bytes: int) -> None:
        if max_bytes < MIN_BYTES:
            raise ValueError(f"max_bytes is {max_bytes}, at least {MIN_BYTES} are needed")
        self.max_bytes = max_bytes
        self._sets_bytes = max_bytes * 3 // 16
        self._sets = WorkerSets(self._sets_bytes)
        self._predictions = Predictions(max_bytes // 16)
        self._table = BlockTable(max_bytes * 3 // 4, self._evicted)
        self._slots: dict[str, int] = {}
        self._lives: dict[int, int] = {}
        self._num_joins = 0
        self._live = 0
        self._free: list[int] = []
        self._left: list[int] = []
        self._sweeping: list[int] = []
        self._cursor = 0
        self.num_slots = 0

    @property
    def num_blocks(self) -> int:
        return self._table.num_live

    @property
    def num_bytes(self) -> int:
        members = self.num_slots * _MEMBER_BYTES
        return self._table.num_bytes + self._sets.num_bytes + self._predictions.num_bytes + members

    @property
    def num_evictions(self) -> int:
        """Blocks forgotten for want of room."""
        return self._table.num_evictions

    @property
    def num_predictions(self) -> int:
        return len(self._predictions)

    @property
    def num_joins(self) -> int:
        """Grows whenever a worker gets a slot."""
        return self._num_joins

    def join(self, worker_id: str) -> int:
        """An empty slot, below `num_slots`. A worker that is in already leaves first."""
        self.leave(worker_id)
        if self._free:
            slot = self._free.pop()
        else:
            slot = self.num_slots
            self.num_slots += 1
            self._sets.max_bytes = self._sets_bytes - self.num_slots * _MEMBER_BYTES
        self._num_joins += 1
        self._slots[worker_id] = slot
        self._lives[slot] = self._num_joins
        self._live |= 1 << slot
        return slot

    def leave(self, worker_id: str) -> None:
        """Nothing of it is found any more; its slot is given out again once it has been swept."""
        slot = self._slots.pop(worker_id, None)
        if slot is not None:
            del self._lives[slot]
            self._live &= ~(1 << slot)
            self._left.append(slot)

    def slot_of(self, worker_id: str) -> int | None:
        return self._slots.get(worker_id)

    def sweep(self, budget: int) -> bool:
        """Looks through the next `budget` rows (about 1.5 a block) for workers that have left; True
        while there is more to do."""
        if not self._sweeping:
            if not self._left:
                return False
            self._sweeping, self._left, self._cursor = self._left, [], 0
        end = min(self._cursor + budget, self._table.num_rows)
        self._sweep_rows(self._cursor, end)
        self._sets.collect()
        self._cursor = end
        if end == self._table.num_rows:
            self._free += self._sweeping
            self._sweeping = []
        return bool(self._sweeping or self._left)

    def apply(self, slot: int, tier: Tier, stored: bytes, removed: bytes) -> None:
        """One worker's news: concatenated hashes, none in both. The slot is that of a worker that
        is in. Blocks of one chain in `stored` come parents first."""
        assert self._live >> slot & 1, f"slot {slot} belongs to no worker"
        if removed:
            if len(self._predictions):
                self._drop_predictions(slot, removed)
            if len(removed) > _FEW_BLOCKS * HASH_BYTES:
                self._remove_many(slot, tier, removed)
            else:
                self._remove_few(slot, tier, removed)
        if len(stored) > _FEW_BLOCKS * HASH_BYTES:
            self._store_many(slot, tier, stored)
        else:
            self._store_few(slot, tier, stored)
        self._sets.collect()

    def predict(self, slot: int, hashes: Sequence[bytes], until: float) -> None:
        """The worker will hold these, if `removed` does not tell otherwise first."""
        self._predictions.add(slot, self._lives[slot], hashes, until)

    def expire(self, now: float) -> None:
        self._predictions.expire(now)

    def match(self, hashes: Sequence[bytes], *, events: bool = True) -> Matches:
        """Leading runs of `hashes`, parents first; without `events`, of predictions alone."""
        expected = self._predictions.runs(hashes, self._lives) if len(self._predictions) else []
        if events:
            rows = self._located(hashes, beyond_gaps=bool(expected))
            ids = np.where(rows == ABSENT, NOBODY, self._table.values[rows])
        else:
            rows, ids = np.empty(0, dtype=np.intp), np.empty(0, dtype=np.uint32)
        groups = self._groups(ids, expected, len(hashes))
        matches, longest = self._runs(groups)
        found = rows[:longest]
        if len(found):
            self._table.touch(found if not expected else found[found != ABSENT])
        return matches

    def holders(self, hashes: Sequence[bytes]) -> list[int]:
        """Of each hash by itself, the slots (as bits) of the workers that were told to hold it."""
        rows = self._located(hashes, beyond_gaps=True)
        ids = np.where(rows == ABSENT, NOBODY, self._table.values[rows])
        found = (self._sets.bits[at] for at in ids.tolist())
        return [(device | host | disk) & self._live for device, host, disk in found]

    def check_integrity(self) -> None:
        """Recounts everything; AssertionError names what disagrees."""
        self._table.check_integrity()
        self._sets.check_integrity()
        self._predictions.check_integrity()
        values = self._table.values[: self._table.num_rows]
        counts = np.bincount(values, minlength=len(self._sets.counts))
        counts[NOBODY] = 0
        assert counts.tolist() == self._sets.counts
        slots = [*self._slots.values(), *self._free, *self._left, *self._sweeping]
        assert sorted(slots) == list(range(self.num_slots))
        known = self._live
        for slot in (*self._left, *self._sweeping):
            known |= 1 << slot
        assert not any(part & ~known for bits in self._sets.bits for part in bits)
        assert self.num_bytes <= self.max_bytes

    def _located(self, hashes: Sequence[bytes], beyond_gaps: bool) -> Rows:
        """Rows of all hashes, or only of those before the first that is absent."""
        if beyond_gaps:
            return self._table.locate(keys_of(b"".join(hashes)))
        if len(hashes) > _FIRST_LOOK and self._table.find(hashes[_FIRST_LOOK]) == ABSENT:
            hashes = hashes[:_FIRST_LOOK]
        rows = self._table.locate(keys_of(b"".join(hashes)))
        absent = rows < 0
        first = int(absent.argmax()) if len(rows) else 0
        return rows[:first] if len(rows) and absent[first] else rows

    def _groups(
        self, ids: npt.NDArray[np.uint32], expected: Sequence[tuple[int, int]], num_hashes: int
    ) -> list[tuple[int, Bits]]:
        """(number of blocks, who has them) for stretches that are alike, from block 0 on."""
        bits = self._sets.bits
        if not expected:
            starts = _changes(ids)
            lengths = [end - start for start, end in pairwise([*starts, len(ids)])]
            at = ids[starts].tolist() if starts else []
            return [(n, bits[i]) for n, i in zip(lengths, at, strict=True)]
        known = np.zeros(num_hashes, dtype=np.uint32)
        known[: len(ids)] = ids
        changes = np.union1d(_changes(known), [start for start, _ in expected])
        lengths = np.diff(changes, append=num_hashes).tolist()
        which = np.searchsorted([start for start, _ in expected], changes, side="right") - 1
        groups = []
        for length, at, run in zip(lengths, known[changes].tolist(), which.tolist(), strict=True):
            device, host, disk = bits[at]
            groups.append((length, (device | expected[run][1], host, disk)))
        return groups

    def _runs(self, groups: Sequence[tuple[int, Bits]]) -> tuple[Matches, int]:
        """And the longest run."""
        holders: list[int] = []
        amounts: list[int] = []
        alive, longest, num_alike, all_device = self._live, 0, 0, True
        for length, (device, host, disk) in groups:
            below = host or disk
            still = alive & (device | host | disk if below else device)
            if not still:
                break
            if below and still & ~device:
                all_device = False
            if still == alive and holders:
                amounts[-1] += length
            else:
                holders.append(still)
                amounts.append(length)
            alive = still
            longest += length
            num_alike += 1
        num_blocks = added_up(holders, amounts, self.num_slots)
        weighted = num_blocks if all_device else self._weighted(groups[:num_alike])
        return Matches(num_blocks, weighted), longest

    def _weighted(self, groups: Sequence[tuple[int, Bits]]) -> npt.NDArray[np.float32]:
        """`groups`: all of which somebody has in full."""
        masks: list[int] = []
        amounts: list[float] = []
        alive = self._live
        for length, (device, host, disk) in groups:
            alive &= device | host | disk
            masks += (alive & device, alive & host & ~device, alive & ~(device | host))
            amounts += [length * weight for weight in TIER_WEIGHTS.values()]
        return added_up(masks, amounts, self.num_slots)

    def _store_few(self, slot: int, tier: Tier, stored: bytes) -> None:
        table, sets, grown = self._table, self._sets, dict[int, int]()
        for start in range(0, len(stored), HASH_BYTES):
            block_hash = stored[start : start + HASH_BYTES]
            row = table.find(block_hash)
            old = NOBODY if row == ABSENT else table.value(row)
            new = grown.get(old)
            if new is None:
                new = grown[old] = sets.grown(old, slot, tier, self._live)
            if row != ABSENT:
                table.set_value(row, new)
                table.touch_one(row)
                if new != old:
                    sets.moved(old, new)
            elif new != NOBODY and table.add(block_hash, new):
                sets.moved(NOBODY, new)

    def _store_many(self, slot: int, tier: Tier, stored: bytes) -> None:
        keys = keys_of(stored)
        rows = self._table.locate(keys)
        here = rows != ABSENT
        self._reassign(np.unique(rows[here]), slot, tier, grow=True)
        self._table.touch(rows[here])
        alone = self._sets.grown(NOBODY, slot, tier, self._live)
        if alone != NOBODY:
            self._sets.moved(NOBODY, alone, self._table.add_all(keys[~here], alone))

    def _remove_few(self, slot: int, tier: Tier, removed: bytes) -> None:
        table, sets, shrunk = self._table, self._sets, dict[int, int]()
        for start in range(0, len(removed), HASH_BYTES):
            row = table.find(removed[start : start + HASH_BYTES])
            if row == ABSENT:
                continue
            old = table.value(row)
            new = shrunk.get(old)
            if new is None:
                new = shrunk[old] = sets.shrunk(old, slot, tier, self._live)
            if new == NOBODY:
                table.remove_one(row)
            else:
                table.set_value(row, new)
            if new != old:
                sets.moved(old, new)

    def _remove_many(self, slot: int, tier: Tier, removed: bytes) -> None:
        rows = self._table.locate(keys_of(removed))
        self._reassign(np.unique(rows[rows != ABSENT]), slot, tier, grow=False)

    def _reassign(self, rows: Rows, slot: int, tier: Tier, *, grow: bool) -> None:
        change = self._sets.grown if grow else self._sets.shrunk
        ids, which = np.unique(self._table.values[rows], return_inverse=True)
        news = [change(old, slot, tier, self._live) for old in ids.tolist()]
        self._replace(rows, ids, which, news)

    def _replace(
        self, rows: Rows, ids: npt.NDArray[np.uint32], which: Rows, news: Sequence[int]
    ) -> None:
        """Row i pointed to ids[which[i]] and now points to news[which[i]], or goes."""
        if not len(rows):
            return
        counts = np.bincount(which, minlength=len(ids)).tolist()
        self._table.values[rows] = new_values = np.array(news, dtype=np.uint32)[which]
        self._table.remove(rows[new_values == NOBODY])
        for old, new, count in zip(ids.tolist(), news, counts, strict=True):
            if new != old:
                self._sets.moved(old, new, count)

    def _sweep_rows(self, start: int, end: int) -> None:
        values = self._table.values[start:end]
        seen = np.zeros(len(self._sets.bits), dtype=np.bool_)
        seen[values] = True
        leaving = 0
        for slot in self._sweeping:
            leaving |= 1 << slot
        stale = [at for at in np.flatnonzero(seen).tolist() if _holds(self._sets.bits[at], leaving)]
        if not stale:
            return
        place = np.full(len(seen), -1, dtype=np.intp)
        place[stale] = np.arange(len(stale))
        which = place[values]
        inside = np.flatnonzero(which >= 0)
        news = [self._sets.stripped(old, self._live) for old in stale]
        self._replace(inside + start, np.array(stale, dtype=np.uint32), which[inside], news)

    def _drop_predictions(self, slot: int, removed: bytes) -> None:
        life = self._lives[slot]
        for start in range(0, len(removed), HASH_BYTES):
            self._predictions.drop(slot, life, removed[start : start + HASH_BYTES])

    def _evicted(self, values: npt.NDArray[np.uint32]) -> None:
        ids, counts = np.unique(values, return_counts=True)
        for old, count in zip(ids.tolist(), counts.tolist(), strict=True):
            self._sets.moved(old, NOBODY, count)


def _changes(values: npt.NDArray[np.uint32]) -> list[int]:
    """Where stretches of equal values begin."""
    if not len(values):
        return []
    return [0, *(np.flatnonzero(values[1:] != values[:-1]) + 1).tolist()]


def _holds(bits: Bits, mask: int) -> bool:
    return bool((bits[0] | bits[1] | bits[2]) & mask)
