from __future__ import annotations

import pytest
import torch

from forebay_kernels import native, ops, reference
from forebay_kernels.checks import ArgumentError
from forebay_kernels.testkit import Inputs, error_of

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
SHAPES = [(1, 64), (3, 576), (5, 1536), (2, 4096), (1, 7168), (4, 8), (0, 64)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_add_rms_norm(implementation: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    inputs = Inputs(seed=sum(shape))
    x, residual = inputs.normal(*shape, dtype=dtype), inputs.normal(*shape, dtype=dtype, scale=9)
    weight = inputs.normal(shape[1], dtype=dtype)
    out, total = ops.add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(total, x + residual)
    exact = total.double()
    exact = exact / (exact.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    assert error_of(out, exact).relative < TOLERANCE[dtype]
    again = ops.rms_norm(total, weight, 1e-5)
    assert torch.equal(again, out)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 576), (2, 1024), (1, 200)], ids=str)
def test_quantised(implementation: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    inputs = Inputs(seed=7)
    x, weight = inputs.normal(*shape, dtype=dtype), inputs.normal(shape[1], dtype=dtype)
    residual = inputs.normal(*shape, dtype=dtype)
    codes, scales, total = ops.add_rms_norm_quant(x, residual, weight, 1e-5)
    assert torch.equal(total, x + residual)
    assert scales.shape == (shape[0], -(-shape[1] // 128))
    exact = total.double()
    exact = exact / (exact.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    assert error_of(reference.dequantise_groups(codes, scales, 128), exact).relative < 0.04


def test_a_nan_is_not_hidden_by_quantisation(implementation: str) -> None:
    x = torch.ones(2, 256)
    x[1, 200] = torch.nan
    codes, scales, _ = ops.add_rms_norm_quant(x, None, torch.ones(256), 1e-5)
    back = reference.dequantise_groups(codes, scales, 128)
    assert back[0].isfinite().all() and back[1].isnan().all()


def test_rows_with_distance_between_them(implementation: str) -> None:
    inputs = Inputs(seed=3)
    wide, weight = inputs.normal(4, 192), inputs.normal(64)
    assert torch.equal(
        ops.rms_norm(wide[:, 64:128], weight, 1e-5),
        ops.rms_norm(wide[:, 64:128].contiguous(), weight, 1e-5),
    )


@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_no_order_of_threads_changes_a_bit(order: int) -> None:
    host = native.load("host")
    inputs = Inputs(seed=5)
    x, weight = inputs.normal(3, 3072), inputs.normal(3072)
    native.libraries.use("cpu", host)
    try:
        expected = ops.add_rms_norm_quant(x, None, weight, 1e-5)
        host.order_threads(order)
        for actual, wanted in zip(
            ops.add_rms_norm_quant(x, None, weight, 1e-5), expected, strict=True
        ):
            assert torch.equal(actual.view(torch.uint8), wanted.view(torch.uint8))
    finally:
        host.order_threads(0)
        native.libraries.use("cpu", native.load(f"cpu-{native.best_isa()}"))


def test_bad_arguments_are_named() -> None:
    x, weight = torch.ones(2, 64), torch.ones(64)
    with pytest.raises(ArgumentError, match=r"add_rms_norm: weight: dtype torch.bfloat16 is none"):
        ops.add_rms_norm(x, x, weight.bfloat16(), 1e-5)
    with pytest.raises(ArgumentError, match=r"rms_norm: x: shape \(64,\) where"):
        ops.rms_norm(weight, weight, 1e-5)
    with pytest.raises(ArgumentError, match=r"rms_norm: x: strides .*gaps"):
        ops.rms_norm(torch.ones(64, 64).T, weight, 1e-5)
    with pytest.raises(ArgumentError, match=r"rms_norm: x: does not begin at a multiple of 16"):
        ops.rms_norm(torch.ones(65)[1:].view(1, 64), weight, 1e-5)
    with pytest.raises(ArgumentError, match=r"rms_norm: weight: is on meta, not on cpu"):
        ops.rms_norm(x, weight.to("meta"), 1e-5)
    with pytest.raises(ArgumentError, match=r"rms_norm: eps: -1.0 is negative"):
        ops.rms_norm(x, weight, -1.0)


def test_shapes_alone() -> None:
    x, weight = torch.ones(2, 192, device="meta"), torch.ones(192, device="meta")
    codes, scales, total = ops.add_rms_norm_quant(x, x, weight, 1e-5)
    assert (codes.shape, scales.shape, total.shape) == ((2, 192), (2, 2), (2, 192))
