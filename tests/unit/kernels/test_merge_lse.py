from __future__ import annotations

import pytest
import torch
from torch import Tensor

from forebay_kernels import native, ops
from forebay_kernels.checks import ArgumentError
from forebay_kernels.testkit import Inputs, error_of, written

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
SHAPES = [(1, 3, 2, 64), (2, 5, 4, 128), (7, 2, 9, 64), (64, 1, 3, 512), (3, 4, 2, 8), (2, 1, 1, 3)]


def exact(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    lse = lses.double().logsumexp(0)
    weights = (lses.double() - lse).exp()
    return (weights[..., None] * outs.double()).sum(0), lse


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_merge_lse(
    implementation: str, shape: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    inputs = Inputs(seed=shape[0])
    outs = inputs.normal(*shape, dtype=dtype)
    lses = inputs.normal(*shape[:3], scale=8.0)
    out, lse = ops.merge_lse(outs, lses)
    expected, expected_lse = exact(outs, lses)
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    assert written(out, lse)
    assert error_of(out, expected).relative < TOLERANCE[dtype]
    assert error_of(lse, expected_lse).largest < 1e-5


def test_attention_over_parts_is_attention_over_all(implementation: str) -> None:
    inputs = Inputs(seed=1)
    scores, values = inputs.normal(6, 48, scale=5.0).double(), inputs.normal(48, 64).double()
    parts = [scores[:, :5], scores[:, 5:40], scores[:, 40:]]
    outs = torch.stack(
        [
            part.softmax(-1) @ rows
            for part, rows in zip(parts, values.split([5, 35, 8]), strict=True)
        ]
    )
    lses = torch.stack([part.logsumexp(-1) for part in parts])
    out, lse = ops.merge_lse(outs.float()[:, :, None], lses.float()[:, :, None])
    assert error_of(out[:, 0], scores.softmax(-1) @ values).relative < 1e-6
    assert error_of(lse[:, 0], scores.logsumexp(-1)).relative < 1e-6


def test_a_part_that_saw_no_key_is_not_looked_at(implementation: str) -> None:
    inputs = Inputs(seed=2)
    outs, lses = inputs.normal(3, 2, 2, 64), inputs.normal(3, 2, 2)
    outs[1, 0], lses[1, 0] = torch.nan, -torch.inf
    outs[:, 1, 1], lses[:, 1, 1] = torch.nan, -torch.inf
    out, lse = ops.merge_lse(outs, lses)
    expected, expected_lse = exact(outs[[0, 2], 0], lses[[0, 2], 0])
    assert error_of(out[0], expected).relative < 1e-6
    assert error_of(lse[0], expected_lse).relative < 1e-6
    assert bool((out[1, 1] == 0.0).all()) and float(lse[1, 1]) == -torch.inf
    assert bool(out[1, 0].isfinite().all())


def test_weights_far_apart_do_not_overflow(implementation: str) -> None:
    outs = torch.stack([torch.full((1, 1, 64), 1.0), torch.full((1, 1, 64), 2.0)])
    out, lse = ops.merge_lse(outs, torch.tensor([[[1000.0]], [[-1000.0]]]))
    assert bool((out == 1.0).all()) and float(lse) == 1000.0


def test_only_the_last_of_many_parts_saw_a_key(implementation: str) -> None:
    outs, lses = torch.full((9, 1, 1, 64), torch.nan), torch.full((9, 1, 1), -torch.inf)
    outs[8], lses[8] = 3.0, -1000.0
    out, lse = ops.merge_lse(outs, lses)
    assert bool((out == 3.0).all()) and float(lse) == -1000.0


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_a_number_is_not_hidden(implementation: str, value: float) -> None:
    outs, lses = torch.ones(2, 2, 1, 64), torch.zeros(2, 2, 1)
    lses[1, 0] = value
    out, lse = ops.merge_lse(outs, lses)
    assert bool(out[0].isnan().all()) and bool(lse[0].isnan().all())
    assert bool((out[1] == 1.0).all())


def test_parts_with_distance_between_them(implementation: str) -> None:
    inputs = Inputs(seed=3)
    outs, lses = inputs.normal(3, 8, 2, 64)[:, 2:5], inputs.normal(3, 8, 2)[:, 2:5]
    for actual, expected in zip(
        ops.merge_lse(outs, lses), ops.merge_lse(outs.contiguous(), lses.contiguous()), strict=True
    ):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("shape", [(2, 0, 4, 64), (2, 4, 0, 64)], ids=str)
def test_no_rows(implementation: str, shape: tuple[int, int, int, int]) -> None:
    out, lse = ops.merge_lse(torch.ones(shape), torch.ones(shape[:3]))
    assert (out.shape, lse.shape) == (shape[1:], shape[1:3])


@pytest.mark.parametrize("order", [1, 2])
def test_no_order_of_threads_changes_a_bit(host_library: native.Library, order: int) -> None:
    inputs = Inputs(seed=5)
    outs, lses = inputs.normal(5, 3, 7, 128), inputs.normal(5, 3, 7)
    expected = ops.merge_lse(outs, lses)
    host_library.order_threads(order)
    for actual, wanted in zip(ops.merge_lse(outs, lses), expected, strict=True):
        assert torch.equal(actual, wanted)


def test_bad_arguments_are_named() -> None:
    outs, lses = torch.ones(2, 3, 4, 64), torch.ones(2, 3, 4)
    with pytest.raises(ArgumentError, match=r"merge_lse: outs: dtype torch.float64 is none"):
        ops.merge_lse(outs.double(), lses)
    with pytest.raises(ArgumentError, match=r"merge_lse: outs: shape \(3, 4, 64\) where"):
        ops.merge_lse(outs[0], lses)
    with pytest.raises(ArgumentError, match=r"merge_lse: outs: 65 parts, not 1 to 64"):
        ops.merge_lse(torch.ones(65, 1, 1, 8), torch.ones(65, 1, 1))
    with pytest.raises(ArgumentError, match=r"merge_lse: outs: 0 parts, not 1 to 64"):
        ops.merge_lse(outs[:0], lses[:0])
    with pytest.raises(ArgumentError, match=r"merge_lse: outs: heads are empty"):
        ops.merge_lse(outs[..., :0], lses)
    with pytest.raises(ArgumentError, match=r"merge_lse: outs: strides .* parts have gaps"):
        ops.merge_lse(outs.transpose(1, 2), lses.transpose(1, 2))
    with pytest.raises(ArgumentError, match=r"merge_lse: outs: does not begin at a multiple"):
        ops.merge_lse(torch.ones(2 * 64 + 1)[1:].view(2, 1, 1, 64), torch.ones(2, 1, 1))
    with pytest.raises(ArgumentError, match=r"merge_lse: lses: dtype torch.float16 is none"):
        ops.merge_lse(outs, lses.half())
    with pytest.raises(ArgumentError, match=r"merge_lse: lses: shape \(2, 3, 2\)"):
        ops.merge_lse(outs, lses[..., :2])
    with pytest.raises(ArgumentError, match=r"merge_lse: lses: strides .* parts have gaps"):
        ops.merge_lse(outs, torch.ones(2, 4, 3).transpose(1, 2))


def test_shapes_alone() -> None:
    out, lse = ops.merge_lse(
        torch.ones(2, 3, 4, 64, device="meta"), torch.ones(2, 3, 4, device="meta")
    )
    assert (out.shape, lse.shape) == ((3, 4, 64), (3, 4))
