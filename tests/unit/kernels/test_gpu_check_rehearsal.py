"""The whole of gpu-check on the CPU: the first run on a GPU must not die of a slip of the pen."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from forebay_kernels import ops
from forebay_kernels.gpu_check import correctness, once, results, table
from forebay_kernels.gpu_check.__main__ import NO_GPU, main, report
from forebay_kernels.gpu_check.case import Case, Peer
from forebay_kernels.gpu_check.cases import GROUPS, all_cases
from forebay_kernels.gpu_check.journal import PHASE, Journal, Key
from forebay_kernels.gpu_check.phases import TOTAL_S, phases, works
from forebay_kernels.gpu_check.speed import run_checked, tally
from forebay_kernels.gpu_check.timing import Contender, Failure, Timing, compare
from forebay_kernels.native import libraries
from forebay_kernels.testkit import Inputs

CPU = torch.device("cpu")
TINY = all_cases(tiny=True)
NORM = GROUPS["norm"](True)[0]


@pytest.fixture(autouse=True)
def _library_kept() -> object:
    kept = libraries.of("cpu")
    yield
    libraries.use("cpu", kept)


@pytest.mark.parametrize("case", TINY, ids=lambda case: case.name)
def test_a_case_runs_twice_and_its_check_can_fail(case: Case) -> None:
    library = tally(CPU)
    arguments = run_checked(case, Inputs(seed=3), library)
    result = case.run(*arguments)
    case.check(arguments, result)
    other = case.inputs(Inputs(seed=4))
    with pytest.raises(AssertionError):
        case.check(other, result)


@pytest.mark.parametrize("case", TINY, ids=lambda case: case.name)
def test_what_torch_has_to_say_of_the_same_inputs(case: Case) -> None:
    arguments = case.inputs(Inputs(seed=3))
    for peer in case.peers:
        if peer.module == "torch":
            peer.prepare()(*arguments)


def test_a_case_that_torch_computes_is_no_case() -> None:
    library = tally(CPU)
    libraries.use("cpu", None)
    with pytest.raises(AssertionError, match="no kernel was called"):
        run_checked(NORM, Inputs(seed=3), library)
    arguments = NORM.inputs(Inputs(seed=3))
    refused = dataclasses.replace(
        NORM, run=lambda *_: ops.rms_norm(torch.ones(2, 40_000), torch.ones(40_000), 0.0)
    )
    libraries.use("cpu", library)
    with pytest.raises(AssertionError, match="plain torch computed add_rms_norm"):
        run_checked(
            dataclasses.replace(refused, check=lambda *_: None, inputs=lambda _: arguments),
            Inputs(seed=3),
            library,
        )


def test_contenders_are_timed_in_turn_and_broken_ones_are_told() -> None:
    order: list[str] = []

    def broken(_: int) -> None:
        raise RuntimeError("not in this version")

    found = compare(
        [
            Contender("one", lambda _: order.append("one")),
            Contender("two", lambda _: order.append("two")),
            Contender("three", broken),
        ],
        [(1,), (2,)],
        CPU,
        budget_s=0.0,
    )
    assert isinstance(found["one"], Timing) and found["one"].how == "cpu"
    assert found["one"].rounds == 11 and len(order) == 2 * 2 * 12
    assert found["three"] == Failure("RuntimeError: not in this version")
    assert order[4:12] == ["one", "one", "two", "two", "two", "two", "one", "one"]


def test_an_absent_peer_is_named() -> None:
    assert Peer("x", lambda: print, module="no_such_module").missing() == (
        "no_such_module is not installed"
    )


def test_phases_fit_into_their_ten_minutes_when_nothing_hangs() -> None:
    assert TOTAL_S <= 600
    assert all(deadline_s < TOTAL_S / 3 for deadline_s, _ in works().values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == NO_GPU
    assert "sees no CUDA device" in capsys.readouterr().err


def test_one_case_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert once.main(["--device", "cpu", "--case", TINY[0].name, "--repeat", "2"]) == 0
    assert capsys.readouterr().out == f"{TINY[0].name}: right\n"
    with pytest.raises(SystemExit):
        once.main(["--device", "cpu", "--case", "no such case"])


def test_every_phase_in_this_process(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "rows.jsonl", Key("source", "device", "none"))
    available = {each.name for each in phases(journal, CPU) if each.missing is None}
    for name, (_, work) in works().items():
        if name in available - {correctness.NAME}:
            work(journal, CPU)
            assert journal.done(name), journal.rows()[name, PHASE]
    timed = {row.name for row in journal.rows().values() if "ours" in row.data}
    assert timed == {case.name for case in TINY}
    text = report(journal, CPU)
    assert "no figures of a GPU" in text and table.UNMEASURED + " " not in text


def test_the_command_on_the_cpu_and_then_again(tmp_path: Path) -> None:
    before = (results.FOLDER / results.PAGE).read_bytes()
    journal = tmp_path / "rows.jsonl"
    only = [part for name in ("build", "correctness", "ncu") for part in ("--only", name)]
    command = [
        *(sys.executable, "-m", "forebay_kernels.gpu_check", "--device", "cpu"),
        *("--journal", str(journal), *only),
    ]
    first = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert first.returncode == 0, first.stdout + first.stderr
    assert "ncu: not available: no GPU" in first.stdout
    second = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
    assert "correctness: done by an earlier run" in second.stdout
    states = {row["state"] for row in map(json.loads, journal.read_text().splitlines())}
    assert states == {"ok", "not available"}
    assert (results.FOLDER / results.PAGE).read_bytes() == before
