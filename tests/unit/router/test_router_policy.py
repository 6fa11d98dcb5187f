from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forebay.core.errors import ConfigurationError
from forebay.core.roles import WorkerRole
from forebay.router.index import Matches
from forebay.router.policies import POLICIES, policy_named
from forebay.router.policy import Weights, can_serve, choose
from forebay.router.view import Decision, FleetView, RouteRequest, WorkerFacts, WorkerLoad

BLOCK = 16
REQUEST = RouteRequest("request", "m/1", 1024)
WEIGHTS = Weights()


@dataclass(frozen=True)
class Row:
    """`held`: leading tokens of the prompt that the index finds there; `host`: in host memory."""

    worker_id: str
    role: WorkerRole = WorkerRole.MIXED
    model_key: str = "m/1"
    kv_key: str = "1/layout"
    held: int = 0
    host: bool = False
    load: WorkerLoad = field(default_factory=WorkerLoad)


def mixed(worker_id: str, held: int = 0, **load: object) -> Row:
    return Row(worker_id, held=held, load=WorkerLoad(**load))  # type: ignore[arg-type]


def prefill(worker_id: str, held: int = 0, **load: object) -> Row:
    return replace(mixed(worker_id, held, **load), role=WorkerRole.PREFILL)


def decode(worker_id: str, held: int = 0, **load: object) -> Row:
    return replace(mixed(worker_id, held, **load), role=WorkerRole.DECODE)


def view_of(*rows: Row) -> tuple[FleetView, Matches]:
    """Slots in another order than rows."""
    view = FleetView()
    blocks = np.zeros(len(rows) + 1, np.float32)
    weighted = np.zeros(len(rows) + 1, np.float32)
    for number, row in enumerate(rows):
        view.join(WorkerFacts(row.worker_id, row.role, row.model_key, row.kv_key, BLOCK))
        view.update(row.worker_id, row.load)
        slot = len(rows) - number
        view.set_slot(row.worker_id, slot)
        blocks[slot] = row.held // BLOCK
        weighted[slot] = blocks[slot] * (0.75 if row.host else 1)
    return view, Matches(blocks, weighted)


def decide(*rows: Row, request: RouteRequest = REQUEST, **weights: float) -> Decision | None:
    view, matches = view_of(*rows)
    return choose(request, view, matches, replace(WEIGHTS, **weights))  # type: ignore[arg-type]


def chosen(*rows: Row, request: RouteRequest = REQUEST, **weights: float) -> tuple[str, ...] | None:
    """(decode, prefill) or (decode,)."""
    decision = decide(*rows, request=request, **weights)
    if decision is None:
        return None
    return tuple(name for name in (decision.decode, decision.prefill) if name)


def test_the_shortest_prefill_queue_and_the_emptiest_decode_worker() -> None:
    assert chosen(
        prefill("p1", num_queued_tokens=900),
        prefill("p2", num_queued_tokens=100),
        decode("d1", num_sequences=5),
        decode("d2", num_sequences=4),
    ) == ("d2", "p2")


def test_the_worker_that_holds_the_prefix_unless_its_queue_is_longer_than_the_miss() -> None:
    pair = prefill("cold"), decode("d")
    held = 512
    cost_of_a_miss = round(WEIGHTS.miss * held)
    for queued, expected in ((cost_of_a_miss - 1, "hot"), (cost_of_a_miss + 1, "cold")):
        hot = prefill("hot", held, num_queued_tokens=queued)
        assert chosen(hot, *pair, pulls=False) == ("d", expected)


def test_kv_is_pulled_where_that_is_cheaper_than_both_the_queue_and_the_miss() -> None:
    request = replace(REQUEST, num_tokens=8192)
    rows = prefill("hot", 8000, num_queued_tokens=9000), prefill("cold", 160), decode("d")
    decision = decide(*rows, request=request)
    assert decision is not None
    assert (decision.prefill, decision.pull_from) == ("cold", "hot")
    assert decision.num_pulled_tokens == 8000 - 160
    assert decision.num_compute_tokens == 192
    computed = decide(*rows, request=request, pulls=False)
    assert computed is not None
    assert (computed.prefill, computed.pull_from) == ("hot", None)
    assert (computed.num_pulled_tokens, computed.num_compute_tokens) == (0, 192)


def test_a_short_prefix_is_not_worth_a_pull() -> None:
    decision = decide(prefill("hot", 64, num_queued_tokens=900), prefill("cold"), decode("d"))
    assert decision is not None
    assert (decision.prefill, decision.pull_from) == ("cold", None)


def test_kv_comes_from_decode_workers_too_but_from_nobody_that_leaves() -> None:
    request = replace(REQUEST, num_tokens=8192)
    for accepting, source in ((True, "d"), (False, None)):
        decision = decide(
            prefill("p"), decode("d", 8000, accepting=accepting), decode("e"), request=request
        )
        assert decision is not None
        assert (decision.prefill, decision.pull_from) == ("p", source)


