"""How fast this device copies and multiplies, beside the figures that floors are made of."""

from __future__ import annotations

import torch
from torch import Tensor

from forebay_kernels.gpu_check.case import BF16_FLOP_PER_S, COPY_BYTES_PER_S, Arguments
from forebay_kernels.gpu_check.journal import PHASE, Journal, State
from forebay_kernels.gpu_check.timing import Contender, Failure, Timing, compare
from forebay_kernels.testkit import Inputs

NAME = "ceilings"
COPY, PRODUCT = "device copy", "bf16 product"


def run(journal: Journal, device: torch.device) -> None:
    large = device.type == "cuda"
    copied = (4 << 30) if large else (1 << 20)
    side = 8192 if large else 128
    inputs = Inputs(seed=1, device=device)
    source = inputs.integers(copied // 4, low=0, high=1 << 30, dtype=torch.int32)
    copy = _seconds(Contender(COPY, _copy), (torch.empty_like(source), source), device)
    _record(journal, COPY, 2 * copied, copy, COPY_BYTES_PER_S)
    factors = tuple(inputs.normal(side, side, dtype=torch.bfloat16) for _ in range(2))
    product = _seconds(Contender(PRODUCT, torch.matmul), factors, device)
    _record(journal, PRODUCT, 2 * side**3, product, BF16_FLOP_PER_S)
    journal.append(NAME, PHASE, State.OK)


def _copy(target: Tensor, source: Tensor) -> None:
    target.copy_(source)


def _seconds(contender: Contender, arguments: Arguments, device: torch.device) -> Timing | Failure:
    return compare([contender], [arguments] * 4, device, budget_s=2.0)[contender.name]


def _record(
    journal: Journal, name: str, amount: int, timing: Timing | Failure, assumed: float
) -> None:
    if isinstance(timing, Timing):
        journal.append(
            NAME, name, State.OK, per_second=amount / timing.seconds, floors_assume=assumed
        )
    else:
        journal.append(NAME, name, State.FAILED, timing.reason)


def summary(journal: Journal) -> str:
    rows = {row.name: row.data for row in journal.of_phase(NAME) if row.state is State.OK}
    copy, product = (_tera(rows.get(name, {}).get("per_second")) for name in (COPY, PRODUCT))
    return (
        f"Ceilings measured here: copy {copy}B/s (floors take {_tera(COPY_BYTES_PER_S)}B/s), bf16"
        f" product {product}FLOP/s (floors take {_tera(BF16_FLOP_PER_S)}FLOP/s)"
    )


def _tera(value: float | None) -> str:
    return "unmeasured " if value is None else f"{value / 1e12:.4g} T"
