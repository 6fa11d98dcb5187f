"""Residual add and RMS norm, with or without quantisation to fp8."""

from __future__ import annotations

import torch
from torch import Tensor

from forebay_kernels import native, reference
from forebay_kernels.checks import FLOATS, check_aligned, check_tensor, require
from forebay_kernels.registry import register

FP8_GROUP = 128
"""Neighbouring values of a row that share a scale."""


def _check(op: str, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> None:
    check_tensor(op, "x", x, dtypes=FLOATS, shape=(None, None), device=x.device)
    width = x.shape[1]
    require(width > 0, op, "x", "rows are empty")
    check_tensor(op, "weight", weight, dtypes=(x.dtype,), shape=(width,), device=x.device)
    require(eps >= 0.0, op, "eps", f"{eps} is negative")
    named = [("x", x), ("weight", weight)]
    if residual is not None:
        shape = (x.shape[0], width)
        check_tensor(op, "residual", residual, dtypes=(x.dtype,), shape=shape, device=x.device)
        named.append(("residual", residual))
    for name, tensor in named:
        require(tensor.stride(-1) == 1, op, name, f"strides {tensor.stride()}: rows have gaps")
        check_aligned(op, name, tensor)


def _call(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    total: Tensor | None,
    out: Tensor,
    scales: Tensor | None,
) -> bool:
    return native.call(
        "add_rms_norm",
        x.device,
        x=x.data_ptr(),
        residual=None if residual is None else residual.data_ptr(),
        weight=weight.data_ptr(),
        total=None if total is None else total.data_ptr(),
        out=out.data_ptr(),
        scales=None if scales is None else scales.data_ptr(),
        rows=x.shape[0],
        width=x.shape[1],
        x_stride=x.stride(0),
        residual_stride=0 if residual is None else residual.stride(0),
        dtype=native.DTYPE_CODES[x.dtype],
        group=FP8_GROUP,
        num_threads=torch.get_num_threads(),
        eps=eps,
    )


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    _check("rms_norm", x, None, weight, eps)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not _call(x, None, weight, eps, None, out, None):
        return reference.rms_norm(x, weight, eps)
    return out


def _add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    _check("add_rms_norm", x, residual, weight, eps)
    out, total = torch.empty(x.shape, dtype=x.dtype, device=x.device), torch.empty_like(x)
    if not _call(x, residual, weight, eps, total, out, None):
        return reference.add_rms_norm(x, residual, weight, eps)
    return out, total


def _add_rms_norm_quant(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    _check("add_rms_norm_quant", x, residual, weight, eps)
    codes, scales, total = _quant_outputs(x)
    if not _call(x, residual, weight, eps, total, codes, scales):
        return reference.add_rms_norm_quant(x, residual, weight, eps, FP8_GROUP)
    return codes, scales, total


def _quant_outputs(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows, width = x.shape
    return (
        torch.empty((rows, width), dtype=torch.float8_e4m3fn, device=x.device),
        torch.empty((rows, -(-width // FP8_GROUP)), dtype=torch.float32, device=x.device),
        torch.empty((rows, width), dtype=x.dtype, device=x.device),
    )


def _rms_norm_meta(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    _check("rms_norm", x, None, weight, eps)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _add_rms_norm_meta(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    _check("add_rms_norm", x, residual, weight, eps)
    return _rms_norm_meta(x, weight, eps), _rms_norm_meta(x, weight, eps)


def _add_rms_norm_quant_meta(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    _check("add_rms_norm_quant", x, residual, weight, eps)
    return _quant_outputs(x)


_RMS_NORM = register(
    "rms_norm(Tensor x, Tensor weight, float eps) -> Tensor", _rms_norm, _rms_norm_meta
)
_ADD_RMS_NORM = register(
    "add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor)",
    _add_rms_norm,
    _add_rms_norm_meta,
)
_ADD_RMS_NORM_QUANT = register(
    "add_rms_norm_quant(Tensor x, Tensor? residual, Tensor weight, float eps)"
    " -> (Tensor, Tensor, Tensor)",
    _add_rms_norm_quant,
    _add_rms_norm_quant_meta,
)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x: [T, N], rows without gaps; weight: [N], same dtype: fp32, bf16 or fp16.

    Returns x / sqrt(mean(x^2) + eps) * weight. Raises ArgumentError.
    """
    out: Tensor = _RMS_NORM(x, weight, eps)
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x, residual: [T, N]. Returns (rms_norm(total), total), total = x + residual rounded to the
    dtype. Raises ArgumentError."""
    out: tuple[Tensor, Tensor] = _ADD_RMS_NORM(x, residual, weight, eps)
    return out


def add_rms_norm_quant(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """As add_rms_norm, the norm as fp8: (codes e4m3 [T, N], scales fp32 [T, ceil(N / 128)], total
    [T, N]); see reference.quantise_groups. Raises ArgumentError."""
    out: tuple[Tensor, Tensor, Tensor] = _ADD_RMS_NORM_QUANT(x, residual, weight, eps)
    return out
