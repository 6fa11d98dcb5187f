"""The gated activation of an MLP or of experts, with or without quantisation to fp8."""

from __future__ import annotations

import torch
from torch import Tensor

from forebay_kernels import native, reference
from forebay_kernels.checks import FLOATS, ArgumentError, check_aligned, check_tensor
from forebay_kernels.registry import register

FP8_GROUP = 128
"""Neighbouring values of a row that share a scale."""


def _check(op: str, x: Tensor) -> None:
    """Written out, without messages built ahead: it runs once a layer for a few microseconds of
    work."""
    if x.dtype not in FLOATS or x.ndim != 2:
        check_tensor(op, "x", x, dtypes=FLOATS, shape=(None, None), device=x.device)
    width = x.shape[1]
    if width == 0 or width % 2 != 0:
        raise ArgumentError(op, "x", f"rows of {width} are no gate and up")
    if x.stride(1) != 1:
        raise ArgumentError(op, "x", f"strides {x.stride()}: rows have gaps")
    check_aligned(op, "x", x)


def _call(x: Tensor, out: Tensor, scales: Tensor | None) -> bool:
    rows, width = out.shape
    return native.call(
        "silu_and_mul",
        x.device,
        x=x.data_ptr(),
        out=out.data_ptr(),
        scales=None if scales is None else scales.data_ptr(),
        rows=rows,
        width=width,
        x_stride=x.stride(0),
        dtype=native.DTYPE_CODES[x.dtype],
        group=FP8_GROUP,
        num_threads=torch.get_num_threads(),
    )


def _silu_and_mul(x: Tensor) -> Tensor:
    _check("silu_and_mul", x)
    out = x.new_empty(x.shape[0], x.shape[1] // 2)
    if not _call(x, out, None):
        return reference.silu_and_mul(x)
    return out


def _silu_and_mul_meta(x: Tensor) -> Tensor:
    _check("silu_and_mul", x)
    return x.new_empty(x.shape[0], x.shape[1] // 2)


def _silu_and_mul_quant(x: Tensor) -> tuple[Tensor, Tensor]:
    codes, scales = _silu_and_mul_quant_meta(x)
    if not _call(x, codes, scales):
        return reference.silu_and_mul_quant(x, FP8_GROUP)
    return codes, scales


def _silu_and_mul_quant_meta(x: Tensor) -> tuple[Tensor, Tensor]:
    _check("silu_and_mul_quant", x)
    rows, width = x.shape[0], x.shape[1] // 2
    return (
        x.new_empty(rows, width, dtype=torch.float8_e4m3fn),
        x.new_empty(rows, -(-width // FP8_GROUP), dtype=torch.float32),
    )


_SILU_AND_MUL = register("silu_and_mul(Tensor x) -> Tensor", _silu_and_mul, _silu_and_mul_meta)
_SILU_AND_MUL_QUANT = register(
    "silu_and_mul_quant(Tensor x) -> (Tensor, Tensor)",
    _silu_and_mul_quant,
    _silu_and_mul_quant_meta,
)


def silu_and_mul(x: Tensor) -> Tensor:
    """x: [T, 2N], gate then up, rows without gaps: fp32, bf16 or fp16. Returns silu(gate) * up
    [T, N] in x's dtype, computed in fp32 and rounded once; NaN where the gate is -inf. Raises
    ArgumentError."""
    out: Tensor = _SILU_AND_MUL(x)
    return out


def silu_and_mul_quant(x: Tensor) -> tuple[Tensor, Tensor]:
    """As silu_and_mul, before rounding to x's dtype, as fp8: (codes e4m3 [T, N], scales fp32
    [T, ceil(N / 128)]); see reference.quantise_groups. Kernels on a GPU and on a CPU give the same
    codes and scales; plain torch, whose exp rounds differently, may be one code away (and its
    scales a few units in the last place). Raises ArgumentError."""
    out: tuple[Tensor, Tensor] = _SILU_AND_MUL_QUANT(x)
    return out
