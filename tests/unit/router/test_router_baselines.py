from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest

from forebay.core.roles import WorkerRole
from forebay.router.baselines import (
    ApproximatePrefixTree,
    ConsistentHash,
    LeastLoaded,
    LongestPrefix,
    RoundRobin,
)
from forebay.router.index import Matches
from forebay.router.policy import Policy
from forebay.router.view import FleetView, RouteRequest, WorkerFacts, WorkerLoad

BLOCK = 16
POLICIES: tuple[Callable[[], Policy], ...] = (
    RoundRobin,
    LeastLoaded,
    ConsistentHash,
    LongestPrefix,
    ApproximatePrefixTree,
)


def facts(worker_id: str, role: WorkerRole, **changes: str) -> WorkerFacts:
    keys = {"model_key": "m", "kv_key": "k", **changes}
    return WorkerFacts(worker_id, role, keys["model_key"], keys["kv_key"], BLOCK)


def fleet(prefills: list[WorkerLoad], decodes: list[WorkerLoad]) -> FleetView:
    """Workers p0, p1, ... and d0, d1, ..., each with the slot of its row."""
    workers = {facts(f"p{i}", WorkerRole.PREFILL): load for i, load in enumerate(prefills)}
    workers |= {facts(f"d{i}", WorkerRole.DECODE): load for i, load in enumerate(decodes)}
    return slotted(FleetView.of(workers))


def slotted(view: FleetView) -> FleetView:
    for row, worker_id in enumerate(view.worker_ids):
        view.set_slot(worker_id, row)
    return view


def queued(*num_tokens: int) -> list[WorkerLoad]:
    return [WorkerLoad(num_queued_tokens=n) for n in num_tokens]


def held(view: FleetView, **num_blocks: int) -> Matches:
    found = np.zeros(int(view.slots.max()) + 1, np.float32)
    for worker_id, slot in zip(view.worker_ids, view.slots, strict=True):
        found[slot] = num_blocks.get(worker_id, 0)
    return Matches(found, found.astype(np.float32))


def prompt(
    name: str = "r", num_blocks: int = 4, chain: str = "a", excluded: frozenset[str] = frozenset()
) -> RouteRequest:
    hashes = [f"{chain}{i}".encode().ljust(16) for i in range(num_blocks)]
    return RouteRequest(name, "m", num_blocks * BLOCK + 1, hashes, excluded)


def computing(policy: Policy, view: FleetView, request: RouteRequest, **blocks: int) -> str:
    decision = policy.choose(request, view, held(view, **blocks))
    assert decision is not None
    return decision.computes


def test_round_robin_takes_turns_and_skips_whom_it_must() -> None:
    view, policy = fleet(queued(9, 0, 0), queued(0)), RoundRobin()
    assert [computing(policy, view, prompt()) for _ in range(4)] == ["p0", "p1", "p2", "p0"]
    view.update("p1", WorkerLoad(accepting=False))
    assert {computing(policy, view, prompt()) for _ in range(4)} == {"p0", "p2"}


def test_least_loaded_takes_the_shortest_queue_whatever_is_cached() -> None:
    view = fleet(queued(30, 10, 20), queued(0))
    assert computing(LeastLoaded(), view, prompt(), p0=4) == "p1"
    assert computing(LeastLoaded(), view, prompt(excluded=frozenset({"p1"}))) == "p2"


def test_equally_loaded_ones_share_by_chance() -> None:
    view = fleet(queued(0, 0, 0), queued(0))
    counts = Counter(computing(LeastLoaded(), view, prompt(f"r{i}")) for i in range(300))
    assert set(counts) == {"p0", "p1", "p2"}
    assert min(counts.values()) > 60


def test_streams_make_a_mixed_worker_busy() -> None:
    busy, idle = facts("busy", WorkerRole.MIXED), facts("idle", WorkerRole.MIXED)
    view = FleetView.of({busy: WorkerLoad(num_sequences=9), idle: WorkerLoad(num_queued_tokens=99)})
    assert computing(LeastLoaded(), slotted(view), prompt()) == "idle"


def test_a_hash_keeps_prompts_with_one_beginning_together() -> None:
    view, policy = fleet(queued(0, 0, 0, 0), queued(0)), ConsistentHash(num_blocks=2)
    homes = {
        chain: {computing(policy, view, prompt(f"{chain}{n}", n, chain)) for n in (2, 3, 9)}
        for chain in "abcdefgh"
    }
    assert all(len(home) == 1 for home in homes.values())
    assert len(set.union(*homes.values())) > 1


