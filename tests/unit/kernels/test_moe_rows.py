from __future__ import annotations

import pytest
import torch
from torch import Tensor

from forebay_kernels import native, ops, reference
from forebay_kernels.checks import ArgumentError
from forebay_kernels.ops import moe
from forebay_kernels.testkit import Inputs, error_of, written

INT = torch.int32


def aligned(
    ids: list[int], experts: int, multiple: int, slots: int
) -> tuple[list[int], list[int], list[int]]:
    """order, offsets and inverse by loops."""
    order, offsets, inverse = [], [0], [-1] * len(ids)
    for expert in range(experts):
        for choice, chosen in enumerate(ids):
            if chosen == expert:
                inverse[choice] = len(order)
                order.append(choice)
        order += [-1] * (-len(order) % multiple)
        offsets.append(len(order))
    assert len(order) <= slots
    return order + [-1] * (slots - len(order)), offsets, inverse


def random_ids(inputs: Inputs, tokens: int, top_k: int, experts: int) -> Tensor:
    rows = [inputs.permutation(experts)[:top_k] for _ in range(tokens)]
    return torch.stack(rows).to(INT) if rows else torch.empty(0, top_k, dtype=INT)


@pytest.mark.parametrize("multiple", [1, 8, 24])
@pytest.mark.parametrize(
    "shape", [(128, 8, 256), (5, 2, 8), (1, 4, 64), (33, 4, 4), (0, 3, 8), (700, 2, 512)], ids=str
)
def test_align(implementation: str, shape: tuple[int, int, int], multiple: int) -> None:
    tokens, top_k, experts = shape
    ids = random_ids(Inputs(seed=sum(shape)), tokens, top_k, experts)
    order, offsets, inverse = ops.moe_align(ids, experts, multiple)
    slots = reference.num_slots(tokens * top_k, experts, multiple)
    wanted = aligned(ids.flatten().tolist(), experts, multiple, slots)
    assert (order.tolist(), offsets.tolist(), inverse.tolist()) == wanted


def test_experts_elsewhere_get_no_row(implementation: str) -> None:
    ids = Inputs(seed=2).integers(90, 4, low=-3, high=40, dtype=INT)
    ids[7, 0], ids[8, 1] = 2**31 - 1, -(2**31)
    order, offsets, inverse = ops.moe_align(ids, 32, 4)
    wanted = aligned(ids.flatten().tolist(), 32, 4, order.numel())
    assert (order.tolist(), offsets.tolist(), inverse.tolist()) == wanted
    order, offsets, inverse = ops.moe_align(torch.full((9, 2), -1, dtype=INT), 4, 16)
    assert bool((order == -1).all()) and bool((inverse == -1).all()) and not offsets.any()


def test_one_expert_with_all_tokens(implementation: str) -> None:
    order, offsets, inverse = ops.moe_align(torch.full((300, 1), 5, dtype=INT), 8, 128)
    assert offsets.tolist() == [0] * 6 + [384] * 3
    assert order[:300].tolist() == inverse.tolist() == list(range(300))
    assert bool((order[300:] == -1).all())


