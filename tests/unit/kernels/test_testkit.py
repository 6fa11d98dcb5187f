from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from forebay_kernels import ops
from forebay_kernels.gpu_check.case import Case
from forebay_kernels.gpu_check.cases import all_cases
from forebay_kernels.registry import register
from forebay_kernels.testkit import Inputs, OnDevice, error_of, poisoned_allocations, written


@pytest.fixture(scope="module")
def doubled() -> Iterator[object]:
    """An op that writes into one argument, and beside it where it may not."""

    def run(x: torch.Tensor, out: torch.Tensor, beside: bool) -> torch.Tensor:
        seen.append(x.data_ptr())
        out.copy_(x * 2)
        if beside:
            out.as_strided((1,), (1,), out.storage_offset() + out.numel()).fill_(-1)
        return x.sum()

    seen: list[int] = []
    op = register(
        "testkit_doubled(Tensor x, Tensor(a!) out, bool beside) -> Tensor",
        run,
        lambda x, out, beside: x.new_empty(()),
    )
    op.seen = seen
    return op


def test_tensors_are_copied_there_and_back(doubled) -> None:  # type: ignore[no-untyped-def]
    memory = torch.arange(12.0)
    x, out = memory[2:5], memory[6:9]
    with OnDevice("cpu"):
        total = doubled(x, out, False)
    assert doubled.seen.pop() != x.data_ptr()
    assert total == 9.0
    assert memory.tolist() == [0, 1, 2, 3, 4, 5, 4, 6, 8, 9, 10, 11]


def test_what_is_written_beside_a_tensor_shows(doubled) -> None:  # type: ignore[no-untyped-def]
    memory = torch.zeros(8)
    with OnDevice("cpu"):
        doubled(torch.ones(3), memory[:3], True)
    assert memory.tolist() == [2, 2, 2, -1, 0, 0, 0, 0]


def test_the_bridge_gives_the_bits_of_the_op_itself() -> None:
    inputs = Inputs(seed=1)
    wide, weight = inputs.normal(4, 192, dtype=torch.bfloat16), torch.ones(64).bfloat16()
    rows = wide[:, 64:128]
    expected = ops.add_rms_norm(rows, rows, weight, 1e-5)
    with OnDevice("cpu"):
        actual = ops.add_rms_norm(rows, rows, weight, 1e-5)
    assert all(torch.equal(one, other) for one, other in zip(actual, expected, strict=True))


class _Counting(OnDevice):
    def __init__(self) -> None:
        super().__init__("cpu")
        self.num_ops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.num_ops += func.namespace == "forebay"
        return super().__torch_dispatch__(func, types, args, kwargs)


@pytest.mark.parametrize("case", all_cases(tiny=True), ids=lambda case: case.name)
def test_every_op_crosses_the_bridge(case: Case) -> None:
    arguments = case.inputs(Inputs(seed=2))
    with _Counting() as bridge:
        result = case.run(*arguments)
    assert bridge.num_ops == 1
    case.check(arguments, result)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int32, torch.int64]
)
def test_allocations_are_poisoned(dtype: torch.dtype) -> None:
    with poisoned_allocations():
        out = torch.empty(3, 2, dtype=dtype)
        like = torch.empty_like(out)
    assert not written(out) and not written(like) and not written(out, torch.zeros(2))
    assert written(torch.zeros(3, dtype=dtype))
    clean = torch.empty(0)
    assert written(clean)


def test_errors_are_relative_and_a_nan_is_infinitely_far() -> None:
    exact = torch.tensor([3.0, 4.0], dtype=torch.float64)
    error = error_of(torch.tensor([3.0, 4.5]), exact)
    assert error.relative == pytest.approx(0.1) and error.largest == pytest.approx(0.5)
    assert error_of(torch.tensor([3.0, torch.nan]), exact).relative == float("inf")
    assert error_of(torch.zeros(0), torch.zeros(0)).relative == 0.0
