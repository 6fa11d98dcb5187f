from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forebay.core.roles import WorkerRole
from forebay.router.policy import can_serve, choose, compatible, cost
from forebay.router.view import Decision, RouteRequest, WorkerView

REQUEST = RouteRequest("request", "m/1", 100)


def worker(worker_id: str, role: WorkerRole = WorkerRole.MIXED, **changes: object) -> WorkerView:
    view = WorkerView(
        worker_id=worker_id,
        role=role,
        model_key="m/1",
        kv_key="1/layout",
        accepting=True,
        num_sequences=0,
        num_pending_prefill_tokens=0,
        prefill_room_tokens=1024,
        kv_usage=0.0,
    )
    return replace(view, **changes)  # type: ignore[arg-type]


def prefill(worker_id: str, **changes: object) -> WorkerView:
    return worker(worker_id, WorkerRole.PREFILL, **changes)


def decode(worker_id: str, **changes: object) -> WorkerView:
    return worker(worker_id, WorkerRole.DECODE, **changes)


def chosen(*view: WorkerView, request: RouteRequest = REQUEST) -> tuple[str, str | None] | None:
    decision = choose(request, view)
    return (decision.decode, decision.prefill) if decision else None


def test_the_emptiest_decode_and_the_shortest_prefill_queue() -> None:
    assert chosen(
        prefill("p1", num_pending_prefill_tokens=900),
        prefill("p2", num_pending_prefill_tokens=100),
        decode("d1", num_sequences=5),
        decode("d2", num_sequences=4, kv_usage=0.5),
    ) == ("d2", "p2")


def test_kv_use_decides_between_equal_batches() -> None:
    assert chosen(
        prefill("p"),
        decode("d1", num_sequences=4, kv_usage=0.9),
        decode("d2", num_sequences=4, kv_usage=0.1),
    ) == ("d2", "p")


def test_a_mixed_worker_alone_or_a_pair_whichever_is_cheaper() -> None:
    pair = (prefill("p"), decode("d", num_sequences=3))
    assert chosen(*pair, worker("m", num_sequences=2)) == ("m", None)
    assert chosen(*pair, worker("m", num_sequences=4)) == ("d", "p")
    busy = worker("m", num_sequences=2, num_pending_prefill_tokens=2048)
    assert chosen(*pair, busy) == ("d", "p")


@pytest.mark.parametrize(
    "view",
    [
        (),
        (prefill("p"),),
        (decode("d"),),
        (prefill("p", prefill_room_tokens=0), decode("d")),
        (prefill("p", prefill_room_tokens=-5), decode("d")),
        (worker("m", prefill_room_tokens=0),),
        (worker("m", accepting=False),),
        (worker("m", model_key="other"),),
        (prefill("p", accepting=False), decode("d")),
        (prefill("p", model_key="m/2"), decode("d")),
        (prefill("p", kv_key="2/layout"), decode("d")),
    ],
)
def test_no_place(view: tuple[WorkerView, ...]) -> None:
    assert chosen(*view) is None


def test_only_a_prefill_worker_that_fits_is_paired() -> None:
    assert chosen(
        prefill("p1", kv_key="other"),
        prefill("p2", num_pending_prefill_tokens=5000),
        decode("d1", kv_key="third"),
        decode("d2", num_sequences=9),
    ) == ("d2", "p2")
    assert not compatible(prefill("p", kv_key="a"), decode("d", kv_key="b"))


def test_whoever_refused_is_left_out() -> None:
    view = (prefill("p1"), prefill("p2"), decode("d1"), decode("d2", num_sequences=1))
    assert chosen(*view, request=replace(REQUEST, excluded=frozenset({"d1", "p1"}))) == (
        "d2",
        "p2",
    )
    everybody = frozenset({"p1", "p2", "d1", "d2"})
    assert chosen(*view, request=replace(REQUEST, excluded=everybody)) is None


def test_a_decision_explains_itself() -> None:
    view = (prefill("p", num_pending_prefill_tokens=512), decode("d", num_sequences=2))
    assert choose(REQUEST, view) == Decision("d", "p", {"p": 1.0, "d": 2.0})


def test_ties_spread_over_requests_and_repeat_for_each() -> None:
    view = [worker(f"m{i}") for i in range(4)]
    first = Counter(chosen(*view, request=replace(REQUEST, request_id=f"{i}")) for i in range(400))
    assert len(first) == 4
    assert min(first.values()) > 50
    again = Counter(
        chosen(*reversed(view), request=replace(REQUEST, request_id=f"{i}")) for i in range(400)
    )
    assert first == again


@pytest.mark.parametrize(
    ("view", "served"),
    [
        ((worker("m", prefill_room_tokens=0),), True),
        ((prefill("p", prefill_room_tokens=0), decode("d", kv_usage=1.0)), True),
        ((prefill("p"),), False),
        ((decode("d"),), False),
        ((prefill("p", kv_key="x"), decode("d")), False),
        ((worker("m", accepting=False),), False),
        ((worker("m", model_key="x"),), False),
        ((), False),
    ],
)
def test_can_serve_looks_at_who_is_there_and_not_how_busy(
    view: tuple[WorkerView, ...], served: bool
) -> None:
    assert can_serve("m/1", view) is served


views = st.lists(
    st.builds(
        worker,
        worker_id=st.integers(0, 99).map(str),
        role=st.sampled_from(WorkerRole),
        accepting=st.booleans(),
        model_key=st.sampled_from(("m/1", "x")),
        kv_key=st.sampled_from(("a", "b")),
        num_sequences=st.integers(0, 9),
        num_pending_prefill_tokens=st.integers(0, 2000),
        prefill_room_tokens=st.integers(-5, 5),
        kv_usage=st.floats(0, 1),
    ),
    max_size=8,
    unique_by=lambda view: view.worker_id,
)


@given(views, st.sets(st.integers(0, 99).map(str)))
def test_any_decision_can_be_carried_out(view: list[WorkerView], excluded: set[str]) -> None:
    request = replace(REQUEST, excluded=frozenset(excluded))
    decision = choose(request, view)
    by_id = {worker.worker_id: worker for worker in view}
    if decision is None:
        return
    assert can_serve("m/1", view)
    assert decision == choose(request, list(reversed(view)))
    computes = by_id[decision.prefill or decision.decode]
    decodes = by_id[decision.decode]
    assert computes.prefill_room_tokens > 0
    assert compatible(computes, decodes)
    assert (decodes.role is WorkerRole.MIXED) is (decision.prefill is None)
    for chosen_worker in (computes, decodes):
        assert chosen_worker.accepting and chosen_worker.model_key == "m/1"
        assert chosen_worker.worker_id not in excluded
        assert decision.scores[chosen_worker.worker_id] == cost(chosen_worker)
