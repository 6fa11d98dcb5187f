"""The same request sets for Dynamo and for our gateways: cached-token shares side by side."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from forebay_loadtest.routing.bare_platform import MODEL, Capacity, bare_platform, scrape
from forebay_loadtest.routing.clients import RequestFlow
from forebay_loadtest.routing.dynamo_peer import DYNAMO_MODEL, dynamo
from forebay_loadtest.routing.shares import Outcome, Share
from forebay_loadtest.routing.workload import (
    ConversationMix,
    InfiniteCache,
    RoutedRequest,
    conversations,
    scaled_trace,
)

TRACE_SCALE = 16
"""A trace's prompts are shortened by this, and with them its 512-token prefix blocks to 32."""
CACHE_SHARE = 20
"""Each worker holds one in so many of a set's distinct blocks, as in the offline replay."""
NUM_CLIENTS = 16
MAX_TOKENS = 16
PULLED = "forebay_kv_pulled_tokens_total"
DYNAMO_TUNED = {"DYN_ROUTER_TRACK_ACTIVE_BLOCKS": "false", "DYN_ROUTER_PREFILL_LOAD_SCALE": "4"}
"""Best of ten settings of its KV router on both request sets: prefill load scale 0.5 to 8, with and
without the blocks that are in use, with and without predictions."""
TIME_SCALE = 0.1
"""Both simulated engines run ten times faster than the machines they are models of."""


@dataclass(frozen=True, slots=True)
class RequestSet:
    name: str
    requests: Sequence[RoutedRequest]
    capacity: Capacity

    @classmethod
    def of(cls, name: str, requests: Sequence[RoutedRequest]) -> RequestSet:
        capacity = Capacity()
        ideal = InfiniteCache(capacity.block_size)
        for request in requests:
            ideal.num_cached_tokens(request.rendered())
        return cls(name, requests, replace(capacity, num_blocks=ideal.num_blocks // CACHE_SHARE))


@dataclass(frozen=True, slots=True)
class SetResult:
    """One system's on one set. `cached`, `ideal`, `pulled`: percent of the prompt tokens; what a
    worker had pulled from another one is among the cached."""

    system: str
    request_set: str
    cached: float
    ideal: float
    pulled: float
    num_requests: int
    num_failed: int
    prompt_tokens: int
    mean_s: float
    wall_s: float
    first_error: str

    @classmethod
    def of(
        cls, system: str, chosen: RequestSet, outcomes: Sequence[Outcome], wall_s: float
    ) -> SetResult:
        share = Share.of(outcomes)
        errors = [each.error for each in outcomes if each.error]
        return cls(
            system=system,
            request_set=chosen.name,
            cached=round(share.cached, 2),
            ideal=round(share.ideal, 2),
            pulled=0.0,
            num_requests=len(outcomes),
            num_failed=len(errors),
            prompt_tokens=sum(each.prompt_tokens for each in outcomes),
            mean_s=round(sum(each.ended - each.began for each in outcomes) / len(outcomes), 4),
            wall_s=round(wall_s, 1),
            first_error=errors[0] if errors else "",
        )


def request_sets(
    num_requests: int, trace: Path | None, num_trace_requests: int, seed: int
) -> list[RequestSet]:
    talks = list(islice(conversations(ConversationMix(), seed), num_requests))
    sets = [RequestSet.of("conversations", talks)]
    if trace is not None:
        rows = islice(scaled_trace(trace, TRACE_SCALE, seed), num_trace_requests)
        sets.append(RequestSet.of("trace", list(rows)))
    return sets


async def run_set(
    system: str, urls: Sequence[str], model: str, chosen: RequestSet, seed: int
) -> SetResult:
    flow = RequestFlow(
        urls,
        model,
        chosen.requests,
        num_clients=NUM_CLIENTS,
        max_tokens=MAX_TOKENS,
        seed=seed,
        ideal=InfiniteCache(chosen.capacity.block_size),
    )
    began = time.monotonic()
    await flow.run()
    return SetResult.of(system, chosen, flow.outcomes, time.monotonic() - began)


async def on_forebay(
    chosen: RequestSet, seed: int, num_gateways: int, settings: Mapping[str, str], system: str
) -> SetResult:
    """On a platform of its own, whose caches are empty."""
    engine = {"sim_time_scale": str(TIME_SCALE)}
    async with bare_platform(
        chosen.capacity, num_gateways=num_gateways, engine=engine, gateway=settings
    ) as platform:
        result = await run_set(system, platform.urls, MODEL, chosen, seed)
        num_pulled = sum(page.get(PULLED, 0.0) for page in await scrape(platform.workers))
        return replace(result, pulled=round(100.0 * num_pulled / result.prompt_tokens, 2))


async def on_dynamo(
    chosen: RequestSet,
    seed: int,
    python: Path,
    router_mode: str,
    settings: Mapping[str, str],
    system: str,
) -> SetResult:
    speedup = 1.0 / TIME_SCALE
    async with dynamo(
        python, chosen.capacity, router_mode=router_mode, speedup=speedup, settings=settings
    ) as url:
        return await run_set(system, [url], DYNAMO_MODEL, chosen, seed)
