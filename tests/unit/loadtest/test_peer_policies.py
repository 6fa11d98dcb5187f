from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from forebay.core.roles import WorkerRole
from forebay.router.index import Matches
from forebay.router.policy import Policy
from forebay.router.view import FleetView, RouteRequest, WorkerFacts, WorkerLoad
from forebay_loadtest.routing.peer_policies import (
    DYNAMO_GRID,
    LLMD_GRID,
    SGLANG_GRID,
    Dynamo,
    DynamoParameters,
    Llmd,
    LlmdParameters,
    Load,
    Sglang,
    SglangParameters,
)

BLOCK = 100


def fleet(*loads: WorkerLoad) -> FleetView:
    """Prefill workers p0, p1, ... and one decode worker."""
    workers = {
        WorkerFacts(f"p{i}", WorkerRole.PREFILL, "m", "k", BLOCK): load
        for i, load in enumerate(loads)
    }
    workers[WorkerFacts("d", WorkerRole.DECODE, "m", "k", BLOCK)] = WorkerLoad()
    view = FleetView.of(workers)
    for row, worker_id in enumerate(view.worker_ids):
        view.set_slot(worker_id, row)
    return view


def busy(*num_prompts: int) -> FleetView:
    return fleet(*(WorkerLoad(num_sequences=n) for n in num_prompts))


def prompt(chain: str = "a", num_blocks: int = 10, name: str = "r") -> RouteRequest:
    hashes = [f"{chain}{i}".encode().ljust(16) for i in range(num_blocks)]
    return RouteRequest(name, "m", num_blocks * BLOCK, hashes)


def computing(policy: Policy, view: FleetView, request: RouteRequest, *num_blocks: int) -> str:
    found = np.array([*num_blocks, *[0] * (len(view) - len(num_blocks))], np.float32)
    decision = policy.choose(request, view, Matches(found, found.astype(np.float32)))
    assert decision is not None and decision.decode == "d"
    return decision.computes


def test_dynamo_adds_what_it_sent_and_what_is_not_cached() -> None:
    view, policy = busy(0, 0), Dynamo()
    assert computing(policy, view, prompt(), 3, 0) == "p0"
    view.update("p0", WorkerLoad(num_sequences=1))
    assert computing(policy, view, prompt(), 6, 0) == "p1"
    view.update("p1", WorkerLoad(num_sequences=1))
    assert computing(policy, view, prompt(), 0, 4) == "p1"


def test_dynamo_counts_a_prompt_whole_until_its_first_token() -> None:
    almost_done = WorkerLoad(num_sequences=1, num_queued_tokens=1)
    for modelled, wanted in ((False, "p1"), (True, "p0")):
        policy = Dynamo(DynamoParameters(modelled=modelled))
        computing(policy, busy(0, 0), prompt(), 1, 0)
        assert computing(policy, fleet(almost_done, WorkerLoad()), prompt(), 5, 0) == wanted


def test_dynamo_forgets_what_is_done() -> None:
    policy = Dynamo()
    computing(policy, busy(0, 0), prompt(), 1, 0)
    assert computing(policy, busy(0, 0), prompt(), 1, 0) == "p0"


def test_more_credit_follows_the_cache_further_and_decay_less_far() -> None:
    view = fleet(WorkerLoad(num_queued_tokens=800), WorkerLoad())
    for credit, decay, wanted in ((1.0, 0.0, "p1"), (2.0, 0.0, "p0"), (2.0, 3.0, "p1")):
        policy = Dynamo(DynamoParameters(credit, decay, modelled=True))
        assert computing(policy, view, prompt(), 5, 0) == wanted


def test_temperature_spreads() -> None:
    view, policy = busy(0, 0, 0), Dynamo(DynamoParameters(temperature=1.0))
    counts = Counter(computing(policy, view, prompt(), 5, 0, 0) for _ in range(300))
    assert counts["p0"] > counts["p1"] > 40
    assert counts["p2"] > 40


def test_sglang_follows_the_longest_match_of_its_own_trees() -> None:
    view, policy = busy(0, 0, 0), Sglang()
    home = computing(policy, view, prompt("a"))
    assert computing(policy, view, prompt("a"), 0, 0, 0) == home
    other = computing(policy, view, prompt("b"))
    assert other != home
    assert computing(policy, view, prompt("c")) not in (home, other)


