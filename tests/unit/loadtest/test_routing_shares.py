from __future__ import annotations

import pytest

from forebay_loadtest.routing.live_faults import RouterSample, router_back_s
from forebay_loadtest.routing.live_memory import INDEX_MIB, MemorySample, shortfalls
from forebay_loadtest.routing.shares import Outcome, Share, recovery

MIB = 1 << 20


def answered(ended: float, cached: int, ideal: int = 80) -> Outcome:
    return Outcome(0, 0, ended - 0.1, ideal, ended, 100, cached)


def every_tenth(begin: float, end: float, cached: int) -> list[Outcome]:
    count = round((end - begin) * 10)
    return [answered(begin + step / 10, cached) for step in range(1, count + 1)]


def test_a_share_counts_tokens_of_what_was_answered() -> None:
    failed = Outcome(2, 0, 0.0, 500, 1.0, error="503")
    share = Share.of([Outcome(0, 0, 0, 90, 1, 100, 50), Outcome(1, 0, 0, 0, 1, 300, 30), failed])
    assert (share.num_requests, share.cached, share.ideal, share.lost) == (2, 20.0, 22.5, 2.5)


def test_no_outcome_is_no_share() -> None:
    assert Share.of([]) == Share(0, 0.0, 0.0)


def test_a_share_that_fell_is_back_when_its_last_low_window_ends() -> None:
    outcomes = every_tenth(0, 10, 70) + every_tenth(10, 14, 30) + every_tenth(14, 30, 70)
    found = recovery(outcomes, 10.0, 30.0, before_s=5.0, window_s=2.0)
    assert found.before.cached == found.after.cached == 70.0
    assert found.dip == pytest.approx(40.0)
    assert found.back_s is not None
    assert 5.5 <= found.back_s <= 6.0


def test_a_share_that_stays_low_is_not_back() -> None:
    outcomes = every_tenth(0, 10, 70) + every_tenth(10, 30, 60)
    assert recovery(outcomes, 10.0, 30.0, before_s=5.0, window_s=2.0).back_s is None


def test_a_share_that_never_fell_is_back_at_once() -> None:
    outcomes = every_tenth(0, 30, 70)
    found = recovery(outcomes, 10.0, 30.0, before_s=5.0, window_s=2.0)
    assert (found.back_s, found.dip) == (0.0, 0.0)


def test_clients_that_ask_for_other_things_are_no_dip() -> None:
    new = [answered(10 + step / 10, 10, ideal=20) for step in range(1, 200)]
    found = recovery(every_tenth(0, 10, 70) + new, 10.0, 29.0, before_s=5.0, window_s=2.0)
    assert (found.back_s, found.dip) == (0.0, 0.0)


def test_nothing_answered_after_the_strike_is_no_recovery() -> None:
    assert recovery(every_tenth(0, 10, 70), 10.0, 20.0, before_s=5.0, window_s=2.0).back_s is None


def sample(at: float, staleness_s: float | None, degraded: bool = False) -> RouterSample:
    return RouterSample(at, staleness_s, degraded, 0.0, 0.0)


def test_routers_are_back_at_the_first_good_sample_after_the_last_bad_one() -> None:
    samples = [sample(11, 0.1), sample(12, 3.0), sample(13, 0.1, True), sample(14, 0.0)]
    assert router_back_s(samples, 10.0) == 4.0


def test_routers_that_were_never_behind_are_back_at_once() -> None:
    assert router_back_s([sample(11, 0.2)], 10.0) == 0.0


@pytest.mark.parametrize("last", [sample(12, 5.0), sample(12, None), sample(12, 0.0, True)])
def test_routers_that_do_not_say_so_are_not_back(last: RouterSample) -> None:
    assert router_back_s([sample(11, 0.0), last], 10.0) is None
    assert router_back_s([], 10.0) is None


def memory(
    at_s: float, index_mib: float | None, rss_mib: float, evicted: float = 9.0
) -> MemorySample:
    index = None if index_mib is None else index_mib * MIB
    return MemorySample(at_s, 10, 0, index, 1.0, 1.0, evicted, int(rss_mib * MIB))


def test_an_index_under_its_bound_in_a_gateway_that_does_not_grow_is_fine() -> None:
    assert shortfalls([memory(10, 3, 90), memory(20, INDEX_MIB - 1, 100), memory(30, 7, 101)]) == []


@pytest.mark.parametrize(
    ("samples", "words"),
    [
        ([memory(10, INDEX_MIB + 1, 90)], "of 8"),
        ([memory(10, 0.1, 90, evicted=0)], "never full"),
        ([memory(10, None, 90)], "does not tell"),
        ([memory(10, 7, 90), memory(20, 7, 90), memory(30, 7, 140)], "grew by 50.0 MiB"),
    ],
)
def test_what_is_wrong_with_memory_is_said(samples: list[MemorySample], words: str) -> None:
    (short,) = shortfalls(samples)
    assert words in short
