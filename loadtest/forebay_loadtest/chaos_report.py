"""What faults did to streams, by kind. Pure: streams and faults in, figures out."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise

from forebay_loadtest.chat_stream import Answer, ChatStream, Ending
from forebay_loadtest.fault_plan import Act
from forebay_loadtest.fault_records import FaultRecord
from forebay_loadtest.footprint import Sizes, mib

_EDGE_LOSSES = (Ending.REFUSED, Ending.CUT)
_BAD = (Ending.REFUSED, Ending.CUT, Ending.FAILED, Ending.LEFT)


@dataclass(frozen=True, slots=True)
class Row:
    """`hit`: streams that ran when a fault of this kind struck; `identical` of `compared`: complete
    ones whose answer is that of the undisturbed run. `lost`: streams that a fault of this kind
    cost, requests that were refused among them; but those that went with their own gateway are in
    `gateway_lost`, and those that it refused, while it was away or drained, in `gateway_refused`.
    Seconds; NaN where there is nothing to measure."""

    kind: str
    count: int
    verified: int
    hit: int
    lost: int
    gateway_lost: int
    gateway_refused: int
    identical: int
    compared: int
    gap_p50_s: float
    gap_p99_s: float
    back_p50_s: float
    back_p99_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Of one engine's run. `wanted`: faults. At its end, idle: `leaked_blocks`, held by workers;
    `num_busy`, requests in the gateway's count. `quiet_at`: a moment before the first fault."""

    engine: str
    wanted: int
    faults: Sequence[FaultRecord]
    streams: Sequence[ChatStream]
    references: Sequence[Answer]
    leaked_blocks: int
    num_busy: int
    accounting_errors: Sequence[str]
    quiet_at: float
    rss_before: Sizes
    rss_after: Sizes
    seconds: float
    problem: str


def quantile(values: Sequence[float], share: float) -> float:
    """Nearest rank; NaN of nothing."""
    if not values:
        return math.nan
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def blame(stream: ChatStream, faults: Sequence[FaultRecord]) -> FaultRecord | None:
    """The fault that cost the stream: a gateway's while it lasted, where the connection was lost or
    the request refused; else the last one before the end. `faults` in the order of their times."""
    earlier = [fault for fault in faults if fault.at <= stream.ended]
    for fault in reversed(earlier):
        over = math.inf if fault.back_s is None else fault.at + fault.back_s
        overlaps = stream.began <= over and stream.ended <= over + 1.0
        if fault.kind.may_lose and overlaps and stream.ending in _EDGE_LOSSES:
            return fault
    return earlier[-1] if earlier else None


def excused(stream: ChatStream, fault: FaultRecord | None) -> bool:
    """Whether the loss is that of a gateway that was lost, or of a request that came while one was
    away. A gateway that drains finishes what it has begun."""
    if fault is None or not fault.kind.may_lose:
        return False
    return fault.kind.act is not Act.DRAIN or stream.began >= fault.at


def gaps(
    at: float, until: float, streams: Sequence[ChatStream], successors: Mapping[int, float]
) -> list[float]:
    """The longest silence of each stream that was sending at `at`, when a fault struck, of those
    that ended after it and began before `until`. A lost stream's silence ends with the first chunk
    of its client's next one: `successors`, by the stream's place in `streams`."""
    found = []
    for index, stream in enumerate(streams):
        if not stream.running_at(at) or not any(time <= at for time in stream.chunk_times[:1]):
            continue
        times = stream.chunk_times[bisect_right(stream.chunk_times, at) - 1 :]
        silences = [b - a for a, b in pairwise(times) if a < until]
        if stream.ending in _BAD and stream.ended < until and index in successors:
            silences.append(successors[index] - times[-1])
        if silences:
            found.append(max(silences))
    return found


def successors(streams: Sequence[ChatStream]) -> dict[int, float]:
    """For each stream: the moment of the first chunk of its client's next stream that has one."""
    following: dict[int, float] = {}
    found: dict[int, float] = {}
    for index in range(len(streams) - 1, -1, -1):
        stream = streams[index]
        if stream.client in following:
            found[index] = following[stream.client]
        if stream.chunk_times:
            following[stream.client] = stream.chunk_times[0]
    return found


def rows(outcome: Outcome) -> list[Row]:
    """One for the time before the first fault, then one for each kind in the order of names."""
    faults = sorted(outcome.faults, key=lambda fault: fault.at)
    next_chunks = successors(outcome.streams)
    lost = [stream for stream in outcome.streams if stream.ending in _BAD]
    blamed = [(stream, blame(stream, faults)) for stream in lost]
    ends = [fault.at for fault in faults[1:]] + [math.inf]
    quiet = gaps(outcome.quiet_at, faults[0].at if faults else math.inf, outcome.streams, {})
    made = [_quiet_row(quiet)]
    for name in sorted({fault.kind.name for fault in faults}):
        own = [(fault, end) for fault, end in zip(faults, ends, strict=True)]
        own = [(fault, end) for fault, end in own if fault.kind.name == name]
        hit = [s for s in outcome.streams if any(s.running_at(f.at) for f, _ in own)]
        complete = [stream for stream in hit if stream.answer is not None]
        cost = [(s, fault) for s, fault in blamed if fault is not None and fault.kind.name == name]
        gone = [stream.ending for stream, fault in cost if excused(stream, fault)]
        refused = gone.count(Ending.REFUSED)
        silences = [
            gap for fault, end in own for gap in gaps(fault.at, end, outcome.streams, next_chunks)
        ]
        back = [fault.back_s for fault, _ in own if fault.back_s is not None]
        made.append(
            Row(
                kind=name,
                count=len(own),
                verified=sum(fault.verified for fault, _ in own),
                hit=len(hit),
                lost=len(cost) - len(gone),
                gateway_lost=len(gone) - refused,
                gateway_refused=refused,
                identical=sum(s.answer == outcome.references[s.spec] for s in complete),
                compared=len(complete),
                gap_p50_s=quantile(silences, 0.5),
                gap_p99_s=quantile(silences, 0.99),
                back_p50_s=quantile(back, 0.5),
                back_p99_s=quantile(back, 0.99),
            )
        )
    return made


