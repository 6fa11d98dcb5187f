"""Draws of a simulation, over the random seam."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from forebay.core.randomness import Rng

T = TypeVar("T")


class Dice:
    """`stream` keeps draws of different purposes apart, so that one more draw for one of them
    leaves the others as they are."""

    def __init__(self, seed: int, stream: int = 0) -> None:
        self._uniform = Rng(seed * 1024 + stream).uniform

    def chance(self, probability: float) -> bool:
        return self._uniform() < probability

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * self._uniform()

    def below(self, limit: int) -> int:
        """A whole number in [0, limit)."""
        return int(limit * self._uniform())

    def pick(self, choices: Sequence[T]) -> T:
        return choices[self.below(len(choices))]

    def shuffled(self, items: Sequence[T]) -> list[T]:
        rest = list(items)
        return [rest.pop(self.below(len(rest))) for _ in range(len(rest))]
