"""What the tests of qkv_post and mla_post compare with, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from forebay_kernels.testkit import Inputs

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
EPS = 1e-5


def turned(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """float64 of the same rotation, as a product of complex numbers."""
    half = cos.shape[-1]
    out, x = x.double().clone(), x.double()
    first = slice(0, 2 * half, 2) if interleaved else slice(0, half)
    second = slice(1, 2 * half, 2) if interleaved else slice(half, 2 * half)
    angle = torch.complex(cos.double(), sin.double())[:, None]
    product = torch.complex(x[..., first], x[..., second]) * angle
    out[..., first], out[..., second] = product.real, product.imag
    return out


def normed(x: Tensor, weight: Tensor | None) -> Tensor:
    if weight is None:
        return x.double()
    factor = (x.double().square().mean(-1, keepdim=True) + EPS).rsqrt()
    return x.double() * factor * weight.double()


def angles(inputs: Inputs, tokens: int, rotated: int) -> tuple[Tensor, Tensor]:
    angle = inputs.uniform(tokens, rotated // 2, low=-3.0, high=3.0)
    return angle.cos(), angle.sin()
