from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from forebay.core.clock import Deadline
from forebay.core.errors import InvalidRequest, RequestCancelled
from forebay.core.sampling import SamplingParams
from forebay.engine.sequence import RequestKey, SequenceStart
from forebay.simulator import loop
from forebay.worker.request_table import ENDED_MEMORY_S, RequestTable
from forebay.worker.requests import WorkerRequest

LEASE_S = 10.0


def request(
    name: str, *, gateway: str = "g", attempt: int = 1, life_s: float = 100
) -> WorkerRequest:
    start = SequenceStart(
        key=RequestKey(gateway, name),
        attempt=attempt,
        tokens=(1, 2, 3),
        num_prompt_tokens=3,
        params=SamplingParams(n=2),
        choices=(0, 1),
        cache_root=bytes(16),
    )
    deadline = Deadline.after(life_s)
    return WorkerRequest(start, deadline, 0.0, deadline.within(LEASE_S), {0, 1})


def with_table(test: Callable[[RequestTable], Awaitable[None]]) -> Callable[[], None]:
    def run() -> None:
        async def main() -> None:
            table = RequestTable(LEASE_S)
            await test(table)
            table.check_integrity()

        loop.run(main())

    return run


@with_table
async def test_a_lease_lasts_from_the_last_renewal(table: RequestTable) -> None:
    kept, left = request("kept"), request("left")
    table.enter(kept)
    table.enter(left)
    await asyncio.sleep(6)
    table.renew("g", ["kept", "unknown"])
    await asyncio.sleep(3.9)
    assert table.expired() == []
    await asyncio.sleep(0.1)
    assert table.expired() == [left]
    table.remove(left.key)
    await asyncio.sleep(5.9)
    assert table.expired() == []
    await asyncio.sleep(0.1)
    assert table.expired() == [kept]


@with_table
async def test_the_deadline_bounds_the_lease(table: RequestTable) -> None:
    short = request("short", life_s=12)
    table.enter(short)
    await asyncio.sleep(9)
    table.renew("g", ["short"])
    assert short.lease.remaining_s() == 3


@with_table
async def test_gateways_renew_their_own(table: RequestTable) -> None:
    mine, theirs = request("a"), request("a", gateway="h")
    table.enter(mine)
    table.enter(theirs)
    await asyncio.sleep(5)
    table.renew("h", ["a"])
    await asyncio.sleep(5)
    assert table.expired() == [mine]
    assert table.of_gateways(["h"]) == [theirs]


@with_table
async def test_a_newer_attempt_takes_the_place_of_an_older_one(table: RequestTable) -> None:
    first, second = request("a"), request("a", attempt=2)
    table.enter(first)
    table.check_attempt(request("a"))
    table.check_attempt(second)
    table.enter(second)
    assert second in table
    assert first not in table
    assert (len(table), table.num_accepted, table.num_sequences) == (1, 2, 2)
    with pytest.raises(InvalidRequest, match="attempt 1 is over") as caught:
        table.check_attempt(first)
    assert caught.value.param == "attempt"


@with_table
async def test_aborts_are_remembered_for_a_while(table: RequestTable) -> None:
    table.remember_end(RequestKey("g", "a"), 2)
    table.remember_end(RequestKey("g", "a"), 1)
    for attempt in (1, 2):
        with pytest.raises(RequestCancelled):
            table.check_attempt(request("a", attempt=attempt))
    table.check_attempt(request("a", attempt=3))
    table.check_attempt(request("a", gateway="h"))
    await asyncio.sleep(ENDED_MEMORY_S - 1)
    table.forget_ended()
    with pytest.raises(RequestCancelled):
        table.check_attempt(request("a"))
    await asyncio.sleep(1)
    table.forget_ended()
    table.check_attempt(request("a"))
