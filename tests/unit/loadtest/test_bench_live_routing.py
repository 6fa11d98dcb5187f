from __future__ import annotations

from dataclasses import replace

import pytest

from forebay_loadtest.routing.faults import Fault
from forebay_loadtest.routing.live import (
    GATEWAYS,
    NOISE_POINTS,
    dynamo_shortfalls,
    fault_shortfalls,
    gateway_shortfalls,
)
from forebay_loadtest.routing.live_dynamo import RequestSet, SetResult, request_sets
from forebay_loadtest.routing.live_faults import FaultResult
from forebay_loadtest.routing.shares import Recovery, Share

OURS = SetResult("Forebay", "conversations", 70.0, 80.0, 2.0, 100, 0, 9000, 0.1, 9.0, "")
SHARE = Share(50, 70.0, 80.0)
FINE = FaultResult(
    fault=Fault.STOP,
    struck=True,
    evidence="state T",
    fault_s=5.0,
    num_requests=100,
    num_failed=0,
    first_error="",
    share=Recovery(SHARE, SHARE, 1.0, 0.0),
    max_staleness_s=5.0,
    was_degraded=True,
    router_back_s=6.0,
    resyncs=0.0,
    gaps=0.0,
)


@pytest.mark.parametrize(("peer", "short"), [(60.0, 0), (70.0 + NOISE_POINTS, 0), (71.5, 1)])
def test_a_peer_with_a_higher_share_is_a_shortfall(peer: float, short: int) -> None:
    results = [replace(OURS, system="Dynamo kv", cached=peer), OURS]
    assert len(dynamo_shortfalls(results)) == short


def test_requests_that_fail_are_a_shortfall_whoever_failed_them() -> None:
    failed = replace(OURS, system="Dynamo kv", cached=1.0, num_failed=3, first_error="500: no")
    (line,) = dynamo_shortfalls([failed, OURS])
    assert "3 failed (500: no)" in line


@pytest.mark.parametrize(("two", "short"), [(70.0, 0), (68.1, 0), (67.9, 1), (72.1, 1)])
def test_two_gateways_have_to_be_near_one_in_the_mean(two: float, short: int) -> None:
    results = [
        replace(OURS, system=GATEWAYS[count], cached=cached + apart)
        for count, cached in ((1, 70.0), (2, two))
        for apart in (-3.0, 3.0)
    ]
    assert len(gateway_shortfalls(results)) == short


def test_a_fault_that_was_survived_and_is_over_is_no_shortfall() -> None:
    assert fault_shortfalls(FINE) == []


@pytest.mark.parametrize(
    ("result", "words"),
    [
        (replace(FINE, struck=False), "did not happen"),
        (replace(FINE, num_failed=1, first_error="502"), "1 requests failed (502)"),
        (replace(FINE, was_degraded=False), "degraded"),
        (replace(FINE, fault=Fault.DROP), "missing"),
        (replace(FINE, share=Recovery(SHARE, SHARE, 9.0, None)), "share did not come back"),
        (replace(FINE, router_back_s=None), "in step again"),
    ],
)
def test_what_a_fault_leaves_behind_is_said(result: FaultResult, words: str) -> None:
    (line,) = fault_shortfalls(result)
    assert words in line


def test_workers_hold_a_twentieth_of_a_sets_blocks() -> None:
    (chosen,) = request_sets(60, None, 0, seed=1)
    assert isinstance(chosen, RequestSet)
    assert len(chosen.requests) == 60
    num_tokens = sum(len(each.rendered()) for each in chosen.requests)
    assert 0 < chosen.capacity.num_blocks < num_tokens / chosen.capacity.block_size / 20
