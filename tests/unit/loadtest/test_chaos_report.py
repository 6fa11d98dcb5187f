from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace

import pytest

from forebay_loadtest.chaos_report import (
    Outcome,
    as_json,
    blame,
    figures,
    gaps,
    quantile,
    rows,
    shortfalls,
    successors,
)
from forebay_loadtest.chat_stream import Answer, ChatStream, Ending
from forebay_loadtest.fault_plan import Act, FaultKind, Target
from forebay_loadtest.fault_records import FaultRecord

RIGHT = Answer("right", "stop", 3, 2)
WRONG = Answer("wrong", "stop", 3, 2)
DECODE_KILL = FaultKind(Target.DECODE, Act.KILL)
GATEWAY_KILL = FaultKind(Target.GATEWAY, Act.KILL)


def stream(
    began: float,
    ended: float,
    chunks: Sequence[float] = (),
    *,
    client: int = 0,
    ending: Ending = Ending.COMPLETE,
    answer: Answer = RIGHT,
) -> ChatStream:
    made = ChatStream(client, 0, began, ended, ending, "", list(chunks))
    if ending is Ending.COMPLETE:
        made.answer = answer
    return made


def fault(kind: FaultKind, at: float, back_s: float | None = 2.0) -> FaultRecord:
    return FaultRecord(kind, at, victim="it", evidence="gone", back_s=back_s)


def outcome(faults: list[FaultRecord], streams: list[ChatStream]) -> Outcome:
    return Outcome(
        engine="sim",
        wanted=len(faults),
        faults=faults,
        streams=streams,
        references=[RIGHT],
        leaked_blocks=0,
        num_busy=0,
        accounting_errors=[],
        quiet_at=5.0,
        rss_before={"gateway": [1 << 20]},
        rss_after={"gateway": [2 << 20]},
        seconds=9.0,
        problem="",
    )


@pytest.mark.parametrize(("share", "expected"), [(0.5, 2.0), (0.99, 4.0), (0.0, 1.0)])
def test_quantiles_are_values_that_occurred(share: float, expected: float) -> None:
    assert quantile([4.0, 1.0, 3.0, 2.0], share) == expected


def test_the_quantile_of_nothing() -> None:
    assert math.isnan(quantile([], 0.5))


def test_the_gap_is_the_longest_silence_from_the_fault_on() -> None:
    silent_before = stream(0, 30, [1.0, 9.0, 9.5, 14.0, 15.0])
    assert gaps(10.0, 100.0, [silent_before], {}) == [4.5]


def test_silences_after_the_next_fault_are_that_ones() -> None:
    later = stream(0, 30, [9.0, 11.0, 13.0, 29.0])
    assert gaps(10.0, 12.0, [later], {}) == [2.0]


def test_streams_that_did_not_send_yet_have_no_gap() -> None:
    assert gaps(10.0, 100.0, [stream(5, 30, [12.0, 20.0]), stream(11, 30, [12.0])], {}) == []


def test_a_lost_stream_is_silent_until_its_client_hears_again() -> None:
    streams = [
        stream(0, 10.1, [1.0, 9.0], client=1, ending=Ending.CUT),
        stream(0, 30, [1.0, 9.0, 11.0], client=2),
        stream(10.2, 10.3, client=1, ending=Ending.REFUSED),
        stream(12, 20, [13.0], client=1),
    ]
    assert successors(streams) == {0: 13.0, 2: 13.0}
    assert gaps(10.0, 100.0, streams, successors(streams)) == [4.0, 2.0]


def test_the_time_before_the_first_fault_has_a_row() -> None:
    streams = [stream(0, 15, [4.0, 7.0, 9.0, 20.0])]
    quiet, _ = rows(outcome([fault(DECODE_KILL, 9.5)], streams))
    assert (quiet.hit, quiet.gap_p50_s) == (1, 11.0)


def test_blame_goes_to_the_last_fault_before_the_end() -> None:
    first, second = fault(DECODE_KILL, 10.0), fault(DECODE_KILL, 20.0)
    lost = stream(5, 15, ending=Ending.FAILED)
    assert blame(lost, [first, second]) is first
    assert blame(stream(5, 25, ending=Ending.FAILED), [first, second]) is second
    assert blame(stream(1, 2, ending=Ending.FAILED), [first, second]) is None


def test_a_lost_connection_is_the_gateways_while_it_is_away() -> None:
    gateway, worker = fault(GATEWAY_KILL, 10.0, back_s=5.0), fault(DECODE_KILL, 11.0)
    both = [gateway, worker]
    assert blame(stream(5, 12, ending=Ending.CUT), both) is gateway
    assert blame(stream(14, 15, ending=Ending.REFUSED), both) is gateway
    assert blame(stream(5, 12, ending=Ending.FAILED), both) is worker
    assert blame(stream(17, 18, ending=Ending.CUT), both) is worker


