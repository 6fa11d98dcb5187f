"""Rounds of clients that go away, and what is left of them after each."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

from forebay_loadtest.departures import Departure, Phase, Seen, plan_departures
from forebay_loadtest.footprint import Sizes, busy_requests, rss_by_role
from forebay_loadtest.leaving_clients import LeavingClients, Request
from forebay_loadtest.local_platform import LocalPlatform
from forebay_loadtest.streams import make_prompts
from forebay_loadtest.watch import NotInTime, Watch, held_blocks, idle

IDLE_LIMIT_S = 30.0
AT_ONCE = 8


@dataclass(frozen=True, slots=True)
class Round:
    """`idle_s`: until nothing was held or counted any more, None when it did not come to that.
    `num_expired`: leases that ran out, of all rounds so far."""

    num_clients: int
    idle_s: float | None
    held_blocks: int
    num_busy: int
    num_sequences: int
    num_expired: int
    rss: Sizes


@dataclass(frozen=True, slots=True)
class VanishRun:
    """`repeats`: of a prompt of up to 120 words, to make its prefill long enough to be left."""

    platform: LocalPlatform
    repeats: int
    max_tokens: int
    seed: int

    async def run(self, num_clients: int, num_rounds: int) -> tuple[list[Seen], list[Round]]:
        watch = Watch(self.platform)
        watching = asyncio.create_task(watch.run())
        seen: list[Seen] = []
        rounds = []
        try:
            async with LeavingClients(self.platform.http_port, self.platform.grpc_address) as all_:
                for number in range(num_rounds):
                    begin, end = (num_clients * at // num_rounds for at in (number, number + 1))
                    seen += await self._leave(all_, self._requests(end - begin, number), number)
                    rounds.append(await self._settle(watch, end - begin))
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
        return seen, rounds

    def _requests(self, count: int, number: int) -> list[Request]:
        model = self.platform.run_state.model_id
        prompts = make_prompts(count, self.seed + number)
        long = [" ".join([prompt] * self.repeats) for prompt in prompts]
        return [Request(model, prompt, self.max_tokens) for prompt in long]

    async def _leave(
        self, clients: LeavingClients, requests: Sequence[Request], number: int
    ) -> list[Seen]:
        """Those that shall be queued come all at once, the others a few at a time."""
        paces = await asyncio.gather(*(clients.pace(each) for each in requests[:AT_ONCE]))
        pace = sorted(paces, key=lambda pace: pace.first_s)[len(paces) // 2]
        pairs = list(
            zip(requests, plan_departures(len(requests), pace, self.seed + number), strict=True)
        )
        burst = [pair for pair in pairs if pair[1].phase is Phase.QUEUED]
        seen = list(await asyncio.gather(*(clients.run(*pair) for pair in burst)))
        places = asyncio.Semaphore(AT_ONCE)

        async def one(pair: tuple[Request, Departure]) -> Seen:
            async with places:
                return await clients.run(*pair)

        others = [pair for pair in pairs if pair[1].phase is not Phase.QUEUED]
        return seen + list(await asyncio.gather(*(one(pair) for pair in others)))

    async def _settle(self, watch: Watch, num_clients: int) -> Round:
        began = time.monotonic()
        idle_s: float | None = None
        num_busy = 0
        while idle_s is None and time.monotonic() - began < IDLE_LIMIT_S:
            try:
                await watch.until(idle, IDLE_LIMIT_S)
            except NotInTime:
                break
            num_busy = await busy_requests(self.platform)
            if not num_busy:
                idle_s = time.monotonic() - began
        status = watch.latest
        assert status is not None
        totals = status.totals()
        return Round(
            num_clients=num_clients,
            idle_s=idle_s,
            held_blocks=held_blocks(status),
            num_busy=num_busy,
            num_sequences=totals["running"] + totals["waiting"],
            num_expired=sum(item.worker.counters.expired_leases for item in status.workers),
            rss=rss_by_role(self.platform, status),
        )