def test_a_hash_moves_only_what_was_with_the_worker_that_left() -> None:
    view, policy = fleet(queued(0, 0, 0, 0), queued(0)), ConsistentHash()
    chains = [f"c{i}-" for i in range(40)]
    before = {chain: computing(policy, view, prompt(chain=chain)) for chain in chains}
    view.leave("p2")
    after = {chain: computing(policy, view, prompt(chain=chain)) for chain in chains}
    assert {chain for chain in chains if before[chain] != after[chain]} == {
        chain for chain in chains if before[chain] == "p2"
    }


def test_a_hash_leaves_a_worker_with_more_than_its_share() -> None:
    view, policy = fleet(queued(0, 0, 0, 0), queued(0)), ConsistentHash(bound=1.25)
    home = computing(policy, view, prompt())
    view.update(home, WorkerLoad(num_queued_tokens=1000))
    assert computing(policy, view, prompt()) != home
    for worker_id in view.worker_ids[:4]:
        view.update(worker_id, WorkerLoad(num_queued_tokens=1000))
    assert computing(policy, view, prompt()) == home


def test_prompts_without_a_full_block_go_anywhere() -> None:
    view, policy = fleet(queued(0, 0, 0), queued(0)), ConsistentHash()
    found = {computing(policy, view, prompt(f"r{i}", num_blocks=0)) for i in range(40)}
    assert len(found) == 3


def test_longest_prefix_does_not_mind_the_queue() -> None:
    view = fleet(queued(10**6, 0), queued(0))
    assert computing(LongestPrefix(), view, prompt(), p0=1) == "p0"


def test_the_tree_remembers_what_it_sent() -> None:
    view, policy = fleet(queued(0, 0, 0), queued(0)), ApproximatePrefixTree()
    home = computing(policy, view, prompt())
    assert {computing(policy, view, prompt(f"r{i}")) for i in range(20)} == {home}
    view.update(home, WorkerLoad(num_queued_tokens=4 * BLOCK + 1))
    assert computing(policy, view, prompt()) != home


def test_the_tree_does_not_ask_the_index() -> None:
    view, policy = fleet(queued(0, 1), queued(0)), ApproximatePrefixTree()
    assert computing(policy, view, prompt(), p1=4) == "p0"


def test_the_tree_does_not_remember_what_waits_for_room() -> None:
    view, policy = (
        fleet([WorkerLoad(prefill_room_tokens=0)] * 2, queued(0)),
        ApproximatePrefixTree(),
    )
    decision = policy.choose(prompt(), view, held(view))
    assert decision is not None and not decision.has_room
    assert len({computing(policy, view, prompt(f"r{i}")) for i in range(20)}) == 2


@pytest.mark.parametrize("policy", POLICIES)
def test_the_decode_worker_is_the_least_loaded(policy: Callable[[], Policy]) -> None:
    view = fleet(
        queued(0, 0),
        [
            WorkerLoad(num_sequences=5),
            WorkerLoad(num_sequences=4, kv_usage=0.5),
            WorkerLoad(num_sequences=4, kv_usage=0.4),
            WorkerLoad(accepting=False),
        ],
    )
    decision = policy().choose(prompt(), view, held(view, p0=1, p1=1))
    assert decision is not None
    assert decision.decode == "d2"
    assert decision.prefill in ("p0", "p1")
    assert decision.num_compute_tokens == 3 * BLOCK + 1
    assert set(decision.scores) == {"p0", "p1"}
    assert decision.matched == {"p0": BLOCK, "p1": BLOCK}


@pytest.mark.parametrize("policy", POLICIES)
def test_nobody_to_go_to(policy: Callable[[], Policy]) -> None:
    apart = {
        facts("p", WorkerRole.PREFILL): WorkerLoad(),
        facts("d", WorkerRole.DECODE, kv_key="other"): WorkerLoad(),
        facts("m", WorkerRole.MIXED, model_key="other"): WorkerLoad(),
    }
    view = slotted(FleetView.of(apart))
    assert policy().choose(prompt(), view, held(view)) is None
    assert policy().choose(prompt(), FleetView(), Matches(np.zeros(0), np.zeros(0))) is None
    lonely = fleet(queued(0), [])
    assert policy().choose(prompt(), lonely, held(lonely)) is None


@pytest.mark.parametrize("policy", POLICIES)
def test_mixed_workers_and_pairs_are_places_alike(policy: Callable[[], Policy]) -> None:
    view = slotted(
        FleetView.of(
            {
                facts("m", WorkerRole.MIXED): WorkerLoad(),
                facts("p", WorkerRole.PREFILL): WorkerLoad(),
                facts("d", WorkerRole.DECODE): WorkerLoad(),
            }
        )
    )
    alone = policy().choose(prompt(excluded=frozenset({"p"})), view, held(view))
    assert alone is not None and (alone.decode, alone.prefill) == ("m", None)
    pair = policy().choose(prompt(excluded=frozenset({"m"})), view, held(view))
    assert pair is not None and (pair.decode, pair.prefill) == ("d", "p")
