"""Whether counts follow a distribution."""

from __future__ import annotations

import torch
from torch import Tensor

RARE = 10.0
"""Outcomes expected fewer times than this count as one."""


def chi_square_p_value(counts: Tensor, probabilities: Tensor) -> float:
    """How often counts of that many draws from `probabilities` (fp64, sum 1) would be as far off as
    these, or further; 0 when something impossible was drawn. Pearson's test."""
    expected = probabilities * counts.sum()
    if bool(counts[expected == 0.0].any()):
        return 0.0
    rare = expected < RARE
    observed = torch.cat((counts[~rare].double(), counts[rare].sum().double()[None]))
    wanted = torch.cat((expected[~rare], expected[rare].sum()[None]))
    observed, wanted = observed[wanted > 0.0], wanted[wanted > 0.0]
    statistic = ((observed - wanted).square() / wanted).sum()
    degrees = torch.tensor(len(wanted) - 1, dtype=torch.float64)
    return float(torch.special.gammaincc(degrees / 2, statistic / 2)) if len(wanted) > 1 else 1.0
