"""Runs cases once and checks what they give: the program that sanitizers and profilers look at.

python -m forebay_kernels.gpu_check.once [--device cuda] [--full] [--case NAME] [--repeat N]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from forebay_kernels.gpu_check.cases import all_cases
from forebay_kernels.gpu_check.speed import run_checked, tally
from forebay_kernels.testkit import Inputs


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m forebay_kernels.gpu_check.once")
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--full", action="store_true", help="the benchmark's shapes, not tiny ones")
    parser.add_argument("--case", default=None, help="one case's name; otherwise all")
    parser.add_argument("--repeat", type=int, default=1)
    options = parser.parse_args(arguments)
    cases = [
        case
        for case in all_cases(tiny=not options.full)
        if options.case is None or case.name == options.case
    ]
    if not cases:
        parser.error(f"no case is named {options.case!r}")
    library = tally(options.device)
    for case in cases:
        for number in range(options.repeat):
            run_checked(case, Inputs(seed=number, device=options.device), library)
        print(f"{case.name}: right", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
