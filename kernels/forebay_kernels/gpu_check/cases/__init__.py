"""The benchmark's rows, by op. `tiny` gives the same code paths at sizes that a sanitizer or a CPU
gets through in a moment; otherwise the shapes are those that the targets speak of."""

from __future__ import annotations

from collections.abc import Callable

from forebay_kernels.gpu_check.case import Case
from forebay_kernels.gpu_check.cases import activation, kv, moe, norm, qkv, sampling

GROUPS: dict[str, Callable[[bool], list[Case]]] = {
    "kv": kv.cases,
    "qkv": qkv.cases,
    "norm": norm.cases,
    "moe": moe.cases,
    "activation": activation.cases,
    "sampling": sampling.cases,
}


def all_cases(tiny: bool) -> list[Case]:
    return [case for cases in GROUPS.values() for case in cases(tiny)]