def test_sglang_wants_more_than_the_threshold() -> None:
    for threshold, stays in ((0.4, True), (0.5, False)):
        view, policy = busy(0, 0), Sglang(SglangParameters(threshold))
        home = computing(policy, view, prompt("a", 5))
        assert (computing(policy, view, prompt("a", 10)) == home) is stays


def test_sglang_takes_the_shortest_queue_only_when_both_thresholds_are_passed() -> None:
    has = SglangParameters(balance_abs_threshold=4, balance_rel_threshold=2.0)
    for loads, stays in (((4, 0), True), ((5, 0), False), ((11, 6), True), ((13, 6), False)):
        policy = Sglang(has)
        computing(policy, fleet(WorkerLoad(), WorkerLoad(accepting=False)), prompt())
        assert (computing(policy, busy(*loads), prompt()) == "p0") is stays


def test_sglang_cuts_trees_that_are_too_large() -> None:
    policy = Sglang(SglangParameters(max_tree_blocks=10))
    only = fleet(WorkerLoad(), WorkerLoad(accepting=False))
    computing(policy, only, prompt("a"))
    computing(policy, only, prompt("b"))
    assert computing(policy, busy(0, 0), prompt("a")) == "p1"


def test_sglang_with_too_little_matched_takes_the_shortest_queue_if_told_so() -> None:
    policy = Sglang(SglangParameters(otherwise="shortest queue"))
    assert computing(policy, busy(2, 1, 2), prompt("a")) == "p1"


@pytest.mark.parametrize(
    ("parameters", "wanted"),
    [
        (LlmdParameters(2.0, 1.0), "p0"),
        (LlmdParameters(1.0, 1.0), "p2"),
        (LlmdParameters(1.0, 1.0, Load.ACTIVE_REQUESTS), "p2"),
        (LlmdParameters(1.0, 1.0, Load.LOAD_AWARE, 128), "p0"),
        (LlmdParameters(1.0, 1.0, Load.LOAD_AWARE, 3), "p2"),
    ],
)
def test_llmd_weighs_cached_share_against_requests(parameters: LlmdParameters, wanted: str) -> None:
    """6 of 10 blocks where four prompts are, 2 where two are, none where none is."""
    view = busy(4, 2, 0)
    if parameters.scorer is Load.LOAD_AWARE and parameters.threshold == 3:
        wanted = "p0"
        view = busy(3, 2, 0)
    assert computing(Llmd(parameters), view, prompt(), 6, 2, 0) == wanted


def test_llmd_stretches_scores_between_those_that_have_any() -> None:
    view = busy(3, 1, 0)
    stretched = LlmdParameters(1.5, 1.0, relative=True)
    assert computing(Llmd(LlmdParameters(1.5, 1.0)), view, prompt(), 3, 2, 0) != "p0"
    assert computing(Llmd(stretched), view, prompt(), 3, 2, 0) == "p0"
    assert computing(Llmd(stretched), view, prompt(), 2, 0, 0) == "p0"
    assert computing(Llmd(stretched), view, prompt(), 0, 0, 0) != "p0"


def test_llmd_counts_tokens_in_flight() -> None:
    policy = Llmd(LlmdParameters(1.0, 1.0, Load.TOKENS, 5000))
    assert computing(policy, busy(0, 0), prompt(), 1, 0) == "p0"
    assert computing(policy, busy(1, 0), prompt(), 4, 0) == "p1"
    assert computing(policy, busy(1, 1), prompt(), 1, 0) == "p0"
    assert computing(policy, busy(0, 1), prompt(), 0, 4) == "p0"


def test_grids_hold_a_dozen_points_each_and_what_is_the_default() -> None:
    for grid, default in (
        (DYNAMO_GRID, DynamoParameters()),
        (SGLANG_GRID, SglangParameters()),
        (LLMD_GRID, LlmdParameters()),
    ):
        assert default in grid
        assert 6 <= len(grid) <= 16
        assert len(set(grid)) == len(grid)
