"""Which of the CPU libraries this processor can run."""

from __future__ import annotations

import platform

import torch

_FLAGS = {
    "avx512": ("avx512_f", "avx512_bw", "avx512_cd", "avx512_dq", "avx512_vl"),
    "avx2": ("avx2", "fma3", "f16c", "bmi", "bmi2"),
    "scalar": (),
}
ISAS = tuple(_FLAGS)


def cpu_isas() -> tuple[str, ...]:
    """Of this kind of machine, the best first."""
    return ISAS if platform.machine() in ("x86_64", "AMD64") else ("scalar",)


def best_isa() -> str:
    capabilities = torch.cpu.get_capabilities()
    return next(isa for isa in cpu_isas() if all(capabilities.get(flag) for flag in _FLAGS[isa]))
