from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from forebay_loadtest.departures import (
    Departure,
    Pace,
    Phase,
    Seen,
    Way,
    plan_departures,
    tally,
)
from forebay_loadtest.vanish import shortfalls
from forebay_loadtest.vanish_run import Round

PACE = Pace(first_s=1.0, total_s=5.0, num_chunks=40)
MIB = 1 << 20


@given(st.integers(0, 200), st.integers(0, 99))
def test_plans_are_as_long_as_asked_for_and_repeatable(count: int, seed: int) -> None:
    plan = plan_departures(count, PACE, seed)
    assert len(plan) == count
    assert plan == plan_departures(count, PACE, seed)


def test_every_phase_in_every_way_equally_often() -> None:
    counts = Counter((item.phase, item.way) for item in plan_departures(260, PACE, 0))
    assert len(counts) == 26
    assert set(counts.values()) == {10}
    assert (Phase.BODY, Way.CANCEL) not in counts


@given(st.integers(0, 99))
def test_moments_lie_in_their_phases(seed: int) -> None:
    for item in plan_departures(52, PACE, seed):
        assert (item.after_s is None) != (item.after_chunks is None)
        if item.phase in (Phase.QUEUED, Phase.PREFILL):
            assert item.after_s is not None and 0 <= item.after_s < PACE.first_s
        if item.phase is Phase.LAST and item.way is not Way.DEADLINE:
            assert item.after_chunks == PACE.num_chunks
        if item.way is Way.DEADLINE:
            assert item.after_s is not None and item.after_s < PACE.total_s


def test_a_pace_of_one_chunk_still_plans() -> None:
    plan = plan_departures(26, Pace(1.0, 1.0, 1), 0)
    assert all(item.after_chunks is None or item.after_chunks >= 1 for item in plan)


def test_the_tally_tells_who_came_too_late() -> None:
    departure = Departure(Phase.FIRST, Way.CLOSE, None, 1)
    seen = [
        Seen(departure, 0, False),
        Seen(departure, 1, False),
        Seen(departure, 9, True),
        Seen(departure, 0, True),
    ]
    assert tally(seen) == [("first token, HTTP close", 4, 1, 1, 2)]


def settled(
    idle_s: float | None = 0.5, held_blocks: int = 0, num_busy: int = 0, gateway: int = 80 * MIB
) -> Round:
    sizes = {"gateway": [gateway], "decode": [100 * MIB, 100 * MIB]}
    return Round(20, idle_s, held_blocks, num_busy, 0, 0, sizes)


def test_rounds_that_leave_nothing() -> None:
    assert shortfalls([], [settled(), settled(gateway=81 * MIB)]) == []


def test_memory_counts_from_the_middle_on() -> None:
    sizes = [80, 120, 121, 121, 122]
    assert shortfalls([], [settled(gateway=size * MIB) for size in sizes]) == []
    assert shortfalls([], [settled(gateway=size * MIB) for size in reversed(sizes)]) == []
    (grown,) = shortfalls([], [settled(gateway=size * MIB) for size in [80, 80, 80, 90, 99]])
    assert "grew by 19.0 MiB" in grown


def test_what_is_left_behind_is_named() -> None:
    (held,) = shortfalls([], [settled(), settled(idle_s=None, held_blocks=3)])
    assert held.startswith("round 2 left 3 blocks held")
    (late,) = shortfalls([], [settled(idle_s=14.0), settled()])
    assert "idle after 14.0 s only" in late
    (grown,) = shortfalls([], [settled(), settled(gateway=100 * MIB)])
    assert "grew by 20.0 MiB" in grown
    departure = Departure(Phase.FIRST, Way.CLOSE, None, 1)
    (error,) = shortfalls([Seen(departure, 0, True, "UNAVAILABLE: no")], [settled(), settled()])
    assert "UNAVAILABLE" in error