def test_a_prefix_in_host_memory_counts_less() -> None:
    rows = [prefill("device", 512), replace(prefill("host", 512), host=True), decode("d")]
    assert chosen(*rows) == ("d", "device")
    longer = replace(prefill("host", 656), host=True)
    assert chosen(rows[0], longer, rows[2]) == ("d", "device")
    longest = replace(prefill("host", 704), host=True)
    assert chosen(rows[0], longest, rows[2]) == ("d", "host")


def test_decode_workers_are_weighed_by_streams_kv_and_what_they_hold() -> None:
    assert chosen(prefill("p"), decode("a", kv_usage=0.9), decode("b", kv_usage=0.1))[0] == "b"  # type: ignore[index]
    streams = decode("a", num_sequences=1), decode("b", 896, num_sequences=2)
    assert chosen(prefill("p"), *streams) == ("b", "p")
    more = decode("a", num_sequences=1), decode("b", 896, num_sequences=3)
    assert chosen(prefill("p"), *more) == ("a", "p")


def test_little_left_to_compute_is_computed_by_the_decode_worker() -> None:
    pool = prefill("p"), decode("other")
    left = WEIGHTS.local_tokens
    assert chosen(*pool, decode("d", REQUEST.num_tokens - left)) == ("d",)
    assert chosen(*pool, decode("d", REQUEST.num_tokens - left - BLOCK)) == ("d", "p")
    assert chosen(*pool, decode("d", REQUEST.num_tokens - left), local_tokens=0) == ("d", "p")
    busy = decode("d", REQUEST.num_tokens - left, num_sequences=60)
    assert chosen(*pool, busy) == ("other", "p")


def test_a_decode_worker_without_a_prefill_pool_takes_nothing() -> None:
    assert chosen(decode("d", 1008)) is None


def test_a_mixed_worker_alone_or_a_pair_whichever_is_cheaper() -> None:
    pair = prefill("p"), decode("d", num_sequences=3)
    assert chosen(*pair, mixed("m", num_sequences=3)) == ("m",)
    assert chosen(*pair, mixed("m", num_sequences=6)) == ("d", "p")
    assert chosen(*pair, mixed("m", num_queued_tokens=2048)) == ("d", "p")


@pytest.mark.parametrize(
    "rows",
    [
        (),
        (prefill("p"),),
        (decode("d"),),
        (mixed("m", accepting=False),),
        (replace(mixed("m"), model_key="other"),),
        (prefill("p", accepting=False), decode("d")),
        (replace(prefill("p"), model_key="m/2"), decode("d")),
        (replace(prefill("p"), kv_key="2/layout"), decode("d")),
    ],
)
def test_no_place(rows: tuple[Row, ...]) -> None:
    assert chosen(*rows) is None
    for name in POLICIES:
        assert policy_named(name).choose(REQUEST, *view_of(*rows)) is None


def test_a_worker_without_room_is_waited_for_if_the_others_cost_more() -> None:
    full = mixed("full", 960, prefill_room_tokens=0)
    decision = decide(full, mixed("free"), pulls=False)
    assert decision is not None
    assert (decision.decode, decision.has_room) == ("full", False)
    busier = replace(full, load=replace(full.load, num_queued_tokens=4000))
    decision = decide(busier, mixed("free"), pulls=False)
    assert decision is not None
    assert (decision.decode, decision.has_room) == ("free", True)


def test_what_waits_in_the_gateways_counts_as_queued() -> None:
    view, matches = view_of(mixed("a"), mixed("b", num_queued_tokens=100))
    view.set_line_tokens({"a": 500, "gone": 7})
    decision = choose(REQUEST, view, matches, WEIGHTS)
    assert decision is not None and decision.decode == "b"
    view.set_line_tokens({})
    decision = choose(REQUEST, view, matches, WEIGHTS)
    assert decision is not None and decision.decode == "a"


def test_only_workers_between_which_kv_can_move_are_paired() -> None:
    assert chosen(
        replace(prefill("p1"), kv_key="other"),
        prefill("p2", num_queued_tokens=5000),
        replace(decode("d1"), kv_key="third"),
        decode("d2", num_sequences=9),
    ) == ("d2", "p2")


def test_whoever_refused_is_left_out() -> None:
    rows = prefill("p1"), prefill("p2"), decode("d1"), decode("d2", num_sequences=1)
    some = replace(REQUEST, excluded=frozenset({"d1", "p1", "unknown"}))
    assert chosen(*rows, request=some) == ("d2", "p2")
    everybody = replace(REQUEST, excluded=frozenset({"p1", "p2", "d1", "d2"}))
    assert chosen(*rows, request=everybody) is None


def test_a_decision_explains_itself() -> None:
    decision = decide(
        prefill("p", 256, num_queued_tokens=512),
        decode("d", num_sequences=2),
        mixed("m", accepting=False),
        pulls=False,
    )
    assert decision is not None
    assert decision.scores == {
        "p": 512 + WEIGHTS.miss * 768,
        "d": pytest.approx(2 * WEIGHTS.sequence + WEIGHTS.transfer * 1024),
    }
    assert decision.matched == {"p": 256}


