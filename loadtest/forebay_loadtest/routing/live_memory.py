"""Prompts that never repeat: does the index stay under its bound, and the gateway with it?"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from forebay_loadtest import proc
from forebay_loadtest.routing.bare_platform import (
    MODEL,
    BarePlatform,
    Capacity,
    bare_platform,
    scrape,
)
from forebay_loadtest.routing.clients import RequestFlow
from forebay_loadtest.routing.live_dynamo import NUM_CLIENTS
from forebay_loadtest.routing.workload import random_prompts

CAPACITY = Capacity(num_blocks=65_536, max_batch_tokens=8192)
"""Four workers hold more blocks than the index may know."""
INDEX_MIB = 8
PROMPT_TOKENS = 4096
SAMPLE_S = 10.0
MAX_GROWTH = 16 << 20
"""Bytes that the gateway may gain from the middle of the run to its end: allocators' own noise."""
INDEX_BYTES = "forebay_kv_index_bytes"
INDEX_BLOCKS = "forebay_kv_index_blocks"
APPLIED = "forebay_kv_events_applied_total"
EVICTED = "forebay_kv_index_evictions_total"


@dataclass(frozen=True, slots=True)
class MemorySample:
    """`at_s`: since the first request. `index_bytes` is None when the gateway does not tell."""

    at_s: float
    num_requests: int
    num_failed: int
    index_bytes: float | None
    index_blocks: float
    blocks_applied: float
    blocks_evicted: float
    gateway_rss: int


async def run_memory(
    minutes: float, seed: int, report: Callable[[MemorySample], None]
) -> list[MemorySample]:
    """A sample every ten seconds, and one at the end."""
    settings = {"kv_index_mib": str(INDEX_MIB)}
    engine = {"sim_time_scale": "0"}
    samples = []
    async with bare_platform(CAPACITY, engine=engine, gateway=settings) as platform:
        flow = RequestFlow(
            platform.urls,
            MODEL,
            random_prompts(PROMPT_TOKENS, seed),
            num_clients=NUM_CLIENTS,
            max_tokens=1,
            seed=seed,
        )
        running = asyncio.create_task(flow.run())
        began = time.monotonic()
        try:
            while (left := began + 60.0 * minutes - time.monotonic()) > 0:
                await asyncio.sleep(min(SAMPLE_S, left))
                samples.append(await _sample(platform, flow, time.monotonic() - began))
                report(samples[-1])
        finally:
            flow.leave()
            await running
    return samples


async def _sample(platform: BarePlatform, flow: RequestFlow, at_s: float) -> MemorySample:
    (page,) = await scrape(platform.gateways)
    return MemorySample(
        at_s=round(at_s, 1),
        num_requests=len(flow.outcomes),
        num_failed=flow.num_failed,
        index_bytes=page.get(INDEX_BYTES),
        index_blocks=page.get(INDEX_BLOCKS, 0.0),
        blocks_applied=page.get(APPLIED, 0.0),
        blocks_evicted=page.get(EVICTED, 0.0),
        gateway_rss=proc.rss_bytes(platform.gateways[0].record.pid),
    )


def shortfalls(samples: Sequence[MemorySample]) -> list[str]:
    """Empty when the index was full and never above its bound, and the gateway did not grow."""
    bound = INDEX_MIB << 20
    known = [each.index_bytes for each in samples if each.index_bytes is not None]
    if len(known) < len(samples) or not known:
        return [f"the gateway does not tell {INDEX_BYTES}"]
    short = []
    if max(known) > bound:
        short.append(f"the index took {max(known) / 2**20:.2f} MiB of {INDEX_MIB}")
    if not samples[-1].blocks_evicted:
        short.append(f"the index was never full: {max(known) / 2**20:.2f} of {INDEX_MIB} MiB")
    grown = growth(samples)
    if grown > MAX_GROWTH:
        short.append(f"the gateway grew by {grown / 2**20:.1f} MiB in the second half")
    if samples[-1].num_failed:
        short.append(f"{samples[-1].num_failed} requests failed")
    return short


def growth(samples: Sequence[MemorySample]) -> int:
    """Bytes of the gateway, from the middle sample to the last."""
    return samples[-1].gateway_rss - samples[(len(samples) - 1) // 2].gateway_rss
