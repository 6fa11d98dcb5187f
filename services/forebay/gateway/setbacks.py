"""What a request remembers of the legs that broke."""

from __future__ import annotations

from forebay.gateway.leg import Leg
from forebay.gateway.worker_link import WorkerLink

MAX_DEATHS = 2
"""Workers that may die of one request before it is blocked."""
DEATH_SLACK_TOKENS = 8
"""A request that got further than this between two deaths did not cause both; a few of a dead
worker's last tokens may never have arrived."""
_FIRST_DELAY_S = 0.1
_MAX_DELAY_S = 5.0


class Pace:
    """How soon to try again: at once after progress, then later and later, so that what cannot
    work is not tried as often as possible. `num_fruitless`: migrations since the last progress."""

    def __init__(self) -> None:
        self.num_fruitless = 0
        self._num_tokens = 0

    def broke(self, num_tokens: int) -> float:
        """Seconds to wait. `num_tokens`: generated so far."""
        self.num_fruitless = 1 if num_tokens > self._num_tokens else self.num_fruitless + 1
        self._num_tokens = num_tokens
        if self.num_fruitless == 1:
            return 0.0
        return min(_MAX_DELAY_S, _FIRST_DELAY_S * 2.0 ** (self.num_fruitless - 2))


class Deaths:
    """Workers that may have died of the request, one for each time that it had begun anew. What
    breaks several legs at once is one death."""

    def __init__(self) -> None:
        self.links: list[WorkerLink] = []
        self._num_tokens = 0
        self._first_leg = 0

    def note(self, leg: Leg, link: WorkerLink, num_tokens: int, num_legs: int) -> None:
        """`num_legs`: that the request has had so far."""
        if leg.number < self._first_leg:
            return
        if num_tokens - self._num_tokens > DEATH_SLACK_TOKENS:
            self.links.clear()
        self.links.append(link)
        self._num_tokens = num_tokens
        self._first_leg = num_legs
