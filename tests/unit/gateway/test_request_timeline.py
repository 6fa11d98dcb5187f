"""Where a request's time goes, in virtual time: 500 ms to prepare it, then what the script says."""

from __future__ import annotations

import asyncio
import json

import pytest
from test_gateway_request import ANSWER, in_virtual_time, lose
from timelines import PlacedWorld, Reader, Step, decision

from forebay.core.errors import DeadlineExceeded, Overloaded
from forebay.gateway.explanation import record, timeline_line
from forebay.gateway.timeline import LegEnd, LegTimeline, RequestTimeline

NUM_TOKENS = len(ANSWER)


@in_virtual_time
async def test_prefill_transfer_and_decode() -> None:
    world = PlacedWorld(Step(wait_s=0.1))
    reader = Reader(world.request())
    leg = await world.next_leg()
    await world.send_after(0.2, leg, 1)
    await world.send_after(0.05, leg, 1)
    await world.send_after(0.4, leg, NUM_TOKENS)
    await reader.done()
    assert reader.phases() == [
        ("prepare", None, 0, 500),
        ("queue", 0, 500, 99),
        ("route", 0, 599, 21),
        ("prefill", 0, 620, 200),
        ("transfer", 0, 820, 50),
        ("decode", 0, 870, 400),
    ]
    shown = record(reader.timeline)
    assert (shown["outcome"], shown["ttft_ms"], shown["duration_ms"]) == ("completed", 820, 1270)
    attempt = shown["legs"][0]["attempts"][0]  # type: ignore[index]
    marks = ("routed_ms", "reserved_ms", "accepted_ms", "decision_us")
    assert [attempt[mark] for mark in marks] == [600, 610, 620, 1000]
    workers = [phase["worker"] for phase in shown["phases"]]  # type: ignore[attr-defined]
    assert workers == [None, None, None, "prefill", "decode", "decode"]


@in_virtual_time
async def test_one_worker_that_does_both_has_no_transfer() -> None:
    world = PlacedWorld(Step(local=True))
    reader = Reader(world.request())
    leg = await world.next_leg()
    await world.send_after(0.2, leg, NUM_TOKENS)
    await reader.done()
    assert [phase[0] for phase in reader.phases()] == [
        *("prepare", "queue", "route", "prefill", "decode")
    ]


@in_virtual_time
async def test_a_first_token_that_is_the_last_waits_for_no_transfer() -> None:
    world = PlacedWorld()
    reader = Reader(world.request(stop=("a",)))
    leg = await world.next_leg()
    await world.send_after(0.2, leg, 1)
    await reader.done()
    assert reader.phases()[-1] == ("prefill", 0, 520, 200)
    assert reader.timeline.outcome == "completed"


@in_virtual_time
async def test_queued_long_for_a_worker_without_room() -> None:
    world = PlacedWorld(*[Step(wait_s=0.25, has_room=False)] * 100, Step(wait_s=0.25))
    reader = Reader(world.request())
    leg = await world.next_leg()
    world.send(leg, NUM_TOKENS)
    await reader.done()
    assert reader.phases()[1] == ("queue", 0, 500, 101 * 250 - 1)
    timeline = leg.timeline
    assert timeline.num_attempts == 101
    waited, taken = timeline.attempts
    assert (waited.num_looks, taken.num_looks) == (100, 1)
    assert waited.routed_at - waited.first_at == pytest.approx(99 * 0.25)
    assert not waited.decision.scores and taken.decision.scores


