"""Chained block hashes: equal exactly when everything up to the block's end is equal."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from forebay.kv.block_hash import HASH_BYTES, HashChain, cache_root

ROOT = cache_root(b"salt", "model")
tokens_lists = st.lists(st.integers(0, 2**32 - 1), max_size=40)
block_sizes = st.integers(1, 8)


def hashes(tokens: list[int], block_size: int, root: bytes = ROOT) -> list[bytes]:
    return list(HashChain(root, block_size).upto(tokens))


@given(tokens_lists, block_sizes)
def test_only_full_blocks_are_hashed(tokens: list[int], block_size: int) -> None:
    found = hashes(tokens, block_size)
    assert len(found) == len(tokens) // block_size
    assert len(set(found)) == len(found)
    assert all(len(h) == HASH_BYTES for h in found)


@given(tokens_lists, block_sizes, st.data())
def test_growing_in_steps_gives_the_same_hashes(
    tokens: list[int], block_size: int, data: st.DataObject
) -> None:
    chain = HashChain(ROOT, block_size)
    whole = hashes(tokens, block_size)
    for cut in sorted(data.draw(st.lists(st.integers(0, len(tokens)), max_size=4))):
        assert chain.upto(tokens, cut) == whole[: cut // block_size]
        assert chain.upto(tokens[:cut]) == whole[: cut // block_size]
    assert chain.upto(tokens) == whole
    assert chain.upto(tokens, 0) == []


@given(tokens_lists, block_sizes, st.data())
def test_a_changed_token_changes_its_block_and_all_later_ones(
    tokens: list[int], block_size: int, data: st.DataObject
) -> None:
    if not tokens:
        return
    at = data.draw(st.integers(0, len(tokens) - 1))
    changed = [*tokens]
    changed[at] ^= 1
    same = at // block_size
    before, after = hashes(tokens, block_size), hashes(changed, block_size)
    assert before[:same] == after[:same]
    assert not set(before[same:]) & set(after)


def test_root_separates_salts_and_every_part_of_the_identity() -> None:
    roots = {
        cache_root(b"", "a", "b"),
        cache_root(b"s", "a", "b"),
        cache_root(b"s", "ab", ""),
        cache_root(b"s", "", "ab"),
        cache_root(b"s", "a", "b", ""),
        cache_root(b"x" * 1000, "a", "b"),
    }
    assert len(roots) == 6
    assert cache_root(b"s", "a", "b") == cache_root(b"s", "a", "b")
    first_blocks = {hashes([1, 2, 3], 3, root)[0] for root in roots}
    assert len(first_blocks) == 6


def test_a_copy_grows_by_itself() -> None:
    chain = HashChain(ROOT, 2)
    chain.upto([1, 2, 3, 4])
    twin = chain.copy()
    assert twin.upto([1, 2, 3, 4, 9, 9]) == hashes([1, 2, 3, 4, 9, 9], 2)
    assert chain.upto([1, 2, 3, 4, 5, 6]) == hashes([1, 2, 3, 4, 5, 6], 2)
