"""What the platform under test says of itself, asked again and again."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from forebay.deploy.status import PlatformStatus, WorkerState, WorkerStatus
from forebay_loadtest.local_platform import LocalPlatform

POLL_S = 0.3


class NotInTime(Exception):
    """The platform did not come into the state that was waited for."""


class Watch:
    """`latest`: the last answer. `accounting_errors`: blocks that were in no state, or in two."""

    def __init__(self, platform: LocalPlatform) -> None:
        self.latest: PlatformStatus | None = None
        self.accounting_errors: list[str] = []
        self._platform = platform
        self._news = asyncio.Condition()

    async def run(self) -> None:
        while True:
            status = await self._platform.status()
            for item in status.workers:
                self._check_blocks(item)
            async with self._news:
                self.latest = status
                self._news.notify_all()
            await asyncio.sleep(POLL_S)

    async def until(
        self, condition: Callable[[PlatformStatus], bool], limit_s: float
    ) -> PlatformStatus:
        """Only answers that were asked for after this call count. Raises NotInTime."""
        began = time.monotonic()
        seen = 0
        async with self._news:
            try:
                async with asyncio.timeout(limit_s):
                    while True:
                        await self._news.wait()
                        seen += 1
                        status = self.latest
                        if seen > 1 and status is not None and condition(status):
                            return status
            except TimeoutError:
                waited = time.monotonic() - began
                raise NotInTime(f"waited {waited:.0f} s: {summary(self.latest)}") from None

    def _check_blocks(self, item: WorkerStatus) -> None:
        blocks = item.worker.load.kv_blocks
        parts = blocks.free + blocks.cached + blocks.used + blocks.leased + blocks.quarantined
        if parts != blocks.total:
            self.accounting_errors.append(f"{item.role} {item.worker.worker_id}: {blocks}")


def ready(status: PlatformStatus, role: str) -> dict[str, str]:
    """Epoch to address of a pool's workers that answer."""
    return {
        item.worker.epoch: item.address
        for item in status.workers
        if item.role == role and item.state is WorkerState.READY
    }


def held_blocks(status: PlatformStatus) -> int:
    """Of all workers: neither free nor cached."""
    every = [item.worker.load.kv_blocks for item in status.workers]
    return sum(blocks.used + blocks.leased + blocks.quarantined for blocks in every)


def idle(status: PlatformStatus) -> bool:
    totals = status.totals()
    return totals["running"] == totals["waiting"] == held_blocks(status) == 0


def summary(status: PlatformStatus | None) -> str:
    if status is None:
        return "no answer yet"
    workers = ", ".join(f"{item.role} {item.state}" for item in status.workers)
    gateway = "ready" if status.gateway_ready else "not ready"
    held = held_blocks(status)
    return f"gateway {gateway}; {workers or 'no workers'}; {held} blocks held; {status.totals()}"