@pytest.mark.parametrize("blocks", [1, 2, 5])
@pytest.mark.parametrize("order", [0, 1, 7])
def test_several_blocks_in_any_order_sort_as_one(
    blocks: int, order: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = Inputs(seed=blocks).integers(1500, 4, low=-1, high=48, dtype=INT)
    monkeypatch.setattr(moe, "CHOICES_OF_ONE_BLOCK", 0)
    monkeypatch.setattr(moe, "MAX_BLOCKS", blocks)
    monkeypatch.setattr(moe, "CHOICES_PER_BLOCK", 1024)
    host, kept = native.load("host"), native.libraries.of("cpu")
    try:
        native.libraries.use("cpu", host)
        host.order_threads(order)
        actual = ops.moe_align(ids, 40, 16)
    finally:
        host.order_threads(0)
        native.libraries.use("cpu", kept)
    for tensor, expected in zip(actual, reference.moe_align(ids, 40, 16), strict=True):
        assert torch.equal(tensor, expected)


def test_every_row_of_order_is_written() -> None:
    inputs = Inputs(seed=1)
    ids = inputs.integers(50, 2, low=-1, high=9, dtype=INT)
    slots = reference.num_slots(100, 8, 16)
    for name in ("host", f"cpu-{native.best_isa()}"):
        order, offsets = inputs.poisoned(slots + 8, dtype=INT), inputs.poisoned(9, dtype=INT)
        inverse = inputs.poisoned(100, dtype=INT)
        assert native.load(name).call(
            "moe_align", ids=ids.data_ptr(), order=order.data_ptr(), offsets=offsets.data_ptr(),
            inverse=inverse.data_ptr(), choices=100, slots=slots, num_experts=8, multiple=16,
            num_blocks=1,
        )  # fmt: skip
        assert written(order[:slots], offsets, inverse)
        assert torch.equal(order[slots:], inputs.poisoned(8, dtype=INT))


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [16, 576, 7168, 100, 3])
def test_permute(implementation: str, width: int, dtype: torch.dtype) -> None:
    inputs = Inputs(seed=width)
    x = inputs.normal(6, width + 32, dtype=dtype)[:, :width]
    order = torch.tensor([3, -1, 0, 11, 7, -5, 10, 1], dtype=INT)
    out = ops.moe_permute(x, order, 2)
    assert out.dtype == dtype and out.shape == (8, width) and out.is_contiguous()
    for row, choice in zip(out, order.tolist(), strict=True):
        expected = torch.zeros(width) if choice < 0 else x[choice // 2].float()
        assert torch.equal(row.float(), expected)


def test_permute_of_nothing(implementation: str) -> None:
    x = torch.ones(0, 64)
    assert ops.moe_permute(x, torch.empty(0, dtype=INT), 2).shape == (0, 64)
    assert not ops.moe_permute(x, torch.full((3,), -1, dtype=INT), 2).any()


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("shape", [(9, 8, 576), (3, 1, 64), (2, 11, 2312), (2, 3, 20)], ids=str)
def test_unpermute(implementation: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    tokens, top_k, width = shape
    inputs = Inputs(seed=sum(shape))
    ids = random_ids(inputs, tokens, top_k, 16)
    ids[1, 0] = -1
    order, _, inverse = ops.moe_align(ids, 16, 4)
    y = inputs.normal(order.numel(), width + 64, dtype=dtype)[:, 64:]
    y[order < 0] = torch.nan
    weights = inputs.uniform(tokens, top_k)
    rows = inverse.view(tokens, top_k).long()
    parts = weights[..., None].double() * y[rows.clamp_min(0)].double()
    exact = parts.masked_fill(rows[..., None] < 0, 0.0).sum(1)
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]
    for shared in (None, inputs.normal(tokens, width, dtype=dtype)):
        out = ops.moe_unpermute(y, inverse, weights, shared)
        total = exact if shared is None else exact + shared.double()
        assert error_of(out, total).relative < tolerance
        assert torch.equal(out, reference.moe_unpermute(y, inverse, weights, shared))


def test_tokens_whose_experts_are_all_elsewhere(implementation: str) -> None:
    weights, inverse = torch.ones(3, 2), torch.full((6,), -1, dtype=INT)
    assert not ops.moe_unpermute(torch.ones(4, 64), inverse, weights).any()
    assert not ops.moe_unpermute(torch.ones(0, 64), inverse, weights).any()
    shared = torch.randn(3, 64)
    out = ops.moe_unpermute(torch.ones(0, 64), inverse, weights, shared)
    assert torch.equal(out, shared) and out.data_ptr() != shared.data_ptr()
    nothing = ops.moe_unpermute(torch.ones(4, 64), inverse[:0], weights[:0])
    assert nothing.shape == (0, 64)


def test_what_is_out_of_range_is_passed_over_by_kernels() -> None:
    """As on a GPU, where nobody looks at ids ahead."""
    inputs = Inputs(seed=6)
    x, order = inputs.normal(2, 64), torch.tensor([4, 1, 2**31 - 1, -(2**31)], dtype=INT)
    inverse = torch.tensor([4, 1, 2**31 - 1, 0], dtype=INT)
    weights = torch.ones(2, 2)
    for name in ("host", f"cpu-{native.best_isa()}"):
        out, total = inputs.poisoned(4, 64), inputs.poisoned(2, 64)
        assert native.load(name).call(
            "moe_permute", x=x.data_ptr(), order=order.data_ptr(), out=out.data_ptr(), tokens=2,
            slots=4, row_bytes=256, x_stride_bytes=256, top_k=2, num_threads=1,
        )  # fmt: skip
        assert torch.equal(out, torch.stack((torch.zeros(64), x[0], *torch.zeros(2, 64))))
        assert native.load(name).call(
            "moe_unpermute", y=out.data_ptr(), inverse=inverse.data_ptr(),
            weights=weights.data_ptr(), out=total.data_ptr(), tokens=2, slots=4, width=64,
            y_stride=64, top_k=2, num_threads=1,
        )  # fmt: skip
        assert torch.equal(total, torch.stack((x[0], torch.zeros(64))))


def test_rows_past_2_to_the_31_elements(implementation: str) -> None:
    inputs = Inputs(seed=31)
    wide = torch.empty(3, 2**30 + 8, dtype=torch.bfloat16)  # pages that nobody touches take nothing
    far = wide[:, :256]
    near = inputs.normal(3, 256, dtype=torch.bfloat16)
    far.copy_(near)
    order = torch.tensor([4, 1, -1, 5], dtype=INT)
    assert torch.equal(ops.moe_permute(far, order, 2), ops.moe_permute(near, order, 2))
    weights, rows = inputs.uniform(2, 2), torch.tensor([2, 0, 1, 2], dtype=INT)
    total = ops.moe_unpermute(far, rows, weights, far[1:])
    assert torch.equal(total, ops.moe_unpermute(near, rows, weights, near[1:]))
    assert torch.equal(ops.silu_and_mul(far), ops.silu_and_mul(near))
    for actual, expected in zip(
        ops.moe_route(far, None, 5), ops.moe_route(near, None, 5), strict=True
    ):
        assert torch.equal(actual, expected)


def test_a_whole_layer(implementation: str) -> None:
    """Route, sort, the experts' products, and back: as a loop over tokens."""
    inputs = Inputs(seed=20)
    tokens, experts, hidden, inner = 13, 8, 32, 16
    x = inputs.normal(tokens, hidden)
    router, gate_up = inputs.normal(experts, hidden), inputs.normal(experts, 2 * inner, hidden)
    down = inputs.normal(experts, hidden, inner)
    weights, ids = ops.moe_route(x @ router.T, None, 3, 4, 2)
    order, offsets, inverse = ops.moe_align(ids, experts, 4)
    rows = ops.moe_permute(x, order, 3)
    y = torch.zeros(order.numel(), hidden)
    for expert in range(experts):
        span = slice(int(offsets[expert]), int(offsets[expert + 1]))
        y[span] = ops.silu_and_mul(rows[span] @ gate_up[expert].T) @ down[expert].T
    out = ops.moe_unpermute(y, inverse, weights, x)
    exact = x.double()
    for token in range(tokens):
        for weight, expert in zip(weights[token].double(), ids[token].tolist(), strict=True):
            gate, up = (gate_up[expert].double() @ x[token].double()).chunk(2)
            inner_values = gate / (1 + (-gate).exp()) * up
            exact[token] += weight * (down[expert].double() @ inner_values)
    assert error_of(out, exact).relative < 1e-5


def test_bad_arguments_are_named() -> None:
    ids, x = torch.zeros(4, 2, dtype=INT), torch.ones(4, 64)
    order, weights, inverse = torch.zeros(8, dtype=INT), torch.ones(4, 2), torch.zeros(8, dtype=INT)
    with pytest.raises(ArgumentError, match=r"moe_align: ids: dtype torch.int64 is none of int32"):
        ops.moe_align(ids.long(), 8, 1)
    with pytest.raises(ArgumentError, match=r"moe_align: ids: strides \(1, 4\): it has gaps"):
        ops.moe_align(ids.view(2, 4).T, 8, 1)
    with pytest.raises(ArgumentError, match=r"moe_align: num_experts: 0 is not in"):
        ops.moe_align(ids, 0, 1)
    with pytest.raises(ArgumentError, match=r"moe_align: multiple: -1 is not in"):
        ops.moe_align(ids, 8, -1)
    with pytest.raises(ArgumentError, match=r"moe_align: ids: 8 choices need .* past int32"):
        ops.moe_align(ids, 8, 2**30)
    with pytest.raises(ArgumentError, match=r"moe_permute: x: dtype torch.int64"):
        ops.moe_permute(ids.long(), order, 2)
    with pytest.raises(ArgumentError, match=r"moe_permute: x: does not begin at a multiple of 16"):
        ops.moe_permute(torch.ones(65)[1:].view(1, 64), order, 8)
    with pytest.raises(ArgumentError, match=r"moe_permute: order: shape \(2, 4\) where \[\*\]"):
        ops.moe_permute(x, order.view(2, 4), 2)
    with pytest.raises(ArgumentError, match=r"moe_permute: order: 8 is out of range: .* 8 choices"):
        ops.moe_permute(x, order + 8, 2)
    with pytest.raises(ArgumentError, match=r"moe_permute: top_k: 0 is not in"):
        ops.moe_permute(x, order, 0)
    with pytest.raises(ArgumentError, match=r"moe_unpermute: inverse: shape \(8,\) where \[4\]"):
        ops.moe_unpermute(x, inverse, weights[:2])
    with pytest.raises(
        ArgumentError, match=r"moe_unpermute: inverse: 4 is out of range: .* 4 rows"
    ):
        ops.moe_unpermute(x, inverse + 4, weights)
    with pytest.raises(ArgumentError, match=r"moe_unpermute: weights: dtype torch.bfloat16"):
        ops.moe_unpermute(x, inverse, weights.bfloat16())
    with pytest.raises(ArgumentError, match=r"moe_unpermute: shared: shape \(3, 64\) where"):
        ops.moe_unpermute(x, inverse, weights, x[:3])
    with pytest.raises(ArgumentError, match=r"moe_unpermute: y: strides .* gaps"):
        ops.moe_unpermute(torch.ones(64, 64).T, inverse, weights)
    with pytest.raises(ArgumentError, match=r"moe_unpermute: weights: is on meta, not on cpu"):
        ops.moe_unpermute(x, inverse, weights.to("meta"))


def test_shapes_alone() -> None:
    ids = torch.empty(4, 2, dtype=INT, device="meta")
    order, offsets, inverse = ops.moe_align(ids, 8, 16)
    assert (order.shape, offsets.shape, inverse.shape) == ((128,), (9,), (8,))
    x = torch.empty(4, 64, device="meta", dtype=torch.bfloat16)
    rows = ops.moe_permute(x, order, 2)
    assert (rows.shape, rows.dtype) == ((128, 64), torch.bfloat16)
    weights = torch.empty(4, 2, device="meta")
    assert ops.moe_unpermute(rows, inverse, weights, x).shape == (4, 64)
