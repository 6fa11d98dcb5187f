"""Phases under deadlines, and what a later run does not repeat."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from forebay_kernels.gpu_check.journal import PHASE, Journal, Key, State
from forebay_kernels.gpu_check.runner import Phase, run_phases

KEY = Key("source", "device", "driver")

APPEND = """
import sys
from pathlib import Path
from forebay_kernels.gpu_check.journal import Journal, Key, State
journal = Journal(Path(sys.argv[1]), Key("source", "device", "driver"))
"""


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(tmp_path / "folder" / "rows.jsonl", KEY)


def _phase(journal: Journal, name: str, code: str, deadline_s: float = 60.0) -> Phase:
    text = f"import sys\n{code}"
    return Phase(name, deadline_s, [sys.executable, "-c", text, str(journal.path)])


def _says(name: str, state: str) -> str:
    """A process that appends the phase's row by itself, without importing torch."""
    row = {**KEY_FIELDS, "phase": name, "name": "", "state": state, "reason": "", "data": {}}
    return f"open(sys.argv[1], 'a').write({json.dumps(row)!r} + chr(10))"


KEY_FIELDS = {"source": "source", "device": "device", "driver": "driver"}


def _run(phases: list[Phase], journal: Journal, total_s: float = 60.0) -> tuple[bool, list[str]]:
    journal.path.parent.mkdir(exist_ok=True)
    said: list[str] = []
    return run_phases(phases, journal, total_s, said.append), said


def test_what_is_done_is_not_run_again(journal: Journal) -> None:
    phases = [
        _phase(journal, "one", _says("one", "ok")),
        _phase(journal, "two", _says("two", "not available")),
    ]
    assert _run(phases, journal)[0]
    complete, said = _run([_phase(journal, each.name, "sys.exit(9)") for each in phases], journal)
    assert complete
    assert said == ["one: done by an earlier run", "two: done by an earlier run"]


def test_what_failed_is_run_again(journal: Journal) -> None:
    complete, _ = _run([_phase(journal, "one", _says("one", "failed"))], journal)
    assert not complete
    assert _run([_phase(journal, "one", _says("one", "ok"))], journal)[0]


def test_a_phase_that_always_runs(journal: Journal) -> None:
    journal.append("one", PHASE, State.OK)
    phase = _phase(journal, "one", "sys.exit(9)")
    always = Phase(phase.name, phase.deadline_s, phase.command, always=True)
    assert not _run([always], journal)[0]


def test_a_phase_without_end_is_ended_with_all_it_started(journal: Journal) -> None:
    code = (
        "import subprocess, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print('child', child.pid, flush=True)\n"
        "time.sleep(600)"
    )
    complete, _ = _run([_phase(journal, "one", code, deadline_s=1.5)], journal)
    row = journal.rows()["one", PHASE]
    assert not complete and row.state is State.TIMEOUT and row.reason == "no end after 2 s"
    child = int(row.data["output"].split()[1])
    status = Path(f"/proc/{child}/stat")
    assert not status.exists() or status.read_text().split()[2] == "Z"


def test_a_phase_that_breaks_is_told_with_its_last_words(journal: Journal) -> None:
    phases = [
        _phase(journal, "one", "raise ValueError('broken')"),
        _phase(journal, "two", "pass"),
        _phase(journal, "three", _says("three", "ok")),
    ]
    complete, said = _run(phases, journal)
    rows = journal.rows()
    assert not complete
    assert rows["one", PHASE].reason == "exit status 1: ValueError: broken"
    assert rows["two", PHASE].reason == "ended without a word"
    assert rows["three", PHASE].state is State.OK
    assert said[-1].startswith("three: ok after")


def test_phases_that_the_total_does_not_reach_are_left(journal: Journal) -> None:
    complete, said = _run([_phase(journal, "one", _says("one", "ok"))], journal, total_s=0.0)
    assert not complete and said == ["one: no time left; the next run begins here"]
    assert journal.rows() == {}


def test_rows_of_other_sources_devices_and_drivers_do_not_count(journal: Journal) -> None:
    for key in (Key("other", "device", "driver"), Key("source", "device", "newer")):
        Journal(journal.path, key).append("one", PHASE, State.OK)
    assert not journal.done("one")
    journal.append("one", PHASE, State.OK)
    assert journal.done("one")


def test_a_line_cut_short_is_no_row(journal: Journal) -> None:
    journal.append("one", "case", State.OK, seconds=1.5)
    with open(journal.path, "a") as file:
        file.write('{"source": "source", "dev')
    assert [row.data for row in journal.of_phase("one")] == [{"seconds": 1.5}]
    journal.forget()
    assert journal.rows() == {}
