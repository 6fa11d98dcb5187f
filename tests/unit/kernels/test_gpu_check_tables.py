"""Floors, targets, tables and the page of results."""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Any

import pytest

from forebay_kernels.gpu_check import correctness, profile, results, sanitizer, table
from forebay_kernels.gpu_check.case import Case, Target, floor_s
from forebay_kernels.gpu_check.cases import GROUPS, all_cases
from forebay_kernels.gpu_check.journal import Journal, Key, Row, State
from forebay_kernels.gpu_check.timing import num_sets

FULL = all_cases(tiny=False)
NORM = GROUPS["norm"](False)[0]


def _data(seconds: float, floor: float, **peers: float) -> dict[str, Any]:
    return {
        "ours": {"seconds": seconds, "how": "graph"},
        "floor_s": floor,
        "peers": {name: {"seconds": each, "how": "eager"} for name, each in peers.items()},
    }


def test_a_floor_is_that_of_bytes_or_of_operations() -> None:
    assert floor_s(4_300_000, 0) == pytest.approx(1e-6)
    assert floor_s(4_300_000, 790_000_000 * 3) == pytest.approx(3e-6)


@pytest.mark.parametrize(
    ("name", "microseconds"),
    [
        ("add_rms_norm 4096x4096 bf16", 31.2),
        ("add_rms_norm 64x4096 bf16", 0.49),
        ("kv_pack 4096 tokens 32x2x8x128 bf16 block 16 token-major raw", 249.7),
        ("sample B 64 V 131072 fp32 greedy", 7.8),
    ],
)
def test_floors_of_known_shapes(name: str, microseconds: float) -> None:
    (case,) = [case for case in FULL if case.name == name]
    assert case.floor_s * 1e6 == pytest.approx(microseconds, rel=0.01)


def test_every_case_has_a_name_of_its_own() -> None:
    for tiny in (True, False):
        names = [case.name for case in all_cases(tiny)]
        assert len(set(names)) == len(names)
        assert all(case.num_bytes > 0 for case in all_cases(tiny))


def test_every_op_of_the_benchmark_has_tiny_cases() -> None:
    assert {case.op for case in all_cases(tiny=True)} >= {case.op for case in FULL}


@pytest.mark.parametrize("num_bytes", [0, 1_000, 60_000_000, 10**12])
def test_inputs_rotate_past_the_cache(num_bytes: int) -> None:
    sets = num_sets(num_bytes)
    assert 2 <= sets <= 256
    assert sets == 256 or sets * num_bytes >= 180e6


@pytest.mark.parametrize(
    ("target", "seconds", "peers", "verdict"),
    [
        (Target(), 1.0, {}, ""),
        (Target(share=0.9), 1.1, {}, "yes"),
        (Target(share=0.9), 1.2, {}, "no"),
        (Target(seconds=1e-6), 2e-6, {}, "no"),
        (Target(times={"torch": 2}), 1.0, {"torch": 2.0}, "yes"),
        (Target(times={"torch": 2}), 1.0, {"torch": 1.9}, "no"),
        (Target(share=0.5, times={"flashinfer": 1.2}), 1.0, {}, "yes, without flashinfer"),
        (Target(times={"flashinfer": 1.2}), 1.0, {}, "without flashinfer"),
    ],
)
def test_whether_a_target_is_met(
    target: Target, seconds: float, peers: dict[str, float], verdict: str
) -> None:
    data = _data(seconds, 1.0, **peers)
    assert table.met(target, seconds, 1.0, data["peers"]) == verdict


def test_a_row_nobody_has_run_says_so() -> None:
    cells = table.case_cells(NORM, None)
    assert cells[:4] == (
        "add_rms_norm", "4096x4096 bf16", "unmeasured", table.microseconds(NORM.floor_s),
    )  # fmt: skip


def test_a_row_with_figures() -> None:
    data = _data(40e-6, 30e-6, torch=100e-6)
    data["peers"] |= {
        "flashinfer": {"reason": "not available: flashinfer is not installed"},
        "liger": {"reason": "TypeError: too many"},
    }
    assert table.case_cells(NORM, data)[2:] == (
        "40", table.microseconds(NORM.floor_s), "1.33", str(NORM.target), "no",
        "torch eager 100 us (2.50x); flashinfer absent; liger failed: TypeError: too many",
    )  # fmt: skip