@in_virtual_time
async def test_refusals_count_as_queueing_until_one_takes_it() -> None:
    steps = [Step(refused_by="decode"), Step(wait_s=0.3, refused_by="prefill"), Step(wait_s=0.3)]
    world = PlacedWorld(*steps)
    reader = Reader(world.request())
    leg = await world.next_leg()
    world.send(leg, NUM_TOKENS)
    await reader.done()
    assert reader.phases()[1:3] == [("queue", 0, 500, 619), ("route", 0, 1119, 21)]
    attempts = record(reader.timeline)["legs"][0]["attempts"]  # type: ignore[index]
    assert [attempt["refused_by"] for attempt in attempts] == ["decode", "prefill", None]
    assert [bool(attempt["scores"]) for attempt in attempts] == [False, False, True]
    assert [attempt["refused_ms"] for attempt in attempts] == [510, 820, None]


@pytest.mark.parametrize("num_tries", [1, 8, 9, 500])
@in_virtual_time
async def test_of_many_tries_the_first_and_the_last_are_kept(num_tries: int) -> None:
    world = PlacedWorld(*[Step(refused_by="decode")] * (num_tries - 1))
    reader = Reader(world.request())
    leg = await world.next_leg()
    await reader.leave()
    timeline = leg.timeline
    assert timeline.num_attempts == num_tries
    assert len(timeline.attempts) == min(num_tries, 8)
    assert timeline.attempts[0].routed_at == pytest.approx(timeline.began_at)
    assert timeline.attempts[-1].accepted_at is not None


@in_virtual_time
async def test_a_stream_that_moves_in_the_middle() -> None:
    world = PlacedWorld()
    reader = Reader(world.request())
    first = await world.next_leg()
    await world.send_after(0.1, first, 1)
    await world.send_after(0.1, first, 9)
    await asyncio.sleep(0.1)
    lose(first, world.decode)
    second = await world.next_leg()
    await world.send_after(0.1, second, 1)
    await world.send_after(0.1, second, NUM_TOKENS)
    await reader.done()
    assert reader.phases()[5:] == [
        ("decode", 0, 720, 100),
        ("queue", 1, 820, 0),
        ("route", 1, 820, 20),
        ("prefill", 1, 840, 100),
        ("transfer", 1, 940, 100),
        ("decode", 1, 1040, 0),
    ]
    legs = record(reader.timeline)["legs"]
    assert [leg["end"] for leg in legs] == ["lost", "finished"]  # type: ignore[attr-defined]
    lost, other = legs  # type: ignore[misc]
    assert (lost["lost_worker"], other["lost_worker"]) == ("decode", None)
    assert (other["continues"], other["num_tokens_before"]) == (0, 10)
    assert record(reader.timeline)["ttft_ms"] == 620


@in_virtual_time
async def test_a_worker_that_hands_its_stream_back() -> None:
    world = PlacedWorld()
    reader = Reader(world.request())
    first = await world.next_leg()
    world.send(first, 4)
    world.fail(first, resumable=True)
    second = await world.next_leg()
    world.send(second, NUM_TOKENS)
    await reader.done()
    assert [leg.end for leg in reader.timeline.legs] == [LegEnd.RETURNED, LegEnd.FINISHED]
    assert reader.timeline.legs[0].lost_worker is None


@in_virtual_time
async def test_choices_go_their_own_ways() -> None:
    world = PlacedWorld()
    reader = Reader(world.request(n=3))
    first = await world.next_leg()
    world.send(first, 5, choice=0)
    await world.send_after(0.1, first, NUM_TOKENS, choice=1)
    lose(first, world.decode)
    fresh, begun = await world.next_leg(), await world.next_leg()
    await world.send_after(0.1, begun, NUM_TOKENS, choice=0)
    await world.send_after(0.1, fresh, NUM_TOKENS, choice=2)
    await reader.done()
    assert [(leg.choices, leg.continues) for leg in reader.timeline.legs] == [
        *(((0, 1, 2), None), ((2,), 0), ((0,), 0))
    ]
    choices = record(reader.timeline)["choices"]
    times = [(c["first_token_ms"], c["ended_ms"]) for c in choices]  # type: ignore[attr-defined]
    assert times == [(520, 740), (620, 620), (840, 840)]
    assert all(choice.num_tokens == NUM_TOKENS for choice in reader.timeline.choices)
    decodes = [span for span in reader.phases() if span[0] == "decode"]
    assert [leg for _, leg, _, _ in decodes] == [0, 1, 2]


