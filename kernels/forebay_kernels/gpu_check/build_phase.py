"""Compiles what the other phases load."""

from __future__ import annotations

import time

import torch

from forebay_kernels.build import VARIANTS, BuildError, build
from forebay_kernels.gpu_check.journal import PHASE, Journal, State
from forebay_kernels.isa import best_isa

NAME = "build"


def run(journal: Journal, device: torch.device) -> None:
    wanted = [f"cpu-{best_isa()}"] + (["cuda"] if device.type == "cuda" else [])
    failed = False
    for variant in wanted:
        began = time.monotonic()
        try:
            path = build(VARIANTS[variant])
        except BuildError as error:
            failed = True
            journal.append(NAME, variant, State.FAILED, str(error).splitlines()[0], log=str(error))
        else:
            seconds = round(time.monotonic() - began, 2)
            journal.append(NAME, variant, State.OK, seconds=seconds, library=path.name)
    journal.append(NAME, PHASE, State.FAILED if failed else State.OK)
