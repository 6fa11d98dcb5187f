"""What each phase does, in a process of its own that gpu_check starts."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from forebay_kernels.gpu_check import build_phase, ceilings, correctness, profile, sanitizer, speed
from forebay_kernels.gpu_check.cases import GROUPS
from forebay_kernels.gpu_check.journal import Journal, Key
from forebay_kernels.gpu_check.machine import tool
from forebay_kernels.gpu_check.runner import Phase, python

Work = Callable[[Journal, torch.device], None]

TOTAL_S = 570.0
"""Of ten minutes; the rest is for what a machine does before and after."""


def works() -> dict[str, tuple[float, Work]]:
    """Every phase's deadline in seconds and work, in the order in which they run: what everything
    else needs first, what can be left for a second run last."""
    found: dict[str, tuple[float, Work]] = {
        "build": (150.0, build_phase.run),
        "ceilings": (45.0, ceilings.run),
        "correctness": (150.0, correctness.run),
    }
    for group in GROUPS:
        found[f"speed {group}"] = (90.0, speed.work(group))
    for check in sanitizer.CHECKS:
        found[f"{sanitizer.PREFIX}{check}"] = (75.0, sanitizer.work(check))
    found["ncu"] = (60.0, profile.run)
    return found


def phases(journal: Journal, device: torch.device) -> list[Phase]:
    key = journal.key
    return [
        Phase(
            name,
            deadline_s,
            [
                *python("forebay_kernels.gpu_check.phases", name, "--device", str(device)),
                *("--journal", str(journal.path), "--key", key.source, key.device, key.driver),
            ],
            always=name == build_phase.NAME,
            missing=_missing(name, device),
        )
        for name, (deadline_s, _) in works().items()
    ]


def _missing(name: str, device: torch.device) -> str | None:
    needed = profile.TOOL if name == profile.NAME else sanitizer.tool_of(name)
    if needed is None:
        return None
    if device.type != "cuda":
        return "no GPU"
    return None if tool(needed) else f"{needed} is not installed"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m forebay_kernels.gpu_check.phases")
    parser.add_argument("phase", choices=works())
    parser.add_argument("--device", type=torch.device, required=True)
    parser.add_argument("--journal", type=Path, required=True)
    parser.add_argument("--key", nargs=3, required=True)
    options = parser.parse_args(arguments)
    _, work = works()[options.phase]
    work(Journal(options.journal, Key(*options.key)), options.device)
    return 0


if __name__ == "__main__":
    sys.exit(main())
