from __future__ import annotations

import gc
import tracemalloc

import pytest
from test_gateway_request import in_virtual_time
from timelines import decision

from forebay.core.errors import NotFound
from forebay.gateway.explanations import Explanations, num_bytes
from forebay.gateway.timeline import LegEnd, RequestTimeline


def timeline(request_id: str, internal_id: str = "") -> RequestTimeline:
    return RequestTimeline(request_id, internal_id or f"internal-{request_id}", "m", 100, 1)


def ended(store: Explanations, *requests: RequestTimeline) -> None:
    for request in requests:
        store.begin(request)
        request.ended("completed")
        store.end(request)


@in_virtual_time
async def test_found_by_every_id_it_has() -> None:
    store = Explanations(10)
    request = timeline("req-1", "req-9")
    store.begin(request)
    for request_id in ("req-1", "req-9", "chatcmpl-req-1", "cmpl-req-1"):
        assert store.find(request_id) is request


@pytest.mark.parametrize("request_id", ["", "req", "req-1x", "chatcmpl-", "internal"])
@in_virtual_time
async def test_only_by_the_exact_id(request_id: str) -> None:
    store = Explanations(10)
    ended(store, timeline("req-1"))
    with pytest.raises(NotFound, match="the last 10 that it served") as caught:
        store.find(request_id)
    assert caught.value.code == "request_not_found"


@in_virtual_time
async def test_a_request_with_several_prompts_says_how_to_ask() -> None:
    store = Explanations(10)
    ended(store, timeline("req-1-0"), timeline("req-1-1"))
    with pytest.raises(NotFound, match="several prompts"):
        store.find("cmpl-req-1")
    assert store.find("req-1-1")


@in_virtual_time
async def test_the_last_ones_are_kept_and_all_that_run() -> None:
    store = Explanations(3)
    running = timeline("running")
    store.begin(running)
    ended(store, *(timeline(f"r{i}") for i in range(10)))
    assert len(store) == 4
    assert [f"r{i}" for i in range(10) if _knows(store, f"r{i}")] == ["r7", "r8", "r9"]
    assert store.find("running") is running
    ended(store, running)
    assert _knows(store, "running") and not _knows(store, "r7")


@in_virtual_time
async def test_none_are_kept_where_none_are_wanted() -> None:
    store = Explanations(0)
    ended(store, timeline("r"))
    assert (len(store), store.num_bytes) == (0, 0)


@in_virtual_time
async def test_of_two_with_one_name_the_later_is_found_and_outlives_the_earlier() -> None:
    store = Explanations(2)
    first, second = timeline("same", "one"), timeline("same", "two")
    ended(store, first, second)
    assert store.find("same") is second and store.find("one") is first
    ended(store, timeline("third"))
    assert store.find("same") is second
    assert not _knows(store, "one")


@in_virtual_time
async def test_a_client_cannot_take_the_name_that_the_gateway_gave_another() -> None:
    store = Explanations(10)
    victim, thief = timeline("theirs", "req-1"), timeline("req-1", "req-2")
    ended(store, victim, thief)
    assert store.find("req-1") is victim


@pytest.mark.parametrize(
    ("num_legs", "num_attempts", "num_workers", "num_choices"),
    [(0, 0, 0, 1), (1, 1, 4, 1), (1, 1, 1000, 1), (1, 8, 64, 16), (32, 8, 200, 16)],
)
@in_virtual_time
async def test_bytes_are_bounded_and_what_is_counted_is_not_less_than_what_is_taken(
    num_legs: int, num_attempts: int, num_workers: int, num_choices: int
) -> None:
    workers = [f"prefill-{i:024x}" for i in range(num_workers)]
    scores = dict.fromkeys(workers, 0.5)

    def grown(i: int) -> RequestTimeline:
        request = RequestTimeline(f"req-{i:024x}", f"int-{i:024x}", "m", 100, num_choices, "t" * 55)
        for _ in range(num_legs):
            leg = request.new_leg(range(num_choices))
            chosen = decision(workers[0], None, scores) if workers else decision(scores={})
            for _ in range(num_attempts):
                leg.routed(chosen, 1e-5 * i)
                leg.refused(chosen.decode)
            leg.placed(chosen.decode, None)
            leg.first_token()
            leg.decode_began()
            leg.broke(LegEnd.LOST, chosen.decode)
        for choice in range(num_choices):
            request.got_tokens(choice, 3 + 300 * i, "length")
        return request

    max_bytes = 10 * num_bytes(grown(1))
    store = Explanations(10**9, max_bytes)
    gc.collect()
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    for i in range(20):
        ended(store, grown(i))
    gc.collect()
    taken = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert len(store) == 10
    assert 0 < taken <= max_bytes
    assert store.num_bytes <= max_bytes
    assert taken > max_bytes / 8, "the count is far too careful"


def _knows(store: Explanations, request_id: str) -> bool:
    try:
        store.find(request_id)
    except NotFound:
        return False
    return True
