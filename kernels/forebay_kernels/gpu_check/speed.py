"""Ours against the floor and against peers, after a look at whether the results are right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

from forebay_kernels import native
from forebay_kernels.build import VARIANTS, build
from forebay_kernels.gpu_check.case import Arguments, Case
from forebay_kernels.gpu_check.cases import GROUPS
from forebay_kernels.gpu_check.journal import PHASE, Journal, State
from forebay_kernels.gpu_check.table import NOT_THERE
from forebay_kernels.gpu_check.timing import Contender, Timing, compare, num_sets
from forebay_kernels.isa import best_isa
from forebay_kernels.testkit import Inputs, poisoned_allocations

OURS = "ours"
BUDGET_S = 1.5
"""For the rounds of one case, all contenders together."""


class Tally(native.Library):
    """Counts the calls that the library does not support and torch computes instead."""

    def __init__(self, variant: str, path: Path) -> None:
        super().__init__(variant, path)
        self.num_calls = 0
        self.refused: set[str] = set()

    def start(self, op: str, stream: int, fields: dict[str, int | float | None]) -> bool:
        supported = super().start(op, stream, fields)
        self.num_calls += 1
        if not supported:
            self.refused.add(op)
        return supported


def tally(device: torch.device) -> Tally:
    """Takes the place of the device's library for the rest of the process."""
    variant = "cuda" if device.type == "cuda" else f"cpu-{best_isa()}"
    library = Tally(variant, build(VARIANTS[variant]))
    native.libraries.use(device.type, library)
    return library


def run_checked(case: Case, inputs: Inputs, library: Tally) -> Arguments:
    """Runs the case once into poisoned outputs. Raises AssertionError when what it gives is wrong,
    or when torch gave it."""
    library.num_calls, library.refused = 0, set()
    arguments = case.inputs(inputs)
    with poisoned_allocations():
        result = case.run(*arguments)
    case.check(arguments, result)
    assert library.num_calls > 0, "no kernel was called"
    assert not library.refused, f"plain torch computed {', '.join(sorted(library.refused))}"
    return arguments


def work(group: str) -> Callable[[Journal, torch.device], None]:
    def run(journal: Journal, device: torch.device) -> None:
        phase = f"speed {group}"
        library = tally(device)
        failed = False
        for case in GROUPS[group](device.type != "cuda"):
            if journal.done(phase, case.name):
                continue
            failed = not _measure(journal, phase, case, device, library) or failed
            if device.type == "cuda":
                torch.cuda.empty_cache()
        journal.append(phase, PHASE, State.FAILED if failed else State.OK)

    return run


def _measure(
    journal: Journal, phase: str, case: Case, device: torch.device, library: Tally
) -> bool:
    inputs = Inputs(seed=torch.seed() % (1 << 31), device=device)
    try:
        sets = [run_checked(case, inputs, library)]
        wanted = num_sets(case.num_bytes) if device.type == "cuda" else 2
        sets += [case.inputs(inputs) for _ in range(wanted - 1)]
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error)[:300]}"
        journal.append(phase, case.name, State.FAILED, reason)
        return False
    contenders, peers = [Contender(OURS, case.run)], {}
    for peer in case.peers:
        missing = peer.missing()
        if missing is None:
            try:
                contenders.append(Contender(peer.name, peer.prepare(), peer.graph))
            except Exception as error:
                missing = f"{type(error).__name__}: {str(error)[:200]}"
        if missing is not None:
            peers[peer.name] = {"reason": NOT_THERE + missing}
    outcome = compare(contenders, sets, device, BUDGET_S)
    ours = outcome.pop(OURS)
    peers |= {name: asdict(found) for name, found in outcome.items()}
    if not isinstance(ours, Timing):
        journal.append(phase, case.name, State.FAILED, ours.reason, peers=peers)
        return False
    journal.append(
        phase, case.name, State.OK, floor_s=case.floor_s, num_sets=len(sets),
        num_bytes=case.num_bytes, num_flops=case.num_flops, ours=asdict(ours), peers=peers,
    )  # fmt: skip
    return True
