"""Every case at tiny shapes under compute-sanitizer's tools."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from typing import Any

import torch

from forebay_kernels.gpu_check.journal import PHASE, Journal, State
from forebay_kernels.gpu_check.machine import REPOSITORY, tool
from forebay_kernels.gpu_check.runner import TAIL_CHARACTERS, python

CHECKS = ("memcheck", "racecheck", "initcheck", "synccheck")
PREFIX = "sanitizer "
TOOL = "compute-sanitizer"
ERROR_STATUS = 86
_NOT_HERE = re.compile(
    r"Device not supported|LibraryNotLoaded|not supported on this|Unable to find"
)
_SUMMARY = re.compile(r"ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard")


def work(name: str) -> Callable[[Journal, torch.device], None]:
    def run(journal: Journal, device: torch.device) -> None:
        result = subprocess.run(
            command(name),
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        state, reason, data = verdict(result.returncode, result.stdout)
        journal.append(f"{PREFIX}{name}", PHASE, state, reason, **data)

    return run


def tool_of(phase: str) -> str | None:
    """What a phase of this name needs."""
    return TOOL if phase.startswith(PREFIX) else None


def command(name: str) -> list[str]:
    """Of our kernels alone: torch's are filtered out, and errors of its own calls to the driver
    (it probes for functions) are not reported."""
    return [
        *(
            tool(TOOL) or TOOL,
            "--tool",
            name,
            "--error-exitcode",
            str(ERROR_STATUS),
            "--print-limit",
            "20",
        ),
        *("--kernel-name", "kns=forebay"),
        *(("--report-api-errors", "no") if name == "memcheck" else ()),
        *python("forebay_kernels.gpu_check.once", "--device", "cuda"),
    ]


def verdict(status: int, text: str) -> tuple[State, str, dict[str, Any]]:
    output = {"output": text[-TAIL_CHARACTERS:]}
    missing = _NOT_HERE.search(text)
    if missing is not None:
        return State.NOT_AVAILABLE, missing[0], output
    summaries = [int(a or b) for a, b in _SUMMARY.findall(text)]
    if not summaries:
        return State.FAILED, f"exit status {status} without a summary", output
    if status != 0 or any(summaries):
        return State.FAILED, f"exit status {status}, {sum(summaries)} errors", output
    return State.OK, "", {"errors": 0}
