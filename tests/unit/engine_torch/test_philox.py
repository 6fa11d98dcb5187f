from __future__ import annotations

import pytest

from forebay.engine.philox import Words, philox4x32, uniform

FULL = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (
            (FULL, FULL, FULL, FULL),
            (FULL, FULL),
            (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        ),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_published_vectors(counter: Words, key: tuple[int, int], expected: Words) -> None:
    """kat_vectors of the Random123 library."""
    assert philox4x32(counter, key) == expected


def test_uniform_is_built_from_the_first_two_words() -> None:
    assert uniform(0, 0, 0) == (0x6627E8D5E169C58D >> 11) / 2**53


@pytest.mark.parametrize("seed", [0, 1, 2**63, 2**64 - 1, -1, -(2**63)])
def test_uniform_is_in_range_for_every_seed(seed: int) -> None:
    draws = [uniform(seed, choice, position) for choice in range(4) for position in range(50)]
    assert all(0.0 <= draw < 1.0 for draw in draws)
    assert len(set(draws)) == len(draws)


def test_negative_seeds_are_taken_modulo_two_to_the_64() -> None:
    assert uniform(-1, 3, 4) == uniform(2**64 - 1, 3, 4)


def test_the_mean_and_spread_are_those_of_a_uniform() -> None:
    draws = [uniform(12345, 0, position) for position in range(4000)]
    mean = sum(draws) / len(draws)
    variance = sum((draw - mean) ** 2 for draw in draws) / len(draws)
    assert abs(mean - 0.5) < 0.02
    assert abs(variance - 1 / 12) < 0.005
