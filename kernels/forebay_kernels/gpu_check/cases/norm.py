"""add_rms_norm, with and without quantisation to fp8."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from forebay_kernels import ops, reference
from forebay_kernels.gpu_check.case import Arguments, Case, Peer, Target, dtype_name, imported
from forebay_kernels.testkit import Inputs, error_of, written

_EPS = 1e-5
_TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}


def cases(tiny: bool) -> list[Case]:
    shapes = [(5, 520), (3, 4096)] if tiny else [(4096, 4096), (64, 4096), (4096, 7168)]
    dtypes = [torch.bfloat16, torch.float32, torch.float16] if tiny else [torch.bfloat16]
    return [
        make(rows, width, dtype)
        for rows, width in shapes
        for dtype in dtypes
        for make in (_add_rms_norm, _add_rms_norm_quant)
    ]


def _inputs(rows: int, width: int, dtype: torch.dtype) -> Callable[[Inputs], Arguments]:
    def draw(inputs: Inputs) -> Arguments:
        x, residual = (inputs.normal(rows, width, dtype=dtype) for _ in range(2))
        return x, residual, inputs.normal(width, dtype=dtype), _EPS

    return draw


def _exact(arguments: Arguments) -> tuple[Tensor, Tensor]:
    x, residual, weight, eps = arguments
    total = x + residual
    wide = total.double()
    factor = (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
    return wide * factor * weight.double(), total


def _check(arguments: Arguments, result: Any) -> None:
    out, total = result
    exact, wanted_total = _exact(arguments)
    assert written(out, total)
    assert torch.equal(total, wanted_total), "total is not x + residual"
    error = error_of(out, exact)
    assert error.relative < _TOLERANCE[out.dtype], str(error)


def _check_quant(arguments: Arguments, result: Any) -> None:
    codes, scales, total = result
    exact, wanted_total = _exact(arguments)
    assert written(scales, total)
    assert torch.equal(total, wanted_total), "total is not x + residual"
    error = error_of(reference.dequantise_groups(codes, scales, 128), exact)
    assert error.relative < 0.04, str(error)


def _add_rms_norm(rows: int, width: int, dtype: torch.dtype) -> Case:
    large = rows * width >= 1 << 22
    return Case(
        op="add_rms_norm",
        shape=f"{rows}x{width} {dtype_name(dtype)}",
        num_bytes=(4 * rows * width + width) * dtype.itemsize,
        inputs=_inputs(rows, width, dtype),
        run=ops.add_rms_norm,
        check=_check,
        target=Target(share=0.9, times={"flashinfer": 1.2}) if large else Target(),
        peers=(
            Peer("torch", lambda: _torch_add_rms_norm),
            Peer("flashinfer", _flashinfer, module="flashinfer"),
            Peer("liger", _liger, module="liger_kernel"),
        ),
    )


def _add_rms_norm_quant(rows: int, width: int, dtype: torch.dtype) -> Case:
    size = dtype.itemsize
    groups = -(-width // 128)
    return Case(
        op="add_rms_norm_quant",
        shape=f"{rows}x{width} {dtype_name(dtype)}",
        num_bytes=rows * width * (3 * size + 1) + width * size + rows * groups * 4,
        inputs=_inputs(rows, width, dtype),
        run=ops.add_rms_norm_quant,
        check=_check_quant,
        target=Target(share=0.9) if rows * width >= 1 << 22 else Target(),
        peers=(Peer("torch", lambda: _torch_add_rms_norm_quant),),
    )


def _torch_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Any:
    total = x + residual
    return F.rms_norm(total, weight.shape, weight, eps), total


def _torch_add_rms_norm_quant(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Any:
    return reference.add_rms_norm_quant(x, residual, weight, eps, 128)


def _flashinfer() -> Callable[..., Any]:
    """In place: the same bytes, though its inputs change from call to call."""
    return imported("flashinfer.norm", "fused_add_rmsnorm")


def _liger() -> Callable[..., Any]:
    return imported("liger_kernel.transformers.functional", "liger_fused_add_rms_norm")
