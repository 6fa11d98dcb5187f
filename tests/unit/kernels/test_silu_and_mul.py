from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from forebay_kernels import native, ops, reference
from forebay_kernels.checks import ArgumentError
from forebay_kernels.isa import best_isa, cpu_isas
from forebay_kernels.testkit import Inputs, error_of, written

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 5e-7, torch.bfloat16: 4e-3, torch.float16: 5e-4}
SHAPES = [(1, 1536), (5, 64), (3, 200), (2, 6144), (4, 12), (2, 7), (0, 64)]


def exact(x: Tensor) -> Tensor:
    gate, up = x.double().chunk(2, -1)
    return gate * gate.sigmoid() * up


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(implementation: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    rows, width = shape
    x = Inputs(seed=sum(shape)).normal(rows, 2 * width + 8, dtype=dtype, scale=4)[:, : 2 * width]
    out = ops.silu_and_mul(x)
    assert out.dtype == dtype and out.shape == shape and out.is_contiguous()
    assert error_of(out, exact(x)).relative < TOLERANCE[dtype]


def test_of_every_bf16_gate(implementation: str) -> None:
    """Element by element. exp's relative error grows with the gate; where that is below -87
    anything as small as 1e-35 is right."""
    gate = torch.arange(2**16).to(torch.int32).to(torch.int16).view(torch.bfloat16).float()
    gate = gate[gate.isfinite()]
    gate = gate[: len(gate) // 256 * 256].view(-1, 256)
    out = ops.silu_and_mul(torch.cat((gate, torch.ones_like(gate)), dim=1)).double()
    expected = gate.double() * gate.double().sigmoid()
    relative = 4e-7 + 1.5e-8 * gate.double().abs().clamp_max(87)
    assert bool(((out - expected).abs() <= relative * expected.abs() + 1e-35).all())


def test_no_numbers_stay_what_they_are(implementation: str) -> None:
    nan, inf = math.nan, math.inf
    gate = torch.tensor([nan, -nan, inf, 1.0, 1.0, 1.0, -1.0, 0.0] * 2)
    up = torch.tensor([1.0, 1.0, 1.0, nan, inf, -inf, inf, inf] * 2)
    for dtype in DTYPES:
        out = ops.silu_and_mul(torch.cat((gate, up))[None].to(dtype))[0, :8].float()
        assert out[[0, 1, 3, 7]].isnan().all()
        assert out[[2, 4, 5, 6]].tolist() == [inf, inf, -inf, -inf]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 1536), (9, 128), (2, 208), (1, 4096), (2, 7)], ids=str)
def test_quantised(implementation: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    rows, width = shape
    x = Inputs(seed=width).normal(rows, 2 * width, dtype=dtype, scale=2)
    codes, scales = ops.silu_and_mul_quant(x)
    assert codes.shape == shape and scales.shape == (rows, -(-width // 128))
    groups = torch.nn.functional.pad(exact(x), (0, -width % 128)).unflatten(-1, (-1, 128))
    torch.testing.assert_close(
        scales.double(), groups.abs().amax(-1) / 448, rtol=1e-6, atol=0.0, check_stride=False
    )
    # A code is off by half its last bit: 2^-4 of the value, or 2^-10 of the scale if subnormal.
    steps = scales.double().repeat_interleave(128, -1)[:, :width]
    error = (reference.dequantise_groups(codes, scales, 128).double() - exact(x)).abs()
    assert bool((error <= exact(x).abs() * (2**-4 + 1e-5) + steps * 2**-10).all())


def test_a_group_of_zeros_and_one_with_a_nan(implementation: str) -> None:
    x = torch.ones(3, 512)
    x[0], x[1, 130], x[2, 300] = 0.0, math.nan, math.inf
    codes, scales = ops.silu_and_mul_quant(x)
    back = reference.dequantise_groups(codes, scales, 128)
    assert not back[0].any() and scales[0].isfinite().all()
    assert back[1, :128].isfinite().all() and back[1, 128:].isnan().all()
    assert back[2, :128].isnan().any() or scales[2, 0].isnan()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1536, 208])
def test_every_kernel_gives_the_same_bits(dtype: torch.dtype, width: int) -> None:
    """And all of them, in any order of threads."""
    inputs = Inputs(seed=9)
    x = inputs.normal(5, 2 * width, dtype=dtype, scale=6)
    common = {
        "x": x.data_ptr(), "rows": 5, "width": width, "x_stride": 2 * width, "group": 128,
        "dtype": native.DTYPE_CODES[dtype], "num_threads": 2,
    }  # fmt: skip
    results = []
    host = native.load("host")
    isas = cpu_isas()[cpu_isas().index(best_isa()) :]
    twins = [native.load(f"cpu-{isa}") for isa in isas]
    try:
        for order, library in enumerate([host, host, host, *twins]):
            host.order_threads(order)
            out = inputs.poisoned(5, width, dtype=dtype)
            codes = inputs.poisoned(5, width, dtype=torch.uint8)
            scales = inputs.poisoned(5, -(-width // 128))
            assert library.call("silu_and_mul", out=out.data_ptr(), **common)
            assert library.call(
                "silu_and_mul", out=codes.data_ptr(), scales=scales.data_ptr(), **common
            )
            assert written(out, scales)
            results.append((out, codes, scales))
    finally:
        host.order_threads(0)
    for result in results[1:]:
        for actual, expected in zip(result, results[0], strict=True):
            assert torch.equal(actual.view(torch.uint8), expected.view(torch.uint8))
    assert error_of(results[0][0], exact(x)).relative < TOLERANCE[dtype]


def test_bad_arguments_are_named() -> None:
    for op, name in (
        (ops.silu_and_mul, "silu_and_mul"),
        (ops.silu_and_mul_quant, "silu_and_mul_q"),
    ):
        with pytest.raises(ArgumentError, match=rf"{name}\w*: x: dtype torch.float64 is none"):
            op(torch.ones(2, 64, dtype=torch.float64))
        with pytest.raises(ArgumentError, match=rf"{name}\w*: x: shape \(64,\) where"):
            op(torch.ones(64))
        with pytest.raises(ArgumentError, match=rf"{name}\w*: x: rows of 63 are no gate and up"):
            op(torch.ones(2, 63))
        with pytest.raises(ArgumentError, match=rf"{name}\w*: x: rows of 0 are"):
            op(torch.ones(2, 0))
        with pytest.raises(ArgumentError, match=rf"{name}\w*: x: strides .* gaps"):
            op(torch.ones(64, 64).T)
        with pytest.raises(ArgumentError, match=rf"{name}\w*: x: does not begin at a multiple"):
            op(torch.ones(65)[1:].view(1, 64))


def test_shapes_alone() -> None:
    x = torch.empty(3, 400, device="meta", dtype=torch.bfloat16)
    codes, scales = ops.silu_and_mul_quant(x)
    assert (codes.shape, codes.dtype) == ((3, 200), torch.float8_e4m3fn)
    assert (scales.shape, scales.dtype) == ((3, 2), torch.float32)
    assert ops.silu_and_mul(x).shape == (3, 200)
