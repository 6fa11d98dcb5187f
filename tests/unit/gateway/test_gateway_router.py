"""The router around the policy: what it is told, what it expects, what waits."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from forebay.core.errors import ConfigurationError, Unavailable
from forebay.core.roles import WorkerRole
from forebay.core.settings import GatewaySettings
from forebay.gateway.router import LINES_S, PREDICTION_S, RECONSIDER_S, Router
from forebay.kv.block_hash import cache_root
from forebay.router.index import Tier
from forebay.router.view import Decision, RouteRequest, WorkerFacts, WorkerLoad
from forebay.simulator import loop
from forebay.simulator.kv_events import SimKvEventSource, SimKvStreams
from forebay.simulator.redis_client import LocalRedisClient
from forebay.simulator.registry import MemoryRegistry

BLOCK = 16
ROOT = cache_root(b"salt", "m")
TOKENS = list(range(BLOCK * 40 + 1))
FULL = WorkerLoad(prefill_room_tokens=0)


class LostRegistry(MemoryRegistry):
    lost = False

    async def list_lines(self) -> dict[str, dict[str, int]]:
        if self.lost:
            raise Unavailable("Redis: gone")
        return await super().list_lines()


def router(registry: MemoryRegistry | None = None, name: str = "g", **settings: object) -> Router:
    events = SimKvEventSource(LocalRedisClient(SimKvStreams().routes()))
    made = Router(
        replace(GatewaySettings(), **settings),  # type: ignore[arg-type]
        registry or MemoryRegistry(),
        events,
        name,
    )
    for worker_id in ("a", "b"):
        made.join(WorkerFacts(worker_id, WorkerRole.MIXED, "m", "kv", BLOCK))
        made.changed(worker_id, lambda: WorkerLoad())
    made.follow([("a", "1"), ("b", "1")])
    return made


def request(made: Router, request_id: str = "r", tokens: list[int] = TOKENS) -> RouteRequest:
    return RouteRequest(request_id, "m", len(tokens), made.hashes("m", ROOT, tokens))


def choose(made: Router, request_id: str = "r", **how: tuple[int, int]) -> Decision:
    decision = made.choose(request(made, request_id), **how)
    assert decision is not None
    return decision


def test_a_prompt_goes_where_it_went_before_until_that_is_too_long_ago() -> None:
    async def main() -> None:
        made = router()
        first = choose(made)
        made.expect(first, request(made).hashes)
        again = choose(made, "other")
        assert again.decode == first.decode
        assert again.matched == {first.decode: BLOCK * 40}
        assert again.num_compute_tokens == 1
        await asyncio.sleep(PREDICTION_S + 1)
        assert choose(made).matched == {}

    loop.run(main())


def test_events_count_only_while_they_are_fresh() -> None:
    async def main() -> None:
        made = router()
        slot = made.index.slot_of("b")
        assert slot is not None
        made.index.apply(slot, Tier.DEVICE, b"".join(request(made).hashes), b"")
        assert made.degraded
        assert choose(made).matched == {}
        following = asyncio.create_task(made.run())
        await asyncio.sleep(0.1)
        assert made.degraded, "nobody has published anything"
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)

    loop.run(main())


def test_a_worker_that_is_gone_leaves_the_view() -> None:
    async def main() -> None:
        made = router()
        made.follow([("b", "1")])
        assert made.view.worker_ids == ("b",)
        made.changed("a", lambda: WorkerLoad())
        made.join(WorkerFacts("b", WorkerRole.MIXED, "m", "other", BLOCK))
        assert made.view.worker_ids == ("b",)
        assert made.view.facts[0].kv_key == "other"

    loop.run(main())


def test_who_waits_for_a_worker_may_try_when_it_has_room_is_gone_or_after_a_while() -> None:
    async def main() -> None:
        made = router()
        made.changed("a", lambda: FULL)
        made.changed("b", lambda: FULL)
        decision = choose(made)
        assert not decision.has_room
        made.wait("key", (1, 1), decision, [])
        assert not made.may_try("key") and made.may_try("another")
        made.changed(decision.computes, lambda: WorkerLoad())
        assert made.may_try("key")
        made.changed(decision.computes, lambda: FULL)
        assert not made.may_try("key")
        made.changed(decision.computes, lambda: replace(FULL, accepting=False))
        assert made.may_try("key")
        made.changed(decision.computes, lambda: FULL)
        await asyncio.sleep(RECONSIDER_S)
        assert made.may_try("key")
        made.stop_waiting("key")
        assert len(made.waits) == 0

    loop.run(main())


def test_only_what_stands_before_a_request_is_queued_before_it() -> None:
    async def main() -> None:
        made = router()
        first = choose(made)
        made.wait("k1", (1, 1), first, [])
        behind = choose(made, order=(1, 2))
        assert behind.computes != first.computes
        assert choose(made, order=(1, 1)).computes == first.computes
        assert choose(made, order=(0, 9)).computes == first.computes

    loop.run(main())


def test_gateways_hear_of_each_others_lines() -> None:
    async def main() -> None:
        registry = LostRegistry()
        here, there = router(registry, "here"), router(registry, "there")
        tasks = [asyncio.create_task(made.run()) for made in (here, there)]
        taken = choose(here)
        here.wait("key", (1, 1), taken, [])
        await asyncio.sleep(3 * LINES_S)
        assert choose(there).computes != taken.computes
        assert choose(here, order=(1, 1)).computes == taken.computes
        registry.lost = True
        await asyncio.sleep(3 * LINES_S)
        assert choose(there).computes == taken.computes
        registry.lost = False
        await asyncio.sleep(3 * LINES_S)
        assert choose(there).computes != taken.computes
        here.stop_waiting("key")
        await asyncio.sleep(3 * LINES_S)
        assert choose(there).computes == taken.computes
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    loop.run(main())


def test_prompts_of_an_unknown_model_have_no_hashes_and_no_place() -> None:
    async def main() -> None:
        made = router()
        assert made.hashes("unknown", ROOT, TOKENS) == []
        assert made.choose(RouteRequest("r", "unknown", 10)) is None
        assert not made.can_serve("unknown") and made.can_serve("m")

    loop.run(main())


def test_a_policy_that_there_is_not_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="router_policy"):
        router(router_policy="best")
