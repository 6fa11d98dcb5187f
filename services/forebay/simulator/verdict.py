"""What went wrong in a simulation, if anything did: the first thing counts."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from forebay.simulator.loop import SimLoop
from forebay.simulator.timeline import Timeline


class Verdict(logging.Handler):
    """Takes reports from checks, from the loop, and from the log: production code that logs an
    error has met something it holds for a bug."""

    def __init__(self, loop: SimLoop, timeline: Timeline) -> None:
        super().__init__(logging.INFO if timeline.on else logging.ERROR)
        self.error: BaseException | None = None
        self.failed = asyncio.Event()
        self._loop = loop
        self._timeline = timeline

    def report(self, error: BaseException, what: str = "") -> None:
        node = self._loop.node
        self._timeline.add(self._loop.now, node.name, f"FAILED: {what} {error!r}")
        if self.error is None:
            self.error = error
            self.failed.set()

    def on_bug(self, what: str, error: Exception) -> None:
        self.report(error, what)

    def on_loop_error(self, _: Any, context: dict[str, Any]) -> None:
        error = context.get("exception") or AssertionError(context["message"])
        self.report(error, context["message"])

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if record.levelno >= logging.ERROR:
            cause = record.exc_info[1] if record.exc_info else None
            self.report(cause or AssertionError(message), message)
        else:
            self._timeline.add(self._loop.now, self._loop.node.name, f"log: {message}")
