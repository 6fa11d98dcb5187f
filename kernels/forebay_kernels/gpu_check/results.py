"""kernels/RESULTS.md: every case of the benchmark, measured or not. Its figures lie beside it in
RESULTS.json, so that a run of some cases leaves the others' rows as they are.

    python -m forebay_kernels.gpu_check.results      writes RESULTS.md anew, without a GPU
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from forebay_kernels.gpu_check.case import BF16_FLOP_PER_S, COPY_BYTES_PER_S, Case
from forebay_kernels.gpu_check.cases import all_cases
from forebay_kernels.gpu_check.journal import Journal, State
from forebay_kernels.gpu_check.machine import PACKAGE
from forebay_kernels.gpu_check.table import HEADER, case_cells, render

FOLDER = PACKAGE.parent
FIGURES, PAGE = "RESULTS.json", "RESULTS.md"

Figures = Mapping[str, Mapping[str, Any]]

_INTRODUCTION = f"""# Kernels on a GPU: what was measured

Written by `make gpu-check` (`docs/kernels.md`); do not edit.

- floor: max(bytes / {COPY_BYTES_PER_S / 1e12:g} TB/s, flops / {BF16_FLOP_PER_S / 1e12:g} TFLOP/s),
  of the fewest bytes and operations that the op needs;
- time: the median of CUDA-graph replays, inputs rotated so that they come from device memory;
- peers: how much longer they take on the same inputs in the same run (`eager`: what cannot be
  captured, its launches count);
- `unmeasured`: nobody has run it.
"""


def load(folder: Path = FOLDER) -> Figures:
    path = folder / FIGURES
    found: Figures = json.loads(path.read_text()) if path.exists() else {}
    return found


def merge(figures: Figures, journal: Journal, versions: Mapping[str, str], today: date) -> Figures:
    """With what this journal has; a case's earlier figures go."""
    merged = dict(figures)
    for row in journal.rows().values():
        if row.phase.startswith("speed ") and row.state is State.OK and "ours" in row.data:
            merged[row.name] = {
                **row.data,
                "date": today.isoformat(),
                "device": journal.key.device,
                "driver": journal.key.driver,
                "versions": dict(versions),
            }
    return merged


def write(folder: Path, figures: Figures) -> None:
    text = json.dumps(dict(sorted(figures.items())), indent=1) + "\n"
    (folder / FIGURES).write_text(text)
    (folder / PAGE).write_text(page(figures, all_cases(tiny=False)))


def page(figures: Figures, cases: Sequence[Case]) -> str:
    rows = []
    for case in cases:
        data = figures.get(case.name)
        when = (data["date"], data["device"], data["driver"]) if data else ("", "", "")
        rows.append((*case_cells(case, data), *when))
    parts = [_INTRODUCTION, render((*HEADER, "date", "device", "driver"), rows) + "\n"]
    stamps = sorted({_stamp(data) for data in figures.values()})
    if stamps:
        parts.append("Measured with:\n" + "".join(f"- {stamp}\n" for stamp in stamps))
    return "\n".join(parts)


def _stamp(data: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in data["versions"].items())
    return f"{data['date']}: {data['device']}, driver {data['driver']}, {versions}"


if __name__ == "__main__":
    write(FOLDER, load())
    sys.exit(0)
