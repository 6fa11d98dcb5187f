"""Residual add and RMS norm, with or without quantisation to fp8."""

from __future__ import annotations

import torch
from torch import Tensor

from forebay_kernels import native, reference
from forebay_kernels.checks import FLOATS, check_aligned, check_tensor, plain, require
from forebay_kernels.registry import register

FP8_GROUP = 128
"""Neighbouring values of a row that share a scale."""


def _check(op: str, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> None:
    if not _is_plain(x, residual, weight, eps):
        _check_each(op, x, residual, weight, eps)


def _is_plain(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> bool:
    shape = x.shape
    return (
        x.dtype in FLOATS
        and len(shape) == 2
        and shape[1:] == weight.shape
        and shape[1] > 0
        and plain(x, x)
        and plain(weight, x)
        and (residual is None or (residual.shape == shape and plain(residual, x)))
        and eps >= 0.0
    )


def _check_each(op: str, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> None:
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
    rows, width = x.shape
    return native.call(
        "add_rms_norm",
        x.device,
        x=x.data_ptr(),
        residual=native.address(residual),
        weight=weight.data_ptr(),
        total=native.address(total),
        out=out.data_ptr(),
        scales=native.address(scales),
        rows=rows,
        width=width,
        x_stride=x.stride(0),
        residual_stride=0 if residual is None else residual.stride(0),
        dtype=native.DTYPE_CODES[x.dtype],
        group=FP8_GROUP,
        num_threads=torch.get_num_threads(),
        eps=eps,
    )


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    _check("rms_norm", x, None, weight, eps)
    out = _rows_like(x)
    if not _call(x, None, weight, eps, None, out, None):
        return reference.rms_norm(x, weight, eps)
    return out


def _add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    _check("add_rms_norm", x, residual, weight, eps)
    out, total = _rows_like(x), _rows_like(x)
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
        _rows_like(x),
    )


def _rows_like(x: Tensor) -> Tensor:
    """Uninitialised, rows one after another whatever lies between those of x."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _rms_norm_meta(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    _check("rms_norm", x, None, weight, eps)
    return _rows_like(x)


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
