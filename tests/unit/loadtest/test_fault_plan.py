from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forebay.core.errors import ConfigurationError
from forebay_loadtest.chaos_run import next_fault
from forebay_loadtest.fault_plan import ONCE, SHARES, SLOW, Act, FaultKind, Target, plan_faults

PREFILL_KILL = FaultKind(Target.PREFILL, Act.KILL)
DECODE_KILL = FaultKind(Target.DECODE, Act.KILL)
GATEWAY_KILL = FaultKind(Target.GATEWAY, Act.KILL)
VALKEY_KILL = FaultKind(Target.VALKEY, Act.KILL)
GCS_KILL = FaultKind(Target.GCS, Act.KILL)
RAYLET_KILL = FaultKind(Target.RAYLET, Act.KILL)
PREFILL_SCALE = FaultKind(Target.PREFILL, Act.SCALE)


@given(st.integers(1, 500), st.integers(0, 1000))
def test_a_plan_has_as_many_faults_as_asked_for(num_faults: int, seed: int) -> None:
    plan = plan_faults(num_faults, seed)
    assert len(plan) == num_faults
    assert plan == plan_faults(num_faults, seed)


@pytest.mark.parametrize("num_faults", [60, 200])
def test_every_kind_is_there_and_the_common_ones_more_often(num_faults: int) -> None:
    counts = Counter(plan_faults(num_faults, seed=3))
    assert counts.keys() == {*SHARES, ONCE}
    assert counts[ONCE] == 1
    assert counts[DECODE_KILL] > counts[GATEWAY_KILL] > counts[RAYLET_KILL]


def test_what_takes_too_long_is_left_out() -> None:
    plan = plan_faults(60, seed=3, without=SLOW)
    assert len(plan) == 60
    assert set(plan) == {*SHARES} - SLOW


def test_seeds_give_different_orders() -> None:
    assert plan_faults(60, seed=1) != plan_faults(60, seed=2)


def test_a_small_plan_repeats_nothing() -> None:
    assert len(set(plan_faults(len(SHARES), seed=0))) == len(SHARES)


def test_only_what_is_wanted() -> None:
    assert plan_faults(3, 0, ["decode kill", "gcs kill"]) == [DECODE_KILL, GCS_KILL, DECODE_KILL]
    with pytest.raises(ConfigurationError, match="no such fault: decode tickle"):
        plan_faults(3, 0, ["decode tickle"])


def test_one_fault_at_a_time_in_a_group() -> None:
    waiting = [PREFILL_KILL, DECODE_KILL]
    assert next_fault(waiting, []) == PREFILL_KILL
    assert next_fault(waiting, [PREFILL_KILL]) == DECODE_KILL
    assert next_fault(waiting, [PREFILL_KILL, DECODE_KILL]) is None
    assert next_fault([VALKEY_KILL], [GATEWAY_KILL]) is None


def test_nothing_goes_beside_a_new_head_or_past_it() -> None:
    assert next_fault([DECODE_KILL], [RAYLET_KILL]) is None
    assert next_fault([RAYLET_KILL, DECODE_KILL], [PREFILL_KILL]) is None
    assert next_fault([RAYLET_KILL, DECODE_KILL], []) == RAYLET_KILL
    assert next_fault([GCS_KILL], [ONCE]) is None


def test_the_control_store_may_go_while_workers_are_replaced_but_not_scaled() -> None:
    assert next_fault([GCS_KILL], [PREFILL_KILL, DECODE_KILL, GATEWAY_KILL]) == GCS_KILL
    assert next_fault([GCS_KILL, GCS_KILL], [GCS_KILL]) is None
    assert next_fault([GCS_KILL, DECODE_KILL], [PREFILL_SCALE]) == DECODE_KILL
    assert next_fault([PREFILL_SCALE], [GCS_KILL]) is None


def test_only_a_gateway_that_is_lost_may_lose_streams() -> None:
    assert {kind.name for kind in SHARES if kind.may_lose} == {
        "gateway kill",
        "gateway stop",
        "gateway drain",
    }
