"""The conversions of csrc/common/dtypes.cuh against torch: all numbers of 8 and 16 bits, and a
dense sweep of floats."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from forebay_kernels import native

SHORT = [torch.bfloat16, torch.float16, torch.float8_e4m3fn]
_BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float8_e4m3fn: torch.uint8}
E4M3_MAX = 448.0


def _convert(source: Tensor, target: torch.dtype) -> Tensor:
    out = torch.empty(source.shape, dtype=target)
    short = target if source.dtype == torch.float32 else source.dtype
    assert native.load("host").call(
        "host_convert",
        **{"from": source.data_ptr()},
        to=out.data_ptr(),
        count=source.numel(),
        dtype=native.DTYPE_CODES[short],
        to_dtype=int(source.dtype == torch.float32),
    )
    return out


def _floats() -> Tensor:
    """Every sign and exponent, with mantissas at and around every tie of 3, 7 and 10 bits."""
    high = torch.arange(1 << 19, dtype=torch.int64) << 13
    near = torch.tensor([0, 1, 2, 0xFFF, 0x1000, 0x1001, 0x1FFF])
    bits = (high[:, None] | near[None, :]).flatten()
    return (bits - (bits >> 31 << 32)).to(torch.int32).view(torch.float32)


@pytest.mark.parametrize("dtype", SHORT, ids=str)
def test_every_number_is_read_as_torch_reads_it(dtype: torch.dtype) -> None:
    count = 1 << (8 * dtype.itemsize)
    numbers = torch.arange(count).to(_BITS[dtype]).view(dtype)
    expected, actual = numbers.float(), _convert(numbers, torch.float32)
    assert torch.equal(actual.isnan(), expected.isnan())
    kept = ~expected.isnan()
    assert torch.equal(actual.view(torch.int32)[kept], expected.view(torch.int32)[kept])


@pytest.mark.parametrize("dtype", SHORT, ids=str)
def test_floats_are_rounded_as_torch_rounds_them(dtype: torch.dtype) -> None:
    floats = _floats()
    counted = floats
    if dtype == torch.float8_e4m3fn:  # beyond 448 torch gives NaN, a kernel 448
        counted = floats.clamp(-E4M3_MAX, E4M3_MAX)
    expected, actual = counted.to(dtype), _convert(floats, dtype)
    assert torch.equal(actual.float().isnan(), floats.isnan())
    kept = ~floats.isnan()
    assert torch.equal(actual.view(_BITS[dtype])[kept], expected.view(_BITS[dtype])[kept])


@pytest.mark.parametrize("dtype", SHORT, ids=str)
def test_a_number_comes_back_from_a_float(dtype: torch.dtype) -> None:
    numbers = torch.arange(1 << (8 * dtype.itemsize)).to(_BITS[dtype]).view(dtype)
    back = _convert(_convert(numbers, torch.float32), dtype)
    kept = ~numbers.float().isnan()
    assert torch.equal(back.view(_BITS[dtype])[kept], numbers.view(_BITS[dtype])[kept])
