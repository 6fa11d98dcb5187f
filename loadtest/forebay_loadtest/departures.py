"""When and how clients go away: a plan, pure, and the times that it takes its marks from."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum


class Phase(StrEnum):
    """Where a request is when its client goes. Only what a client sees is certain: `queued`,
    `prefill` and `transfer` are aimed at by load and time."""

    BODY = "half a body"
    QUEUED = "queued"
    PREFILL = "prefill"
    TRANSFER = "transfer"
    FIRST = "first token"
    MIDDLE = "mid-decode"
    LAST = "last token"


class Way(StrEnum):
    CLOSE = "HTTP close"
    RESET = "HTTP reset"
    CANCEL = "gRPC cancel"
    DEADLINE = "gRPC deadline"


@dataclass(frozen=True, slots=True)
class Pace:
    """Of an undisturbed request: seconds to its first chunk and to its end, chunks with text."""

    first_s: float
    total_s: float
    num_chunks: int


@dataclass(frozen=True, slots=True)
class Departure:
    """The client goes `after_s` after the request was sent, or with chunk `after_chunks`, whichever
    is set."""

    phase: Phase
    way: Way
    after_s: float | None
    after_chunks: int | None


def plan_departures(count: int, pace: Pace, seed: int) -> list[Departure]:
    """Every phase in every way, in turn; the same for the same seed."""
    rng = random.Random(seed)
    pairs = [
        (phase, way)
        for phase in Phase
        for way in Way
        if phase is not Phase.BODY or way in (Way.CLOSE, Way.RESET)
    ]
    plan = [_departure(*pairs[index % len(pairs)], pace, rng) for index in range(count)]
    rng.shuffle(plan)
    return plan


def _departure(phase: Phase, way: Way, pace: Pace, rng: random.Random) -> Departure:
    decode_s = pace.total_s - pace.first_s
    moments = {
        Phase.BODY: 0.0,
        Phase.QUEUED: rng.uniform(0.0, 0.5) * pace.first_s,
        Phase.PREFILL: rng.uniform(0.2, 0.8) * pace.first_s,
        Phase.TRANSFER: rng.uniform(0.85, 1.05) * pace.first_s,
        Phase.FIRST: 1.05 * pace.first_s,
        Phase.MIDDLE: pace.first_s + rng.uniform(0.2, 0.8) * decode_s,
        Phase.LAST: pace.first_s + 0.98 * decode_s,
    }
    marks = {
        Phase.FIRST: 1,
        Phase.MIDDLE: max(2, rng.randrange(1, max(2, pace.num_chunks))),
        Phase.LAST: pace.num_chunks,
    }
    if phase in marks and way is not Way.DEADLINE:
        return Departure(phase, way, None, marks[phase])
    return Departure(phase, way, moments[phase], None)


@dataclass(frozen=True, slots=True)
class Seen:
    """What a client had when it was gone. `ended`: the request was over before it went."""

    departure: Departure
    num_chunks: int
    ended: bool
    error: str = ""


def tally(seen: Sequence[Seen]) -> list[tuple[str, int, int, int, int]]:
    """For each phase and way: clients, gone before the first chunk, gone after it, too late."""
    lines = []
    for phase in Phase:
        for way in Way:
            own = [s for s in seen if s.departure.phase is phase and s.departure.way is way]
            if own:
                late = sum(each.ended for each in own)
                early = sum(not each.num_chunks and not each.ended for each in own)
                lines.append((f"{phase}, {way}", len(own), early, len(own) - late - early, late))
    return lines