def _quiet_row(silences: Sequence[float]) -> Row:
    return Row(
        kind="none",
        count=0,
        verified=0,
        hit=len(silences),
        lost=0,
        gateway_lost=0,
        gateway_refused=0,
        identical=0,
        compared=0,
        gap_p50_s=quantile(silences, 0.5),
        gap_p99_s=quantile(silences, 0.99),
        back_p50_s=math.nan,
        back_p99_s=math.nan,
    )


def shortfalls(outcome: Outcome) -> list[str]:
    """What falls short of the promise; empty when nothing does."""
    found = [outcome.problem] if outcome.problem else []
    faults = outcome.faults
    table = rows(outcome)
    unblamed = [
        s for s in outcome.streams if s.ending in _BAD and blame(s, _sorted(faults)) is None
    ]
    num_lost = sum(row.lost for row in table) + len(unblamed)
    complete = [stream for stream in outcome.streams if stream.answer is not None]
    different = [s for s in complete if s.answer != outcome.references[s.spec]]
    unhealed = sum(fault.back_s is None for fault in faults)
    for number, text in (
        (outcome.wanted - len(faults), "faults were not injected"),
        (sum(not fault.verified for fault in faults), "faults were not verified"),
        (num_lost, "streams were lost"),
        (len(different), "answers differ"),
        (unhealed, "faults left less capacity behind"),
        (outcome.leaked_blocks, "blocks leaked"),
        (outcome.num_busy, "requests were left in the gateway's count"),
        (len(outcome.accounting_errors), "block counts did not add up"),
    ):
        if number > 0:
            found.append(f"{number:g} {text}")
    return [f"{outcome.engine}: {text}" for text in found]


def figures(outcome: Outcome) -> str:
    """One clause of the last line."""
    table = rows(outcome)
    complete = [stream for stream in outcome.streams if stream.answer is not None]
    same = sum(stream.answer == outcome.references[stream.spec] for stream in complete)
    own = sum(row.gateway_lost for row in table)
    verified = sum(fault.verified for fault in outcome.faults)
    return (
        f"{outcome.engine}: {verified} of {len(outcome.faults)} faults verified in"
        f" {outcome.seconds:.0f} s, {len(complete)} streams complete, {same} identical,"
        f" {sum(row.lost for row in table)} lost and {own} with their gateway,"
        f" {outcome.leaked_blocks} blocks leaked"
    )


def as_json(outcome: Outcome) -> dict[str, object]:
    began = min((fault.at for fault in outcome.faults), default=0.0)
    return {
        "engine": outcome.engine,
        "seconds": round(outcome.seconds, 1),
        "kinds": [_finite(asdict(row)) for row in rows(outcome)],
        "shortfalls": shortfalls(outcome),
        "leaked_blocks": outcome.leaked_blocks,
        "rss_mib_before": mib(outcome.rss_before),
        "rss_mib_after": mib(outcome.rss_after),
        "lost": [
            {
                "began_s": round(stream.began - began, 2),
                "ended_s": round(stream.ended - began, 2),
                "num_chunks": len(stream.chunk_times),
                "ending": stream.ending,
                "error": stream.error,
                "fault": fault.kind.name if fault is not None else None,
            }
            for stream in outcome.streams
            if stream.ending in _BAD and stream.ending is not Ending.REFUSED
            for fault in [blame(stream, _sorted(outcome.faults))]
        ],
        "different": [
            {
                "began_s": round(stream.began - began, 2),
                "ended_s": round(stream.ended - began, 2),
                "spec": stream.spec,
                "expected": asdict(outcome.references[stream.spec]),
                "got": asdict(stream.answer),
            }
            for stream in outcome.streams
            if stream.answer is not None and stream.answer != outcome.references[stream.spec]
        ],
        "faults": [
            {
                "kind": fault.kind.name,
                "at_s": round(fault.at - began, 2),
                "victim": fault.victim,
                "evidence": fault.evidence,
                "back_s": fault.back_s and round(fault.back_s, 2),
            }
            for fault in _sorted(outcome.faults)
        ],
    }


def _sorted(faults: Sequence[FaultRecord]) -> list[FaultRecord]:
    return sorted(faults, key=lambda fault: fault.at)


def _finite(values: Mapping[str, object]) -> dict[str, object]:
    """JSON has no NaN."""
    return {
        name: None if isinstance(value, float) and math.isnan(value) else value
        for name, value in values.items()
    }
