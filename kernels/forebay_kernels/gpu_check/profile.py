"""ncu's account of the case that is furthest from its floor."""

from __future__ import annotations

import re
import subprocess

import torch

from forebay_kernels.gpu_check.journal import PHASE, Journal, Row, State
from forebay_kernels.gpu_check.machine import REPOSITORY, tool
from forebay_kernels.gpu_check.runner import python

NAME = TOOL = "ncu"
SECTIONS = ("SpeedOfLight", "MemoryWorkloadAnalysis", "Occupancy", "LaunchStats", "WarpStateStats")
MAX_CHARACTERS = 12_000


def run(journal: Journal, device: torch.device) -> None:
    worst = worst_row(list(journal.rows().values()))
    if worst is None:
        journal.append(NAME, PHASE, State.FAILED, "no case has a time yet")
    else:
        _profile(journal, worst.name)


def worst_row(rows: list[Row]) -> Row | None:
    """Of the rows with a time: the one with the most time for its floor."""
    timed = [
        row
        for row in rows
        if row.phase.startswith("speed ") and row.state is State.OK and "ours" in row.data
    ]
    return max(
        timed, key=lambda row: row.data["ours"]["seconds"] / row.data["floor_s"], default=None
    )


def _profile(journal: Journal, case: str) -> None:
    command = [
        *(
            tool(TOOL) or TOOL,
            "--clock-control",
            "none",
            "--launch-skip",
            "1",
            "--launch-count",
            "4",
        ),
        *("--kernel-name-base", "mangled", "--kernel-name", "regex:forebay"),
        *(part for section in SECTIONS for part in ("--section", section)),
        *python("forebay_kernels.gpu_check.once", "--full", "--case", case, "--repeat", "3"),
    ]
    result = subprocess.run(
        command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    text = result.stdout[-MAX_CHARACTERS:]
    if re.search(r"ERR_NVGPUCTRPERM|LibraryNotLoaded|No kernels were profiled", text):
        journal.append(NAME, PHASE, State.NOT_AVAILABLE, f"ncu cannot profile {case}", output=text)
    elif result.returncode != 0:
        journal.append(NAME, PHASE, State.FAILED, f"exit status {result.returncode}", output=text)
    else:
        journal.append(NAME, PHASE, State.OK, f"of {case}", output=text)
