"""The gated activation in plain torch: in fp32 whatever the dtype, rounded once."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from forebay_kernels.reference.fp8 import quantise_groups


def silu_and_mul(x: Tensor) -> Tensor:
    return _activated(x).to(x.dtype)


def silu_and_mul_quant(x: Tensor, group: int) -> tuple[Tensor, Tensor]:
    return quantise_groups(_activated(x), group)


def _activated(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate.float()).mul_(up)