def test_a_row_for_each_kind() -> None:
    faults = [fault(DECODE_KILL, 10.0), fault(GATEWAY_KILL, 20.0, back_s=4.0)]
    streams = [
        stream(5, 15, [9.0, 12.0]),
        stream(5, 15, [9.0, 10.5], answer=WRONG),
        stream(5, 15, [9.0], ending=Ending.FAILED),
        stream(16, 20.5, [18.0], ending=Ending.CUT),
        stream(21, 21.5, ending=Ending.REFUSED),
    ]
    quiet, decode, gateway = rows(outcome(faults, streams))
    assert (quiet.kind, quiet.count) == ("none", 0)
    assert (decode.kind, decode.count, decode.verified) == ("decode kill", 1, 1)
    assert (decode.hit, decode.lost, decode.identical, decode.compared) == (3, 1, 1, 2)
    assert (decode.gap_p50_s, decode.gap_p99_s, decode.back_p50_s) == (3.0, 9.0, 2.0)
    assert (gateway.hit, gateway.lost, gateway.gateway_lost, gateway.gateway_refused) == (
        1,
        0,
        1,
        1,
    )
    assert math.isnan(gateway.gap_p50_s)


def test_nothing_falls_short() -> None:
    good = outcome([fault(DECODE_KILL, 10.0)], [stream(5, 15, [9.0, 12.0])])
    assert shortfalls(good) == []
    assert "1 of 1 faults verified" in figures(good)
    assert "1 identical, 0 lost" in figures(good)


def test_a_gateways_own_streams_do_not_count() -> None:
    streams = [stream(5, 10.5, [9.0], ending=Ending.CUT)]
    assert shortfalls(outcome([fault(GATEWAY_KILL, 10.0)], streams)) == []


def test_a_gateway_that_drains_finishes_what_it_has() -> None:
    drain = fault(FaultKind(Target.GATEWAY, Act.DRAIN), 10.0)
    refused = stream(10.5, 10.6, ending=Ending.REFUSED)
    assert shortfalls(outcome([drain], [refused])) == []
    begun = stream(9.0, 11.0, [9.5], ending=Ending.CUT)
    assert shortfalls(outcome([drain], [begun])) == ["sim: 1 streams were lost"]


def test_a_loss_of_a_later_fault_is_not_this_ones_gap() -> None:
    streams = [stream(0, 20, [9.0, 11.0, 12.0], ending=Ending.CUT), stream(22, 30, [25.0])]
    assert gaps(10.0, 19.0, streams, successors(streams)) == [2.0]
    assert gaps(10.0, 21.0, streams, successors(streams)) == [13.0]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"wanted": 3}, "2 faults were not injected"),
        ({"faults": [FaultRecord(DECODE_KILL, 10.0, back_s=1.0)]}, "1 faults were not verified"),
        ({"faults": [fault(DECODE_KILL, 10.0, None)]}, "1 faults left less capacity behind"),
        ({"streams": [stream(5, 12, ending=Ending.REFUSED)]}, "1 streams were lost"),
        ({"streams": [stream(1, 2, ending=Ending.FAILED)]}, "1 streams were lost"),
        ({"streams": [stream(5, 12, answer=WRONG)]}, "1 answers differ"),
        ({"leaked_blocks": 4}, "4 blocks leaked"),
        ({"num_busy": 2}, "2 requests were left"),
        ({"accounting_errors": ["it"]}, "1 block counts did not add up"),
        ({"problem": "not idle"}, "not idle"),
    ],
)
def test_what_falls_short_is_named(changes: dict[str, object], text: str) -> None:
    good = outcome([fault(DECODE_KILL, 10.0)], [])
    bad = replace(good, **changes)  # type: ignore[arg-type]
    (found,) = shortfalls(bad)
    assert found.startswith("sim: ")
    assert text in found


def test_the_json_has_every_loss_and_no_nan() -> None:
    streams = [stream(5, 12, ending=Ending.FAILED), stream(5, 15, [9.0], answer=WRONG)]
    data = json.loads(json.dumps(as_json(outcome([fault(DECODE_KILL, 10.0)], streams))))
    assert data["kinds"][0]["back_p50_s"] is None
    assert data["lost"][0]["fault"] == "decode kill"
    assert data["different"][0]["got"]["text"] == "wrong"
    assert data["rss_mib_after"] == {"gateway": [2]}
    assert data["faults"][0]["evidence"] == "gone"