def test_ties_spread_over_requests_and_repeat_for_each() -> None:
    rows = [mixed(f"m{i}") for i in range(4)]
    requests = [replace(REQUEST, request_id=f"{i}") for i in range(400)]
    first = Counter(chosen(*rows, request=request) for request in requests)
    assert len(first) == 4
    assert min(first.values()) > 50
    assert first == Counter(chosen(*reversed(rows), request=request) for request in requests)


def test_equal_prompts_meet_wherever_they_are_routed() -> None:
    rows = [mixed(f"m{i}") for i in range(16)]
    prompts = [[bytes([i]) * 16] * 3 for i in range(64)]
    places = set()
    for hashes in prompts:
        asked = [replace(REQUEST, request_id=f"{n}", hashes=hashes) for n in range(3)]
        (place,) = {chosen(*rows, request=request) for request in asked}
        places.add(place)
    assert len(places) > 8


@pytest.mark.parametrize(
    ("rows", "served"),
    [
        ((mixed("m", prefill_room_tokens=0),), True),
        ((prefill("p", prefill_room_tokens=0), decode("d", kv_usage=1.0)), True),
        ((prefill("p"),), False),
        ((decode("d"),), False),
        ((replace(prefill("p"), kv_key="x"), decode("d")), False),
        ((mixed("m", accepting=False),), False),
        ((replace(mixed("m"), model_key="x"),), False),
        ((), False),
    ],
)
def test_can_serve_looks_at_who_is_there_and_not_how_busy(
    rows: tuple[Row, ...], served: bool
) -> None:
    assert can_serve("m/1", view_of(*rows)[0]) is served


def test_rows_come_and_go_and_keep_their_figures() -> None:
    view, _ = view_of(mixed("a", num_sequences=1), mixed("b", num_sequences=2), mixed("c"))
    view.leave("a")
    assert view.worker_ids == ("b", "c")
    assert view.num_sequences.tolist() == [2, 0]
    assert view.slots.tolist() == [2, 1]
    view.join(WorkerFacts("a", WorkerRole.MIXED, "m/1", "1/layout", BLOCK))
    assert view.accepting.tolist() == [True, True, False]
    assert "a" in view and view.row_of("a") == 2 and view.row_of("x") is None


def test_an_unknown_policy_is_named() -> None:
    with pytest.raises(ConfigurationError, match="router_policy 'fastest'"):
        policy_named("fastest")


loads = st.builds(
    WorkerLoad,
    accepting=st.booleans(),
    num_sequences=st.integers(0, 9),
    num_queued_tokens=st.integers(0, 2000),
    prefill_room_tokens=st.integers(-5, 5),
    kv_usage=st.floats(0, 1),
)
fleets = st.lists(
    st.builds(
        Row,
        worker_id=st.integers(0, 99).map(str),
        role=st.sampled_from(WorkerRole),
        model_key=st.sampled_from(("m/1", "x")),
        kv_key=st.sampled_from(("a", "b")),
        held=st.integers(0, 70).map(lambda blocks: blocks * BLOCK),
        host=st.booleans(),
        load=loads,
    ),
    max_size=8,
    unique_by=lambda row: row.worker_id,
)


@settings(max_examples=200)
@given(fleets, st.sets(st.integers(0, 99).map(str)), st.sampled_from(sorted(POLICIES)))
def test_any_decision_can_be_carried_out(rows: list[Row], excluded: set[str], name: str) -> None:
    request = replace(
        REQUEST, excluded=frozenset(excluded), hashes=[b"%16d" % i for i in range(64)]
    )
    decision = policy_named(name).choose(request, *view_of(*rows))
    if decision is None:
        return
    assert can_serve("m/1", view_of(*rows)[0])
    again = policy_named(name).choose(request, *view_of(*rows))
    assert again is not None and _outcome(again) == _outcome(decision)
    by_id: Mapping[str, Row] = {row.worker_id: row for row in rows}
    computes, decodes = by_id[decision.computes], by_id[decision.decode]
    assert decision.has_room is (computes.load.prefill_room_tokens > 0)
    assert computes.kv_key == decodes.kv_key
    assert (computes.role is WorkerRole.PREFILL) is (decision.prefill is not None)
    assert decodes.role is not WorkerRole.PREFILL
    for row in (computes, decodes):
        assert row.load.accepting and row.model_key == "m/1"
        assert row.worker_id not in excluded
    assert decision.computes in decision.scores
    assert 1 <= decision.num_compute_tokens <= request.num_tokens
    if decision.pull_from is not None:
        source = by_id[decision.pull_from]
        assert source is not computes
        assert source.load.accepting and source.kv_key == computes.kv_key
        assert source.held >= computes.held + decision.num_pulled_tokens > computes.held


def _outcome(decision: Decision) -> tuple[object, ...]:
    return decision.decode, decision.prefill, decision.pull_from, decision.scores
