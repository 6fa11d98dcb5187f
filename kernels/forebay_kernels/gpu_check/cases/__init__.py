"""The benchmark's rows, by op. `tiny` gives the same code paths at sizes that a sanitizer or a CPU
gets through in a moment; otherwise the shapes are those that the targets speak of."""

from __future__ import annotations

from collections.abc import Callable

from forebay_kernels.gpu_check.case import Case
from forebay_kernels.gpu_check.cases import norm

GROUPS: dict[str, Callable[[bool], list[Case]]] = {
    "norm": norm.cases,
}


def all_cases(tiny: bool) -> list[Case]:
    return [case for cases in GROUPS.values() for case in cases(tiny)]
