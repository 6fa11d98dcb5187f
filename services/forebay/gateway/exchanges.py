"""All HTTP requests of a gateway that generate something."""

from __future__ import annotations

import asyncio

from forebay.core.errors import ForebayError, Unavailable
from forebay.gateway.exchange import Exchange


class Exchanges:
    """The requests under way, so that a gateway that drains can wait for them and cut the rest.
    While `draining` new ones are refused."""

    def __init__(self) -> None:
        self.draining = False
        self._open: dict[str, Exchange] = {}
        self._none_open = asyncio.Event()
        self._none_open.set()

    def __len__(self) -> int:
        return len(self._open)

    def add(self, exchange: Exchange) -> None:
        if self.draining:
            raise Unavailable("this gateway is shutting down")
        self._open[exchange.request_id] = exchange
        self._none_open.clear()

    def remove(self, exchange: Exchange) -> None:
        self._open.pop(exchange.request_id, None)
        if not self._open:
            self._none_open.set()

    async def finish(self, timeout_s: float) -> None:
        """Returns when none is open; cuts what is left when the time is up."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._none_open.wait()
        except TimeoutError:
            self._cut(Unavailable("this gateway shut down before the answer was complete"))

    def _cut(self, error: ForebayError) -> None:
        for exchange in list(self._open.values()):
            exchange.cut(error)
