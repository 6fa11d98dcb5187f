"""Where requests wait for a place on a worker: first come, first served, bounded in number and
time; streams that lost their worker come before requests that have not begun. One that waits for a
particular worker lets those behind it pass. Waiting here costs nothing but memory: nothing is
reserved, and leaving is free."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TypeVar

from forebay.core import clock
from forebay.core.clock import Deadline
from forebay.core.errors import Overloaded

T = TypeVar("T")

RETRY_EVERY_S = 0.25
"""The line is gone through this often even if nobody told it of a change."""
_RATE_WINDOW = 64
_MAX_RETRY_AFTER_S = 60.0


class NoPlace(Enum):
    """What became of an attempt that found no place."""

    NOBODY_PASSES = auto()
    ASIDE = auto()
    """Others may be placed first: what this one waits for is of no use to them."""


@dataclass(slots=True, eq=False)
class _Turn:
    may_try: Callable[[], bool]
    called: asyncio.Event = field(default_factory=asyncio.Event)


class AdmissionQueue:
    """One turn of the line tries at a time, so that places are given in the line's order."""

    def __init__(self, max_waiting: int) -> None:
        self._max_waiting = max_waiting
        self._line: list[_Turn] = []
        self._num_urgent = 0
        self._trying: _Turn | None = None
        self._changed = False
        self._placed_at: deque[float] = deque(maxlen=_RATE_WINDOW)

    def __len__(self) -> int:
        return len(self._line)

    async def admit(
        self,
        attempt: Callable[[], Awaitable[T | NoPlace]],
        deadline: Deadline,
        *,
        urgent: bool = False,
        may_try: Callable[[], bool] = lambda: True,
    ) -> T:
        """The first result of `attempt` that is a place. Raises Overloaded when the line is full or
        `deadline` passes; whatever `attempt` raises ends the wait as well. `urgent` ones stand
        before all others, however long the line is. `may_try`: cheap; False while an attempt after
        one that stood aside would be in vain."""
        if not self._line:
            result = await attempt()
            if not isinstance(result, NoPlace):
                return self._placed(result)
        if not urgent and len(self._line) >= self._max_waiting:
            raise Overloaded("too many requests are waiting", retry_after_s=self.retry_after_s())
        turn = _Turn(may_try)
        self._line.insert(self._num_urgent if urgent else len(self._line), turn)
        self._num_urgent += urgent
        self.notify()
        try:
            while not deadline.expired:
                if self._trying is turn:
                    turn.called.clear()
                    result = await attempt()
                    if not isinstance(result, NoPlace):
                        return self._placed(result)
                    self._tried(turn, result)
                await self._wait(turn, deadline)
        finally:
            self._line.remove(turn)
            self._num_urgent -= urgent
            if self._trying is turn:
                self._trying = None
            self.notify()
        raise Overloaded("no place came free in time", retry_after_s=self.retry_after_s())

    def notify(self) -> None:
        """Something may have come free: the line is gone through from its beginning."""
        if self._trying is None:
            self._call(0)
        else:
            self._changed = True

    def _call(self, start: int) -> None:
        """Lets the first from `start` on try that may."""
        self._changed = False
        for turn in self._line[start:]:
            if turn.may_try():
                self._trying = turn
                turn.called.set()
                return

    def _tried(self, turn: _Turn, outcome: NoPlace) -> None:
        self._trying = None
        if self._changed:
            self._call(0)
        elif outcome is NoPlace.ASIDE:
            self._call(self._line.index(turn) + 1)

    def retry_after_s(self) -> float:
        """How long the line would take at the rate of the latest placements."""
        if len(self._placed_at) < 2:
            return 1.0
        elapsed = clock.now() - self._placed_at[0]
        return min(_MAX_RETRY_AFTER_S, max(1.0, len(self._line) * elapsed / len(self._placed_at)))

    def _placed(self, result: T) -> T:
        self._placed_at.append(clock.now())
        return result

    async def _wait(self, turn: _Turn, deadline: Deadline) -> None:
        is_first = self._line[0] is turn
        limit = deadline.within(RETRY_EVERY_S) if is_first else deadline
        try:
            async with asyncio.timeout(limit.remaining_s()):
                await turn.called.wait()
        except TimeoutError:
            if is_first:
                self.notify()
