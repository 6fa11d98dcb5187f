"""The table under the index: every hash is found where it was put, alone and in bulk."""

from __future__ import annotations

import random

import numpy as np
import numpy.typing as npt
import pytest

from forebay.router.block_table import ABSENT, BlockTable, keys_of

BIG = 1 << 20
SMALL = 1 << 13


def ignored(values: npt.NDArray[np.uint32]) -> None:
    assert values.all()


@pytest.fixture
def rng() -> random.Random:
    return random.Random(3)


def values_of(table: BlockTable, hashes: list[bytes]) -> list[int]:
    rows = table.locate(keys_of(b"".join(hashes)))
    found = [table.value(row) if row != ABSENT else 0 for row in rows.tolist()]
    assert found == [table.value(table.find(h)) if table.find(h) >= 0 else 0 for h in hashes]
    return found


@pytest.mark.parametrize("in_bulk", [False, True])
def test_growing_keeps_every_hash(rng: random.Random, in_bulk: bool) -> None:
    table = BlockTable(BIG, ignored)
    hashes = [rng.randbytes(16) for _ in range(20_000)]
    for start in range(0, len(hashes), 500):
        some = hashes[start : start + 500]
        if in_bulk:
            assert table.add_all(keys_of(b"".join(some)), start + 1) == 500
        else:
            assert all(table.add(block_hash, start + 1) for block_hash in some)
    table.check_integrity()
    assert table.num_segments > 8
    assert table.num_evictions == 0
    assert table.num_bytes <= BIG
    assert values_of(table, hashes) == [n // 500 * 500 + 1 for n in range(20_000)]
    assert not any(values_of(table, [rng.randbytes(16) for _ in range(1000)]))


def test_equal_halves_are_told_apart() -> None:
    halves = [n.to_bytes(8, "little") for n in (1, 2, 1 << 63, (1 << 64) - 1)]
    hashes = [low + high for low in halves for high in halves]
    in_bulk, one_by_one = BlockTable(SMALL, ignored), BlockTable(SMALL, ignored)
    assert in_bulk.add_all(keys_of(b"".join(hashes)), 5) == 16
    for number, block_hash in enumerate(hashes):
        assert values_of(one_by_one, [block_hash]) == [0]
        one_by_one.add(block_hash, number + 1)
    assert values_of(one_by_one, hashes) == list(range(1, 17))
    for number, block_hash in enumerate(hashes[:-1]):
        one_by_one.remove_one(one_by_one.find(block_hash))
        assert values_of(one_by_one, hashes)[: number + 2] == [0] * (number + 1) + [number + 2]
    in_bulk.check_integrity()
    one_by_one.check_integrity()


def test_the_hash_that_marks_free_rows_is_not_kept() -> None:
    table = BlockTable(SMALL, ignored)
    for high in (bytes(8), b"12345678"):
        zero = bytes(8) + high
        assert not table.add(zero, 1)
        assert table.add_all(keys_of(zero * 3), 1) == 0
        assert values_of(table, [zero]) == [0]
    assert table.num_live == 0


def test_the_same_hash_many_times_is_one_row(rng: random.Random) -> None:
    table = BlockTable(SMALL, ignored)
    block_hash, other = rng.randbytes(16), rng.randbytes(16)
    assert table.add_all(keys_of(block_hash * 5 + other + block_hash), 1) == 2
    assert table.num_live == 2
    table.check_integrity()


def test_a_full_table_forgets_the_oldest(rng: random.Random) -> None:
    lost: list[int] = []
    table = BlockTable(SMALL, lambda values: lost.extend(values.tolist()))
    hashes = [rng.randbytes(16) for _ in range(2000)]
    for number, block_hash in enumerate(hashes):
        table.add(block_hash, number + 1)
    table.check_integrity()
    kept = [value for value in values_of(table, hashes) if value]
    assert sorted(lost + kept) == list(range(1, 2001))
    assert len(lost) == table.num_evictions
    assert len(kept) == table.num_live > table.max_rows // 2
    assert min(kept) > 2000 - 2 * table.max_rows
    assert kept[-50:] == list(range(1951, 2001))


def test_what_is_touched_outlives_what_is_not(rng: random.Random) -> None:
    table = BlockTable(SMALL, ignored)
    favourite = rng.randbytes(16)
    table.add(favourite, 7)
    for _ in range(2000):
        table.touch(table.locate(keys_of(favourite)))
        table.add(rng.randbytes(16), 1)
    assert values_of(table, [favourite]) == [7]


def test_more_hashes_at_once_than_there_is_room_for(rng: random.Random) -> None:
    lost: list[int] = []
    table = BlockTable(SMALL, lambda values: lost.extend(values.tolist()))
    assert table.add_all(keys_of(rng.randbytes(16 * 3000)), 9) == 3000
    assert len(lost) + table.num_live == 3000
    table.check_integrity()
