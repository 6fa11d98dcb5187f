from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch

import forebay_kernels.gpu_check as package
from forebay_kernels.gpu_check import ceilings, results
from forebay_kernels.gpu_check.cases import all_cases
from forebay_kernels.gpu_check.journal import PHASE, Journal, Key
from forebay_kernels.gpu_check.machine import (
    REPOSITORY,
    device_name,
    driver_version,
    source_hash,
    versions,
)
from forebay_kernels.gpu_check.phases import TOTAL_S, phases, works
from forebay_kernels.gpu_check.runner import run_phases
from forebay_kernels.gpu_check.table import HEADER, case_cells, render

FAILED, NO_GPU = 1, 3


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    device: torch.device = options.device
    if device.type == "cuda" and not torch.cuda.is_available():
        print(
            f"gpu-check: torch {torch.__version__} sees no CUDA device. The kernels compile and are"
            " tested without one (make test); --device cpu rehearses this program.",
            file=sys.stderr,
        )
        return NO_GPU
    key = Key(source_hash(), device_name(device), driver_version(device))
    journal = Journal(options.journal or _default_journal(device), key)
    if options.fresh:
        journal.forget()
    found = versions()
    _say(f"{key.device}, driver {key.driver}; " + ", ".join(f"{n} {v}" for n, v in found.items()))
    wanted = [each for each in phases(journal, device) if each.name in (options.only or works())]
    complete = run_phases(wanted, journal, options.total_s, _say)
    print(report(journal, device))
    if device.type == "cuda":
        today = datetime.now(UTC).date()
        figures = results.merge(results.load(options.results), journal, found, today)
        results.write(options.results, figures)
        _say(f"written: {options.results / results.PAGE}")
    return 0 if complete else FAILED


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m forebay_kernels.gpu_check",
        description=package.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--fresh", action="store_true", help="forget what earlier runs found")
    parser.add_argument("--only", action="append", choices=works(), help="a phase, or several")
    parser.add_argument("--journal", type=Path, help="default: .gpu-check/DEVICE.jsonl")
    parser.add_argument(
        "--results", type=Path, default=results.FOLDER, help="folder of RESULTS.md and RESULTS.json"
    )
    parser.add_argument("--total-s", type=float, default=TOTAL_S, help="what is not reached by then"
                        " is left for the next run")  # fmt: skip
    return parser.parse_args(arguments)


def _default_journal(device: torch.device) -> Path:
    return REPOSITORY / ".gpu-check" / f"{device.type}.jsonl"


def report(journal: Journal, device: torch.device) -> str:
    """What every phase came to, then the benchmark's table."""
    rows = journal.rows()
    phase_rows = [
        (row.phase, row.name or "(whole)", str(row.state), row.reason or _brief(row.data))
        for row in rows.values()
        if not (row.phase.startswith("speed ") and row.name != PHASE and not row.reason)
    ]
    cases = all_cases(tiny=device.type != "cuda")
    timed = {row.name: row.data for row in rows.values() if "ours" in row.data}
    parts = [
        render(("phase", "what", "state", "remark"), phase_rows),
        render(HEADER, [case_cells(case, timed.get(case.name)) for case in cases]),
        ceilings.summary(journal),
    ]
    if device.type != "cuda":
        parts.append("These are no figures of a GPU: tiny shapes on a CPU, against a GPU's floor.")
    return "\n\n".join(parts)


def _brief(data: object) -> str:
    if not isinstance(data, dict):
        return ""
    return ", ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in data.items()
        if isinstance(value, int | float)
    )


def _say(line: str) -> None:
    print(f"gpu-check: {line}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
