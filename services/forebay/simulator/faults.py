"""What can go wrong: faults by kind. Each says afterwards whether it took place."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from forebay.simulator.world import World

Verified = Callable[[], bool]


@dataclass(frozen=True, slots=True)
class FaultKind:
    """`inject` does it and returns, when it is over, how to tell at the end of the seed whether it
    took place."""

    name: str
    inject: Callable[[World], Awaitable[Verified]]


def seen() -> bool:
    """It took place."""
    return True


def not_seen() -> bool:
    """There was nothing it could have done."""
    return False


def verified(took_place: bool) -> Verified:
    return seen if took_place else not_seen
