"""An asyncio event loop whose clock jumps: when nothing is ready it goes straight to the next
timer. It opens no sockets or pipes and knows no other thread."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

from forebay.core.errors import InternalError

T = TypeVar("T")


class Deadlock(InternalError):
    """Every task waits for something, and no timer is left to wake one."""


class _JumpingSelector:
    """Stands where the loop would wait for sockets: advances the clock instead."""

    def __init__(self) -> None:
        self.now = 0.0

    def select(self, timeout: float | None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise Deadlock("every task waits, and no timer is left")
        self.now += max(0.0, timeout)
        return []


class VirtualTimeLoop(asyncio.base_events.BaseEventLoop):
    """`time()` starts at 0 and moves only while every task waits."""

    def __init__(self) -> None:
        super().__init__()
        self._selector = _JumpingSelector()
        self._clock_resolution = 1e-9

    def time(self) -> float:
        return self._selector.now

    def _process_events(self, event_list: list[Any]) -> None:
        assert not event_list

    def _write_to_self(self) -> None:
        """Called when another thread schedules something: none does."""


def run(main: Coroutine[Any, Any, T]) -> T:
    """Runs `main` to its end in virtual time. Raises Deadlock."""
    loop = VirtualTimeLoop()
    asyncio.set_event_loop(loop)
    try:
        return loop.run_until_complete(main)
    finally:
        try:
            _cancel_all(loop)
            loop.run_until_complete(loop.shutdown_asyncgens())
        finally:
            asyncio.set_event_loop(None)
            loop.close()


def _cancel_all(loop: VirtualTimeLoop) -> None:
    tasks = asyncio.all_tasks(loop)
    for task in tasks:
        task.cancel()
    loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
