"""Philox 4x32-10, a counter-based generator: the same key and counter give the same numbers.

Salmon, Moraes, Dror, Shaw: Parallel Random Numbers: As Easy as 1, 2, 3 (SC 2011).
"""

from __future__ import annotations

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_MASK32 = 0xFFFFFFFF
_MASK64 = 0xFFFFFFFFFFFFFFFF

Words = tuple[int, int, int, int]


def philox4x32(counter: Words, key: tuple[int, int]) -> Words:
    """Four 32-bit words from a 128-bit counter and a 64-bit key, both as 32-bit words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        low = _MULTIPLIERS[0] * c0
        high = _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (
            (high >> 32) ^ c1 ^ k0,
            high & _MASK32,
            (low >> 32) ^ c3 ^ k1,
            low & _MASK32,
        )
        k0 = (k0 + _WEYL[0]) & _MASK32
        k1 = (k1 + _WEYL[1]) & _MASK32
    return c0, c1, c2, c3


def uniform(seed: int, choice: int, position: int) -> float:
    """A multiple of 2**-53 in [0, 1). key = seed modulo 2**64; counter = (choice, position, 0, 0).
    position: index of the token among the generated ones."""
    assert 0 <= choice <= _MASK32 and 0 <= position <= _MASK32
    key = seed & _MASK64
    first, second, _, _ = philox4x32((choice, position, 0, 0), (key & _MASK32, key >> 32))
    return float((first << 32 | second) >> 11) * 2.0**-53
