"""The random seam: ids and default seeds come from an `Rng` handed in, never from a module."""

from __future__ import annotations

import random


class Rng:
    """Draws ids and seeds. Without a seed it reads the system's entropy."""

    def __init__(self, seed: int | None = None) -> None:
        self._random = random.SystemRandom() if seed is None else random.Random(seed)

    def token(self, prefix: str) -> str:
        """`prefix-` followed by 96 random bits in hexadecimal."""
        return f"{prefix}-{self._random.getrandbits(96):024x}"

    def seed64(self) -> int:
        """A uniform integer in [0, 2**63)."""
        return self._random.getrandbits(63)

    def uniform(self) -> float:
        """A uniform float in [0, 1)."""
        return self._random.random()
