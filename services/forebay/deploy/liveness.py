"""Whether a process that runs still answers: a hang is a failure like an exit."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from forebay.deploy.processes import ProcessRecord

MAX_FAILURES = 3
"""Failed probes in a row that make a process a hung one. Counted, not timed, so that a supervisor
that was itself held up does not take its own silence for theirs."""
START_FAILURES = 30
"""The same before the process has answered for the first time."""


class Liveness:
    """`probe` answers or gives up within its own limit. One probe at a time."""

    def __init__(self, probe: Callable[[], Awaitable[bool]]) -> None:
        self._probe = probe
        self._task: asyncio.Task[bool] | None = None
        self._record: ProcessRecord | None = None
        self._answered = False
        self._failures = 0

    def hung(self, record: ProcessRecord) -> bool:
        """Takes the last probe's result, if there is one, and starts the next."""
        if record != self._record:
            self.close()
            self._record, self._answered, self._failures = record, False, 0
        if self._task is not None and self._task.done():
            answered = self._task.result()
            self._answered |= answered
            self._failures = 0 if answered else self._failures + 1
            self._task = None
        if self._task is None:
            self._task = asyncio.ensure_future(self._probe())
        return self._failures >= (MAX_FAILURES if self._answered else START_FAILURES)

    def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            self._task = None
