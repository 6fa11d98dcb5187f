"""The CPU's tests with torch.ops.forebay on the GPU, and tests/gpu."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from pathlib import Path

import torch

from forebay_kernels.gpu_check.journal import PHASE, Journal, State
from forebay_kernels.gpu_check.machine import REPOSITORY

NAME = "correctness"
MAX_NAMED = 5


def run(journal: Journal, device: torch.device) -> None:
    if device.type == "cuda":
        _pytest(journal, "tests/unit/kernels", "--implementation=cuda")
    _pytest(journal, "tests/gpu", f"--kernel-device={device}")
    failed = any(row.state is State.FAILED for row in journal.of_phase(NAME))
    journal.append(NAME, PHASE, State.FAILED if failed else State.OK)


def _pytest(journal: Journal, folder: str, option: str) -> None:
    """A row for each file. Neither the repository's pytest settings nor its plugins are needed;
    a file that imports what the machine lacks is named and does not count as failed."""
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.xml"
        command = [
            *(sys.executable, "-m", "pytest", folder, option, "-q", "--tb=short"),
            *("-c", "/dev/null", "--rootdir", str(REPOSITORY), "--confcutdir", folder),
            *("-p", "no:cacheprovider", "--continue-on-collection-errors"),
            f"--junit-xml={report}",
        ]
        result = subprocess.run(
            command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        if not report.exists():
            reason = f"pytest: exit status {result.returncode}"
            journal.append(NAME, folder, State.FAILED, reason, output=result.stdout[-3000:])
            return
        record(journal, folder, report)
    print(result.stdout)


def record(journal: Journal, folder: str, report: Path) -> None:
    passed: dict[str, int] = defaultdict(int)
    skipped: dict[str, int] = defaultdict(int)
    failures: dict[str, list[str]] = defaultdict(list)
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        name = (case.get("classname") or case.get("name") or "?").rpartition(".")[2]
        failure, error = case.find("failure"), case.find("error")
        problem = failure if failure is not None else error
        if problem is not None and _lacks_a_module(problem):
            journal.append(
                NAME, f"{folder} {case.get('name')}", State.NOT_AVAILABLE, _text(problem)
            )
        elif problem is not None:
            failures[name].append(f"{case.get('name')}: {_text(problem)}")
        elif case.find("skipped") is not None:
            skipped[name] += 1
        else:
            passed[name] += 1
    for name in sorted({*passed, *skipped, *failures}):
        journal.append(
            NAME,
            f"{folder} {name}",
            State.FAILED if failures[name] else State.OK,
            "; ".join(failures[name][:MAX_NAMED])[:1000],
            passed=passed[name],
            failed=len(failures[name]),
            skipped=skipped[name],
        )


def _lacks_a_module(problem: ElementTree.Element) -> bool:
    """pytest's own words for a file that cannot be imported."""
    return (problem.get("message") or "") == "collection failure" and (
        "ModuleNotFoundError" in (problem.text or "")
    )


def _text(problem: ElementTree.Element) -> str:
    lines = [line for line in (problem.text or "").splitlines() if line.startswith("E ")]
    return (lines[-1][1:].strip() if lines else problem.get("message") or "?")[:300]