@pytest.mark.parametrize(
    ("after_s", "last_phase"),
    [(0.05, "queue"), (0.105, "route"), (0.2, "prefill"), (0.35, "transfer"), (0.45, "decode")],
)
@in_virtual_time
async def test_client_that_leaves(after_s: float, last_phase: str) -> None:
    world = PlacedWorld(Step(wait_s=0.1))
    reader = Reader(world.request())

    async def answer() -> None:
        leg = await world.next_leg()
        await world.send_after(0.18, leg, 1)
        await world.send_after(0.1, leg, 3)

    answering = asyncio.create_task(answer())
    await asyncio.sleep(after_s)
    under_way = record(reader.timeline)
    assert under_way["outcome"] == "running"
    await reader.leave()
    answering.cancel()
    name, _, began, took = reader.phases()[-1]
    assert name == last_phase == under_way["phases"][-1]["name"]  # type: ignore[index]
    assert began + took == pytest.approx(500 + after_s * 1000)
    assert reader.timeline.outcome == "cancelled"
    assert reader.timeline.legs[0].end is LegEnd.LEFT
    assert reader.explanations.find("client").ended_at is not None


@in_virtual_time
async def test_no_place_in_time() -> None:
    world = PlacedWorld(Step(wait_s=5.0, error=Overloaded("no place came free in time")))
    reader = Reader(world.request())
    await reader.done()
    assert isinstance(reader.error, Overloaded)
    assert reader.phases() == [("prepare", None, 0, 500), ("queue", 0, 500, 5000)]
    assert reader.timeline.outcome == "resource_exhausted"


@in_virtual_time
async def test_the_deadline_strikes_while_it_is_decoded() -> None:
    world = PlacedWorld()
    reader = Reader(world.request())
    leg = await world.next_leg()
    world.send(leg, 3)
    await reader.done()
    assert isinstance(reader.error, DeadlineExceeded)
    assert reader.timeline.outcome == "deadline_exceeded"
    assert reader.phases()[-1][0] == "decode"
    assert record(reader.timeline)["duration_ms"] == 60_500


@in_virtual_time
async def test_an_error_ends_it() -> None:
    world = PlacedWorld()
    reader = Reader(world.request())
    leg = await world.next_leg()
    world.send(leg, 3)
    world.fail(leg, resumable=False)
    await reader.done()
    assert reader.timeline.outcome == "unavailable"
    assert reader.timeline.choices[0].finish_reason is None


@in_virtual_time
async def test_many_legs_are_bounded() -> None:
    timeline = RequestTimeline("client", "req", "m", 3, 1)
    for number in range(100):
        timeline.new_leg((0,), continues=number - 1).broke(LegEnd.LOST, "decode")
    assert timeline.num_legs == 100
    assert [leg.number for leg in timeline.legs] == [*range(16), *range(84, 100)]
    line = timeline_line(timeline)
    assert line["num_phases"] == 33
    assert len(json.dumps(line)) < 4096


@in_virtual_time
async def test_the_first_end_counts() -> None:
    leg = LegTimeline(0, (0,), None, 0)
    leg.broke(LegEnd.LOST, "decode")
    leg.left(finished=True)
    assert leg.end is LegEnd.LOST
    timeline = RequestTimeline("client", "req", "m", 3, 1)
    timeline.ended("completed")
    timeline.ended("cancelled")
    assert timeline.outcome == "completed"


@in_virtual_time
async def test_a_worker_that_was_not_asked_cannot_answer() -> None:
    leg = LegTimeline(0, (0,), None, 0)
    leg.routed(decision(), 0.0)
    with pytest.raises(AssertionError):
        leg.accepted("somebody")
