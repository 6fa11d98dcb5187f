"""Frequencies of rotary position embeddings."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from forebay.engine.config import (
    FactorScaling,
    LinearScaling,
    Llama3Scaling,
    ModelConfig,
)


def inverse_frequencies(config: ModelConfig) -> Tensor:
    """fp32 [head_dim / 2]: radians a position turns each pair by."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponents
    match config.rope_scaling:
        case None:
            return frequencies
        case LinearScaling(factor):
            return frequencies / factor
        case FactorScaling(factors):
            return frequencies / torch.tensor(factors, dtype=torch.float32)
        case Llama3Scaling() as scaling:
            return _llama3(frequencies, scaling)


def _llama3(frequencies: Tensor, scaling: Llama3Scaling) -> Tensor:
    """Of each frequency the share `kept` stays and the rest is divided by the factor; kept runs
    from 0 to 1 with the turns a pair makes over the original context length."""
    turns = frequencies * scaling.original_max_position / (2 * math.pi)
    width = scaling.high_freq_factor - scaling.low_freq_factor
    kept = ((turns - scaling.low_freq_factor) / width).clamp(0.0, 1.0)
    return frequencies * kept + frequencies / scaling.factor * (1.0 - kept)
