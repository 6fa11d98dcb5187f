"""Runs phases one after another, each in a process of its own, none longer than its deadline."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from forebay_kernels.gpu_check.journal import PHASE, Journal, State

TAIL_CHARACTERS = 1500


@dataclass(frozen=True, slots=True)
class Phase:
    """command: of the process, which appends its own rows, the one of the phase included.
    always: also when the journal has it as done, for what it leaves on the machine. missing: why
    it cannot run here."""

    name: str
    deadline_s: float
    command: Sequence[str]
    always: bool = False
    missing: str | None = None


def run_phases(
    phases: Sequence[Phase],
    journal: Journal,
    total_s: float,
    say: Callable[[str], None],
) -> bool:
    """Whether every phase is done and none has failed. Those that the journal has as done are not
    run again; those that the total does not reach are left for the next run."""
    ends = time.monotonic() + total_s
    complete = True
    for phase in phases:
        if phase.missing is not None:
            journal.append(phase.name, PHASE, State.NOT_AVAILABLE, phase.missing)
            say(f"{phase.name}: not available: {phase.missing}")
            continue
        if journal.done(phase.name) and not phase.always:
            say(f"{phase.name}: done by an earlier run")
            continue
        left = ends - time.monotonic()
        if left < min(phase.deadline_s, 10.0):
            say(f"{phase.name}: no time left; the next run begins here")
            complete = False
            continue
        say(f"{phase.name}: at most {min(phase.deadline_s, left):.0f} s")
        began = time.monotonic()
        _run(phase, min(phase.deadline_s, left), journal)
        row = journal.rows()[phase.name, PHASE]
        seconds = time.monotonic() - began
        say(f"{phase.name}: {row.state} after {seconds:.1f} s {row.reason}".rstrip())
        complete = complete and journal.done(phase.name)
    return complete


def _run(phase: Phase, deadline_s: float, journal: Journal) -> None:
    """Leaves a row of the phase in the journal whatever its process did."""
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            phase.command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status: int | None = process.wait(timeout=deadline_s)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            _end_group(process)
        output.seek(0)
        text = output.read().decode(errors="replace")
    if status is None:
        reason = f"no end after {deadline_s:.0f} s"
        journal.append(phase.name, PHASE, State.TIMEOUT, reason, output=text[-TAIL_CHARACTERS:])
    elif status != 0:
        reason = f"exit status {status}: {_last_line(text)}"
        journal.append(phase.name, PHASE, State.FAILED, reason, output=text[-TAIL_CHARACTERS:])
    elif (phase.name, PHASE) not in journal.rows():
        journal.append(phase.name, PHASE, State.FAILED, "ended without a word")


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """What the phase started, compilers and tools among it, ends with it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no output"


def python(module: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", module, *arguments]
