"""Requests go on while faults strike the KV events; what it costs and how soon it is over."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import httpx

from forebay_loadtest.local_platform import PlatformError
from forebay_loadtest.routing.bare_platform import (
    MODEL,
    BarePlatform,
    Capacity,
    bare_platform,
    scrape,
)
from forebay_loadtest.routing.clients import RequestFlow
from forebay_loadtest.routing.faults import Fault, NotStruck, strike
from forebay_loadtest.routing.live_dynamo import MAX_TOKENS, NUM_CLIENTS, TIME_SCALE
from forebay_loadtest.routing.shares import Recovery, ended_within, recovery
from forebay_loadtest.routing.workload import ConversationMix, InfiniteCache, conversations

CAPACITY = Capacity(num_blocks=3072)
"""Room for what is live: a share that falls has fallen because of the fault."""
NUM_GATEWAYS = 2
WARM_UP_S = 15.0
BEFORE_S = 6.0
WINDOW_S = 3.0
WATCH_S = 12.0
"""A fault is watched this long after it is over."""
FRESH_S = 0.5
"""An index that is no further behind is in step: events come every 50 ms."""
SCRAPE_S = 0.25
STALENESS = "forebay_kv_index_staleness_seconds"
DEGRADED = "forebay_router_degraded"
RESYNCS = "forebay_kv_resyncs_total"
GAPS = "forebay_kv_event_gaps_total"


@dataclass(frozen=True, slots=True)
class RouterSample:
    """The worst of all gateways; counters are sums. `staleness_s` is None when a gateway does not
    tell."""

    at: float
    staleness_s: float | None
    degraded: bool
    resyncs: float
    gaps: float


@dataclass(frozen=True, slots=True)
class FaultResult:
    """`struck`: whether the fault happened; `evidence` says how that is known. `router_back_s`:
    from the strike until the routers' own metrics said for good that they were in step and not
    degraded; 0 when they never said otherwise, None when they never said so again. Counters: by
    how much they rose."""

    fault: str
    struck: bool
    evidence: str
    fault_s: float
    num_requests: int
    num_failed: int
    first_error: str
    share: Recovery
    max_staleness_s: float
    was_degraded: bool
    router_back_s: float | None
    resyncs: float
    gaps: float


@dataclass(slots=True)
class RouterWatch:
    platform: BarePlatform
    samples: list[RouterSample] = field(default_factory=list)

    async def run(self) -> None:
        """Until cancelled. A gateway that is stopped for a moment answers late."""
        while True:
            try:
                pages = await scrape(self.platform.gateways)
            except httpx.TransportError:
                continue
            finally:
                await asyncio.sleep(SCRAPE_S)
            staleness = [page.get(STALENESS) for page in pages]
            known = [each for each in staleness if each is not None]
            self.samples.append(
                RouterSample(
                    at=time.monotonic(),
                    staleness_s=max(known) if len(known) == len(pages) else None,
                    degraded=any(page.get(DEGRADED, 0.0) > 0 for page in pages),
                    resyncs=sum(page.get(RESYNCS, 0.0) for page in pages),
                    gaps=sum(page.get(GAPS, 0.0) for page in pages),
                )
            )


def router_back_s(samples: list[RouterSample], struck_at: float) -> float | None:
    """As FaultResult says; `samples`: from the strike on."""
    bad = [
        each.at
        for each in samples
        if each.degraded or each.staleness_s is None or each.staleness_s > FRESH_S
    ]
    if not bad:
        return 0.0 if samples else None
    good = [each.at for each in samples if each.at > bad[-1]]
    return good[0] - struck_at if good else None


async def run_faults(
    seed: int, faults: list[Fault], report: Callable[[FaultResult], None]
) -> list[FaultResult]:
    """One platform and one flow of requests through all faults. Raises PlatformError."""
    engine = {"sim_time_scale": str(TIME_SCALE)}
    results = []
    async with bare_platform(CAPACITY, num_gateways=NUM_GATEWAYS, engine=engine) as platform:
        flow = RequestFlow(
            platform.urls,
            MODEL,
            conversations(ConversationMix(), seed),
            num_clients=NUM_CLIENTS,
            max_tokens=MAX_TOKENS,
            seed=seed,
            ideal=InfiniteCache(CAPACITY.block_size),
        )
        watch = RouterWatch(platform)
        watching = asyncio.create_task(watch.run())
        running = asyncio.create_task(flow.run())
        try:
            await asyncio.sleep(WARM_UP_S - BEFORE_S)
            for fault in faults:
                await asyncio.sleep(BEFORE_S)
                results.append(await _one(fault, platform, flow, watch))
                report(results[-1])
        finally:
            flow.leave()
            await running
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
    return results


async def _one(
    fault: Fault, platform: BarePlatform, flow: RequestFlow, watch: RouterWatch
) -> FaultResult:
    struck_at = time.monotonic()
    before = watch.samples[-1]
    struck = True
    try:
        evidence = await strike(fault, platform)
    except NotStruck as error:
        struck, evidence = False, str(error)
    fault_s = time.monotonic() - struck_at
    await asyncio.sleep(WATCH_S)
    until = time.monotonic()
    samples = [each for each in watch.samples if each.at > struck_at]
    seen = ended_within(flow.outcomes, struck_at, until)
    errors = [each.error for each in seen if each.error]
    if not samples or not seen:
        raise PlatformError(f"{fault}: no request ended and no gateway answered")
    return FaultResult(
        fault=str(fault),
        struck=struck,
        evidence=evidence,
        fault_s=round(fault_s, 2),
        num_requests=len(seen),
        num_failed=len(errors),
        first_error=errors[0] if errors else "",
        share=recovery(flow.outcomes, struck_at, until, BEFORE_S, WINDOW_S),
        max_staleness_s=max(each.staleness_s or 0.0 for each in samples),
        was_degraded=any(each.degraded for each in samples),
        router_back_s=router_back_s(samples, struck_at),
        resyncs=samples[-1].resyncs - before.resyncs,
        gaps=samples[-1].gaps - before.gaps,
    )
