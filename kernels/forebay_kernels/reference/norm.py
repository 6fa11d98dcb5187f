"""RMS norm in plain torch: sums in fp32 whatever the dtype."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from forebay_kernels.reference.fp8 import quantise_groups


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = x + residual
    return rms_norm(total, weight, eps), total


def add_rms_norm_quant(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, group: int
) -> tuple[Tensor, Tensor, Tensor]:
    total = x.clone() if residual is None else x + residual
    return *quantise_groups(rms_norm(total.float(), weight.float(), eps), group), total
