"""The index at its limits: slots, bytes, what is forgotten first."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import pytest

from forebay.router.index import MIN_BYTES, KvIndex, Tier


def random_hashes(rng: random.Random, count: int) -> list[bytes]:
    return [rng.randbytes(16) for _ in range(count)]


def store(index: KvIndex, slot: int, hashes: list[bytes], tier: Tier = Tier.DEVICE) -> None:
    index.apply(slot, tier, b"".join(hashes), b"")


def found(index: KvIndex, slot: int, hashes: list[bytes]) -> int:
    return int(index.match(hashes).num_blocks[slot])


@pytest.fixture
def rng() -> random.Random:
    return random.Random(7)


def test_an_empty_index_matches_nothing() -> None:
    index = KvIndex(MIN_BYTES)
    assert len(index.match([]).num_blocks) == 0
    slot = index.join("a")
    assert index.match([]).num_blocks.tolist() == [0]
    assert index.match([b"x" * 16]).weighted.tolist() == [0.0]
    index.apply(slot, Tier.DEVICE, b"", b"x" * 16)
    assert index.num_blocks == 0
    assert index.slot_of("b") is None
    index.leave("b")
    assert not index.sweep(10)
    index.check_integrity()


def test_too_few_bytes_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 65536"):
        KvIndex(MIN_BYTES - 1)


def test_types_and_weights_of_matches(rng: random.Random) -> None:
    index = KvIndex(MIN_BYTES)
    a, b, _ = index.join("a"), index.join("b"), index.join("c")
    chain = random_hashes(rng, 8)
    store(index, a, chain[:4])
    store(index, a, chain[2:6], Tier.HOST)
    store(index, b, chain[:2], Tier.DISK)
    store(index, b, chain[3:])
    matches = index.match(chain)
    assert (matches.num_blocks.dtype, matches.weighted.dtype) == (np.float32, np.float32)
    assert matches.num_blocks.tolist() == [6, 2, 0]
    assert matches.weighted.tolist() == [5.5, 0.5, 0.0]


def test_a_slot_is_given_out_again_only_after_the_sweep(rng: random.Random) -> None:
    index = KvIndex(1 << 20)
    chain = random_hashes(rng, 5000)
    a, b = index.join("a"), index.join("b")
    store(index, a, chain)
    store(index, b, chain[:10])
    again = index.join("a")
    assert again not in (a, b)
    assert found(index, a, chain) == found(index, again, chain) == 0
    assert found(index, b, chain) == 10
    assert index.sweep(1)
    third = index.join("c")
    assert third not in (a, b, again)
    num_slices = 1
    while index.sweep(2000):
        num_slices += 1
        index.check_integrity()
    assert num_slices > 2
    assert index.num_blocks == 10
    assert index.join("d") == a
    assert found(index, a, chain) == 0
    index.check_integrity()


def test_one_that_leaves_during_a_sweep_waits_for_the_next(rng: random.Random) -> None:
    index = KvIndex(1 << 20)
    chain = random_hashes(rng, 5000)
    a, b = index.join("a"), index.join("b")
    for slot in (a, b):
        store(index, slot, chain)
    index.leave("a")
    assert index.sweep(1)
    index.leave("b")
    assert index.sweep(1 << 30)
    assert index.join("c") == a
    assert index.join("d") not in (a, b)
    assert not index.sweep(1 << 30)
    assert index.num_blocks == 0
    index.check_integrity()


def test_news_of_one_who_left_are_a_mistake() -> None:
    index = KvIndex(MIN_BYTES)
    slot = index.join("a")
    index.leave("a")
    with pytest.raises(AssertionError, match="no worker"):
        index.apply(slot, Tier.DEVICE, b"x" * 16, b"")


def test_predictions_end_and_yield_to_removed_blocks(rng: random.Random) -> None:
    index = KvIndex(MIN_BYTES)
    slot = index.join("a")
    chain = random_hashes(rng, 8)
    store(index, slot, chain[:2])
    index.predict(slot, chain[:6], until=10.0)
    index.predict(slot, chain, until=5.0)
    assert found(index, slot, chain) == 8
    assert index.match(chain, events=False).num_blocks.tolist() == [8]
    index.expire(5.0)
    assert found(index, slot, chain) == 6
    index.apply(slot, Tier.HOST, b"", chain[4])
    assert found(index, slot, chain) == 4
    index.expire(10.0)
    assert found(index, slot, chain) == 2
    assert index.num_predictions == 0
    index.predict(slot, chain, until=10.0)
    assert found(index, slot, chain) == 2
    index.predict(slot, chain, until=11.0)
    index.join("a")
    assert not index.match(chain).num_blocks.any()


def test_predictions_are_bounded_and_the_first_to_end_go_first(rng: random.Random) -> None:
    index = KvIndex(MIN_BYTES)
    slots = [index.join(str(n)) for n in range(4)]
    late = random_hashes(rng, 3)
    index.predict(slots[0], late, until=1000.0)
    for n in range(300):
        shared = random_hashes(rng, 5)
        for slot in slots:
            index.predict(slot, shared, until=float(n))
        assert index.num_bytes <= index.max_bytes
    index.check_integrity()
    assert found(index, slots[0], late) == 3
    assert found(index, slots[3], shared) == 5
    index.predict(slots[1], random_hashes(rng, 5000), until=2000.0)
    index.check_integrity()
    assert index.num_predictions < 5000


def test_what_expires_at_once_is_let_go_in_pieces(rng: random.Random) -> None:
    index = KvIndex(1 << 26)
    slot = index.join("a")
    for _ in range(3):
        index.predict(slot, random_hashes(rng, 6000), until=1.0)
    index.expire(1.0)
    assert 0 < index.num_predictions < 18_000
    while index.num_predictions:
        index.expire(1.0)
    index.check_integrity()


def told(rng: random.Random, index: KvIndex, most: int) -> Iterator[tuple[int, list[bytes]]]:
    """Chains for random workers, without end in what they ask of the index."""
    slots = [index.join(str(n)) for n in range(5)]
    while True:
        slot, chain = rng.choice(slots), random_hashes(rng, rng.randrange(1, most))
        store(index, slot, chain)
        yield slot, chain


@pytest.mark.parametrize("most", [20, 400])
def test_bytes_are_bounded_and_what_is_forgotten_is_never_made_up(
    rng: random.Random, most: int
) -> None:
    index = KvIndex(MIN_BYTES)
    held: list[tuple[int, list[bytes]]] = []
    for slot, chain in told(rng, index, most):
        held.append((slot, chain))
        assert index.num_bytes <= index.max_bytes
        if index.num_evictions > 4000:
            break
    index.check_integrity()
    capacity = index.num_blocks
    assert MIN_BYTES // 64 < capacity < MIN_BYTES // 24
    for slot, chain in held:
        matches = index.match(chain).num_blocks
        assert matches[slot] <= len(chain)
        assert not np.delete(matches, slot).any()
    newest = sum(found(index, slot, chain) for slot, chain in held[-capacity // (2 * most) :])
    oldest = sum(found(index, slot, chain) for slot, chain in held[: capacity // (2 * most)])
    assert newest > 0 == oldest


def test_what_is_used_stays_and_chains_lose_their_ends_first(rng: random.Random) -> None:
    index = KvIndex(MIN_BYTES)
    used_slot = index.join("used")
    used = random_hashes(rng, 100)
    store(index, used_slot, used)
    ended = 0
    for slot, chain in told(rng, index, 400):
        assert found(index, used_slot, used) == 100
        kept = found(index, slot, chain)
        ended += kept == len(chain)
        if index.num_evictions > 4000:
            break
    assert ended > 20
    unused = [h for h in used if index.match([h]).num_blocks.any()]
    assert unused == used


def test_sets_of_workers_are_bounded_and_say_less_rather_than_more(rng: random.Random) -> None:
    index = KvIndex(2 * MIN_BYTES)
    slots = [index.join(str(n)) for n in range(24)]
    blocks = random_hashes(rng, 600)
    held: dict[bytes, set[int]] = {block: set() for block in blocks}
    for _ in range(4000):
        slot, block = rng.choice(slots), rng.choice(blocks)
        if rng.random() < 0.3:
            index.apply(slot, Tier.DEVICE, b"", block)
            held[block].discard(slot)
        else:
            store(index, slot, [block])
            held[block].add(slot)
        assert index.num_bytes <= index.max_bytes
    index.check_integrity()
    said = 0
    for block in blocks:
        here = set(np.flatnonzero(index.match([block]).num_blocks).tolist())
        assert here <= held[block]
        said += len(here)
    assert 0 < said < sum(map(len, held.values()))
    for n in range(24):
        index.leave(str(n))
    while index.sweep(500):
        index.check_integrity()
    assert index.num_blocks == 0


def test_workers_come_and_go_within_the_bytes(rng: random.Random) -> None:
    index = KvIndex(1 << 18)
    for n in range(400):
        slot = index.join(f"worker-{n % 40}")
        store(index, slot, random_hashes(rng, 60))
        index.sweep(20_000)
    assert index.num_bytes <= index.max_bytes
    assert index.num_slots <= 80
    index.check_integrity()
