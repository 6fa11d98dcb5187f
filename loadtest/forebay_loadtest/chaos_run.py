"""One platform, one crowd, one plan of faults."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from forebay_loadtest.chaos_report import Outcome
from forebay_loadtest.chat_stream import ChatStream, Ending, http_client, run_chat
from forebay_loadtest.crowd import Body, Crowd, make_bodies
from forebay_loadtest.fault_plan import FaultKind
from forebay_loadtest.fault_records import FaultRecord
from forebay_loadtest.footprint import Sizes, busy_requests, rss_by_role
from forebay_loadtest.injector import Injector
from forebay_loadtest.local_platform import LocalPlatform
from forebay_loadtest.watch import NotInTime, Watch, held_blocks, idle

PROBE_LIMIT_S = 60.0
FINISH_LIMIT_S = 90.0
IDLE_LIMIT_S = 30.0
"""Longer than every lease."""
_POLL_S = 0.1


@dataclass(slots=True, kw_only=True)
class ChaosRun:
    """`run` once. `quiet_s`: of streams without faults, before the first. `say` tells what happens,
    line by line."""

    engine: str
    platform: LocalPlatform
    pools: Mapping[str, int]
    num_streams: int
    num_bodies: int
    max_tokens: int
    quiet_s: float
    spacing_s: float
    seed: int
    say: Callable[[str], None]
    _faults: list[FaultRecord] = field(default_factory=list)
    _problems: list[str] = field(default_factory=list)
    _began: float = field(default_factory=time.monotonic)

    async def run(self, plan: Sequence[FaultKind], end_at: float) -> Outcome:
        """No fault begins after `end_at`, on `time.monotonic`."""
        model = self.platform.run_state.model_id
        bodies = make_bodies(model, self.num_bodies, self.max_tokens, self.seed)
        crowd = Crowd(self.platform.url, bodies, self.num_streams, self.seed)
        references = await crowd.reference()
        self.say(f"{self.engine}: {len(references)} undisturbed answers recorded")
        watch = Watch(self.platform)
        watching = asyncio.create_task(watch.run())
        try:
            await watch.until(idle, IDLE_LIMIT_S)
            rss_before = await self._rss(watch)
            crowd.start()
            quiet_at = time.monotonic() + self.quiet_s / 2
            await asyncio.sleep(self.quiet_s)
            await self._inject_all(watch, bodies[0], plan, end_at)
            await crowd.finish(FINISH_LIMIT_S)
            leaked = await self._leaked(watch)
            rss_after = await self._rss(watch)
            busy = await busy_requests(self.platform)
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
        return Outcome(
            engine=self.engine,
            wanted=len(plan),
            faults=self._faults,
            streams=crowd.streams,
            references=references,
            leaked_blocks=leaked,
            num_busy=busy,
            accounting_errors=watch.accounting_errors,
            quiet_at=quiet_at,
            rss_before=rss_before,
            rss_after=rss_after,
            seconds=time.monotonic() - self._began,
            problem="; ".join(self._problems),
        )

    # --- faults ----------------------------------------------------------------------------

    async def _inject_all(
        self, watch: Watch, probe_body: Body, plan: Sequence[FaultKind], end_at: float
    ) -> None:
        """In the order of the plan, but for those whose target has not healed yet."""
        injector = Injector(
            self.platform, watch, self.pools, lambda: self._probe(probe_body), self.seed
        )
        waiting = list(plan)
        under_way: dict[asyncio.Task[None], FaultKind] = {}
        try:
            while waiting and time.monotonic() < end_at:
                for task in [task for task in under_way if task.done()]:
                    task.result()
                    del under_way[task]
                kind = next_fault(waiting, list(under_way.values()))
                if kind is None:
                    await asyncio.sleep(_POLL_S)
                    continue
                waiting.remove(kind)
                under_way[asyncio.create_task(self._inject(injector, kind))] = kind
                await asyncio.sleep(self.spacing_s)
        finally:
            await asyncio.gather(*under_way)

    async def _inject(self, injector: Injector, kind: FaultKind) -> None:
        fault = FaultRecord(kind, time.monotonic())
        self._faults.append(fault)
        try:
            await injector.carry_out(kind, fault)
        except NotInTime as error:
            self._problems.append(f"{kind.name}: {error}")
        back = "not back" if fault.back_s is None else f"back after {fault.back_s:.1f} s"
        since = fault.at - self._began
        self.say(f"{since:6.1f} s  {kind.name:<14} {fault.victim}: {fault.evidence}; {back}")

    async def _probe(self, body: Body) -> None:
        """Raises NotInTime."""
        end = time.monotonic() + PROBE_LIMIT_S
        async with http_client(1) as http:
            while True:
                stream = ChatStream(client=-1, spec=-1, began=time.monotonic())
                await run_chat(http, self.platform.url, {**body, "max_tokens": 1}, stream)
                if stream.ending is Ending.COMPLETE:
                    return
                if time.monotonic() > end:
                    raise NotInTime(f"no answer: {stream.error}")
                await asyncio.sleep(_POLL_S)

    # --- before and after ------------------------------------------------------------------

    async def _leaked(self, watch: Watch) -> int:
        try:
            await watch.until(idle, IDLE_LIMIT_S)
        except NotInTime as error:
            self._problems.append(f"not idle: {error}")
        assert watch.latest is not None
        return held_blocks(watch.latest)

    async def _rss(self, watch: Watch) -> Sizes:
        return rss_by_role(self.platform, await watch.until(lambda _: True, IDLE_LIMIT_S))


def next_fault(waiting: Sequence[FaultKind], under_way: Sequence[FaultKind]) -> FaultKind | None:
    """The first that may begin beside those under way; one that must be alone is not overtaken."""
    for kind in waiting:
        if all(kind.goes_with(other) for other in under_way):
            return kind
        if kind.alone:
            return None
    return None
