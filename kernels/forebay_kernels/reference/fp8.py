"""Groups of numbers as e4m3 codes with a scale."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

E4M3_MAX = 448.0
SMALLEST_LARGEST = 2.0**-110
"""A group's largest magnitude counts as no smaller than this, so that 448 / largest is finite."""


def quantise_groups(x: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """x: fp32 [..., N] -> (e4m3 [..., N], fp32 scales [..., ceil(N / group)]).

    `group` neighbours share the scale largest magnitude / 448; values are multiplied by
    448 / largest and rounded to the nearest code, ties to even; each operation rounds as fp32. A
    group with an infinity or a NaN has a scale of NaN.
    """
    width = x.shape[-1]
    groups = F.pad(x, (0, -width % group)).unflatten(-1, (-1, group))
    largest = groups.abs().amax(-1)
    finite = largest.isfinite()
    largest = largest.clamp_min(SMALLEST_LARGEST)
    scales = torch.where(finite, largest / E4M3_MAX, torch.nan)
    # A number over a tensor would be its reciprocal times the number, rounded twice.
    inverse = torch.where(finite, torch.full_like(largest, E4M3_MAX) / largest, 0.0)
    codes = (groups * inverse[..., None]).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return codes.flatten(-2)[..., :width].contiguous(), scales


def dequantise_groups(codes: Tensor, scales: Tensor, group: int) -> Tensor:
    """fp32 [..., N] of what `quantise_groups` gave."""
    width = codes.shape[-1]
    return codes.float() * scales.repeat_interleave(group, -1)[..., :width]
