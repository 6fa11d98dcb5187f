"""Where requests wait for a place on a worker: first come, first served, bounded in number and
time; streams that lost their worker come before requests that have not begun. Waiting here costs
nothing but memory: nothing is reserved, and leaving is free."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from typing import TypeVar

from forebay.core import clock
from forebay.core.clock import Deadline
from forebay.core.errors import Overloaded

T = TypeVar("T")

RETRY_EVERY_S = 0.25
"""The first in line tries again this often even if nobody told it of a change."""
_RATE_WINDOW = 64
_MAX_RETRY_AFTER_S = 60.0


class AdmissionQueue:
    """`attempt` functions return None while there is no place."""

    def __init__(self, max_waiting: int) -> None:
        self._max_waiting = max_waiting
        self._line: list[asyncio.Event] = []
        self._num_urgent = 0
        self._placed_at: deque[float] = deque(maxlen=_RATE_WINDOW)

    def __len__(self) -> int:
        return len(self._line)

    async def admit(
        self,
        attempt: Callable[[], Awaitable[T | None]],
        deadline: Deadline,
        *,
        urgent: bool = False,
    ) -> T:
        """The first result that is not None. Raises Overloaded when the line is full or
        `deadline` passes; whatever `attempt` raises ends the wait as well. `urgent` ones stand
        before all others, however long the line is."""
        if not self._line:
            result = await attempt()
            if result is not None:
                return self._placed(result)
        if not urgent and len(self._line) >= self._max_waiting:
            raise Overloaded("too many requests are waiting", retry_after_s=self.retry_after_s())
        turn = asyncio.Event()
        self._line.insert(self._num_urgent if urgent else len(self._line), turn)
        self._num_urgent += urgent
        self.notify()
        try:
            while not deadline.expired:
                turn.clear()
                if self._line[0] is turn:
                    result = await attempt()
                    if result is not None:
                        return self._placed(result)
                await self._wait(turn, deadline)
        finally:
            self._line.remove(turn)
            self._num_urgent -= urgent
            self.notify()
        raise Overloaded("no place came free in time", retry_after_s=self.retry_after_s())

    def notify(self) -> None:
        """Something may have come free: the first in line tries again."""
        if self._line:
            self._line[0].set()

    def retry_after_s(self) -> float:
        """How long the line would take at the rate of the latest placements."""
        if len(self._placed_at) < 2:
            return 1.0
        elapsed = clock.now() - self._placed_at[0]
        return min(_MAX_RETRY_AFTER_S, max(1.0, len(self._line) * elapsed / len(self._placed_at)))

    def _placed(self, result: T) -> T:
        self._placed_at.append(clock.now())
        return result

    async def _wait(self, turn: asyncio.Event, deadline: Deadline) -> None:
        is_first = self._line[0] is turn
        limit = deadline.within(RETRY_EVERY_S) if is_first else deadline
        try:
            async with asyncio.timeout(limit.remaining_s()):
                await turn.wait()
        except TimeoutError:
            return
