"""A process of the platform that is started again when it ends by itself."""

from __future__ import annotations

import logging
import subprocess
from collections.abc import Callable

from forebay.deploy.processes import ProcessRecord

FIRST_DELAY_S = 0.2
MAX_DELAY_S = 30.0
SETTLED_S = 5.0
"""A process that lived this long starts again with the first delay: what fails by its own fault
does so sooner."""

logger = logging.getLogger("forebay.supervisor")


class Service:
    """`spawn` gives a new process every time it is called. Times are the caller's clock."""

    def __init__(self, name: str, spawn: Callable[[], subprocess.Popen[bytes]]) -> None:
        self.name = name
        self._spawn = spawn
        self._process: subprocess.Popen[bytes] | None = None
        self._started_at = 0.0
        self._restart_at: float | None = None
        self._delay_s = FIRST_DELAY_S

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    @property
    def record(self) -> ProcessRecord | None:
        return None if self._process is None else ProcessRecord.of(self._process.pid)

    def start(self, now: float) -> None:
        self._process = self._spawn()
        self._started_at = now
        self._restart_at = None

    def exit_code(self) -> int | None:
        """None while it runs, and before it was started."""
        return None if self._process is None else self._process.poll()

    def tend(self, now: float) -> None:
        """Starts the process again when it has ended and its delay is over."""
        code = self.exit_code()
        if code is None:
            return
        if self._restart_at is None:
            if now - self._started_at >= SETTLED_S:
                self._delay_s = FIRST_DELAY_S
            self._restart_at = now + self._delay_s
            logger.warning(
                "%s ended with code %d: starting again in %.1f s", self.name, code, self._delay_s
            )
            self._delay_s = min(2 * self._delay_s, MAX_DELAY_S)
        if now >= self._restart_at:
            self.start(now)


class AdoptedService(Service):
    """A process that something else started first; its later lives are ours."""

    def __init__(
        self,
        name: str,
        record: ProcessRecord,
        spawn: Callable[[], subprocess.Popen[bytes]],
        now: float,
    ) -> None:
        super().__init__(name, spawn)
        self._adopted: ProcessRecord | None = record
        self._started_at = now

    @property
    def record(self) -> ProcessRecord | None:
        return self._adopted if self._adopted is not None else super().record

    def start(self, now: float) -> None:
        self._adopted = None
        super().start(now)

    def exit_code(self) -> int | None:
        """-1 for the first life: its exit status went to whoever reaped it."""
        if self._adopted is not None:
            return None if self._adopted.alive else -1
        return super().exit_code()