def test_a_table_is_aligned() -> None:
    assert table.render(("a", "long"), [("wide cell", "b")]).splitlines() == [
        "| a         | long |",
        "|-----------|------|",
        "| wide cell | b    |",
    ]


def test_the_committed_page_is_what_the_committed_figures_give() -> None:
    """Every case has its row: python -m forebay_kernels.gpu_check.results"""
    page = results.page(results.load(), FULL)
    assert (results.FOLDER / results.PAGE).read_text() == page
    rows = [line for line in page.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + len(FULL)


def _measured(case: Case) -> dict[str, Any]:
    return _data(2 * case.floor_s, case.floor_s, torch=4 * case.floor_s)


def test_a_run_replaces_the_rows_it_measured_and_no_others(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "rows.jsonl", Key("source", "H200", "580"))
    first, second = FULL[:2]
    journal.append("speed norm", first.name, State.OK, **_measured(first))
    journal.append("speed norm", second.name, State.FAILED, "wrong")
    old = {**_measured(second), "date": "2026-01-01", "device": "A", "driver": "B", "versions": {}}
    figures = results.merge({second.name: old}, journal, {"torch": "2.11"}, date(2026, 12, 1))
    results.write(tmp_path, figures)
    assert results.load(tmp_path) == figures
    page = (tmp_path / results.PAGE).read_text()
    (line,) = [
        each
        for each in page.splitlines()
        if f"| {first.shape} " in each and f"| {first.op} " in each
    ]
    assert "| 2.00 " in line and "| 2026-12-01 | H200 " in line
    assert page.count("2026-01-01") == 2 and "2026-12-01: H200, driver 580, torch 2.11" in page
    assert page.count(table.UNMEASURED) == len(FULL) - 2 + 1


@pytest.mark.parametrize(
    ("status", "text", "state"),
    [
        (0, "========= ERROR SUMMARY: 0 errors", State.OK),
        (0, "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", State.OK),
        (86, "========= ERROR SUMMARY: 3 errors", State.FAILED),
        (86, "========= RACECHECK SUMMARY: 1 hazard displayed (1 error)", State.FAILED),
        (1, "Traceback\nAssertionError: wrong", State.FAILED),
        (1, "========= Error: Device not supported. Please refer to ...", State.NOT_AVAILABLE),
    ],
)
def test_what_the_sanitizer_says(status: int, text: str, state: State) -> None:
    assert sanitizer.verdict(status, text)[0] is state


def test_the_worst_case_is_the_one_furthest_from_its_floor() -> None:
    rows = [
        Row("speed norm", "near", State.OK, _data(2.0, 1.0)),
        Row("speed norm", "far", State.OK, _data(9.0, 3.0)),
        Row("speed norm", "wrong", State.FAILED, {}),
        Row("build", "", State.OK, {}),
    ]
    worst = profile.worst_row(rows)
    assert worst is not None and worst.name == "far"
    assert profile.worst_row(rows[2:]) is None


JUNIT = """<testsuites><testsuite>
<testcase classname="tests.unit.kernels.test_norm" name="test_a[1]"/>
<testcase classname="tests.unit.kernels.test_norm" name="test_b">
<failure message="AssertionError: x">def test
E   assert 1 == 2</failure></testcase>
<testcase classname="tests.unit.kernels.test_norm" name="test_c"><skipped message="no"/></testcase>
<testcase classname="" name="tests.unit.kernels.test_engine"><error message="collection failure">
E   ModuleNotFoundError: No module named 'forebay'</error></testcase>
<testcase classname="" name="tests.unit.kernels.test_typo"><error message="collection failure">
E   NameError: name 'x' is not defined</error></testcase>
</testsuite></testsuites>"""


def test_what_pytest_reports_becomes_rows(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    report.write_text(JUNIT)
    journal = Journal(tmp_path / "rows.jsonl", Key("source", "device", "driver"))
    correctness.record(journal, "tests/unit/kernels", report)
    rows = {row.name.rpartition(".")[2].split()[-1]: row for row in journal.of_phase("correctness")}
    norm, typo = rows["test_norm"], rows["test_typo"]
    assert norm.state is State.FAILED and norm.reason == "test_b: assert 1 == 2"
    assert norm.data == {"passed": 1, "failed": 1, "skipped": 1}
    assert rows["test_engine"].state is State.NOT_AVAILABLE
    assert typo.state is State.FAILED
