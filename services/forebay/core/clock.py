"""Monotonic time and the one deadline that every wait of a request derives from.

Time is the running event loop's: real in production, virtual in simulation. On the wire a
deadline travels as remaining milliseconds and is pinned to the receiver's own clock.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from forebay.core.errors import DeadlineExceeded


def now() -> float:
    """Seconds on the running loop's monotonic clock."""
    return asyncio.get_running_loop().time()


@dataclass(frozen=True, slots=True)
class Deadline:
    """`at`: absolute seconds on the running loop's clock."""

    at: float

    @classmethod
    def after(cls, seconds: float) -> Deadline:
        return cls(now() + seconds)

    @classmethod
    def after_ms(cls, milliseconds: int) -> Deadline:
        return cls.after(milliseconds / 1000)

    def remaining_s(self) -> float:
        """Never negative."""
        return max(0.0, self.at - now())

    def remaining_ms(self) -> int:
        """At least 1 while time is left, so that a wire value of 0 always means expired."""
        remaining = self.remaining_s()
        return max(1, int(remaining * 1000)) if remaining > 0 else 0

    def within(self, seconds: float) -> Deadline:
        """The earlier of this deadline and `seconds` from now."""
        return Deadline(min(self.at, now() + seconds))

    @property
    def expired(self) -> bool:
        return now() >= self.at

    def check(self, what: str) -> None:
        """Raises DeadlineExceeded when no time is left."""
        if self.expired:
            raise DeadlineExceeded(f"the request's deadline passed while {what}")
