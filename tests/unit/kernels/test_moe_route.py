from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from forebay_kernels import native, ops
from forebay_kernels.checks import ArgumentError
from forebay_kernels.isa import best_isa, cpu_isas
from forebay_kernels.testkit import Inputs, error_of

CASES = [
    # tokens, experts, top_k, num_groups, topk_groups
    (9, 256, 8, 8, 4),
    (3, 512, 10, 8, 3),
    (5, 160, 6, 8, 3),
    (4, 64, 6, 1, 1),
    (2, 384, 8, 1, 1),
    (3, 24, 5, 3, 2),
    (2, 36, 4, 12, 2),
    (2, 40, 40, 4, 4),
    (1, 7, 7, 7, 7),
    (2, 32, 3, 32, 5),
    (2, 512, 512, 1, 1),
    (1, 1, 1, 1, 1),
    (0, 64, 4, 8, 2),
]


def exact(
    logits: Tensor, bias: Tensor | None, top_k: int, groups: int, kept: int, scoring: str
) -> tuple[list[list[int]], list[list[float]]]:
    """Ids, and scores of all experts: loops over Python's floats."""
    ids, all_scores = [], []
    for row in logits.double().tolist():
        if scoring == "sigmoid":
            scores = [1.0 / (1.0 + math.exp(-x)) for x in row]
        else:
            powers = [math.exp(x - max(row)) for x in row]
            scores = [power / math.fsum(powers) for power in powers]
        biases = [0.0] * len(row) if bias is None else bias.double().tolist()
        biased = [score + b for score, b in zip(scores, biases, strict=True)]
        size = len(row) // groups
        of_groups = []
        for group in range(groups):
            best = sorted(biased[group * size : (group + 1) * size], reverse=True)
            of_groups.append(sum(best[:2]) if scoring == "sigmoid" else best[0])
        chosen = sorted(range(groups), key=lambda group: (-of_groups[group], group))[:kept]
        candidates = [i for i in range(len(row)) if i // size in chosen]
        ids.append(sorted(candidates, key=lambda i: (-biased[i], i))[:top_k])
        all_scores.append(scores)
    return ids, all_scores


@pytest.mark.parametrize("scoring", ["sigmoid", "softmax"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_float64(
    implementation: str, case: tuple[int, ...], dtype: torch.dtype, scoring: str
) -> None:
    tokens, experts, top_k, groups, kept = case
    inputs = Inputs(seed=sum(case))
    wide = inputs.normal(tokens, experts + 24, dtype=dtype)
    logits = wide[:, 8 : experts + 8]
    bias = inputs.normal(experts, scale=0.1) if scoring == "sigmoid" else None
    weights, ids = ops.moe_route(logits, bias, top_k, groups, kept, scoring, True, 2.5)
    assert weights.shape == ids.shape == (tokens, top_k)
    wanted, scores = exact(logits, bias, top_k, groups, kept, scoring)
    assert ids.tolist() == wanted
    own = torch.tensor(scores, dtype=torch.float64).view(tokens, experts).gather(1, ids.long())
    expected = own / own.sum(-1, keepdim=True) * 2.5
    assert error_of(weights, expected).relative < 1e-6
    raw, again = ops.moe_route(logits, bias, top_k, groups, kept, scoring, False, 1.0)
    assert torch.equal(again, ids) and error_of(raw, own).relative < 1e-6


@pytest.mark.parametrize("scoring", ["sigmoid", "softmax"])
def test_ties_go_to_the_lower_id(implementation: str, scoring: str) -> None:
    logits = Inputs(seed=1).integers(20, 64, low=-1, high=2).float()
    bias = Inputs(seed=2).integers(64, low=0, high=2).float() if scoring == "sigmoid" else None
    _, ids = ops.moe_route(logits, bias, 12, 8, 3, scoring)
    assert ids.tolist() == exact(logits, bias, 12, 8, 3, scoring)[0]
    same = torch.zeros(2, 64)
    assert ops.moe_route(same, None, 9, 4, 2, scoring)[1].tolist() == [list(range(9))] * 2


def test_as_the_router_of_deepseek_v3(implementation: str) -> None:
    config = DeepseekV3Config(
        hidden_size=32, n_routed_experts=256, num_experts_per_tok=8, n_group=8, topk_group=4,
        norm_topk_prob=True, routed_scaling_factor=2.5,
    )  # fmt: skip
    inputs = Inputs(seed=11)
    router = DeepseekV3TopkRouter(config)
    router.weight.data = inputs.normal(256, 32)
    router.e_score_correction_bias.copy_(inputs.normal(256, scale=0.05))
    with torch.no_grad():
        logits, expected, expected_ids = router(inputs.normal(64, 32))
    bias = router.e_score_correction_bias
    weights, ids = ops.moe_route(logits, bias, 8, 8, 4, "sigmoid", True, 2.5)
    expected_ids, by_id = expected_ids.sort(-1)
    ids, own_by_id = ids.sort(-1)
    assert torch.equal(ids.long(), expected_ids)
    torch.testing.assert_close(
        weights.gather(1, own_by_id), expected.gather(1, by_id), rtol=2e-6, atol=0.0
    )


def rows_with_no_numbers(experts: int) -> Tensor:
    nan, inf = math.nan, math.inf
    rows = Inputs(seed=4).normal(8, experts)
    rows[0] = nan
    rows[1, ::3] = nan
    rows[2] = inf
    rows[3] = -inf
    rows[4, 5], rows[4, 6], rows[4, 7] = inf, -inf, nan
    rows[5, : experts - 2] = -inf
    rows[6, 1:] = nan
    rows[7] = rows[7] * 1e38
    return rows


@pytest.mark.parametrize("scoring", ["sigmoid", "softmax"])
@pytest.mark.parametrize("groups", [(1, 1), (8, 2), (8, 8)], ids=str)
def test_whatever_the_logits_ids_are_experts_and_differ(
    implementation: str, groups: tuple[int, int], scoring: str
) -> None:
    logits = rows_with_no_numbers(64)
    bias = Inputs(seed=5).normal(64)
    bias[3], bias[20], bias[40] = math.nan, -math.inf, math.inf
    for own_bias in (None, bias):
        for top_k in (1, 4, 16):
            _, ids = ops.moe_route(logits, own_bias, top_k, *groups, scoring)
            assert bool(((ids >= 0) & (ids < 64)).all())
            assert all(len(set(row)) == top_k for row in ids.tolist())


def test_a_nan_is_chosen_last_and_seen(implementation: str) -> None:
    logits = torch.tensor([[math.nan, -math.inf, 0.0, 3.0], [0.0, math.nan, math.inf, math.nan]])
    weights, ids = ops.moe_route(logits, None, 3, renormalise=False)
    assert ids.tolist() == [[3, 2, 1], [2, 0, 1]]
    assert weights[0].isfinite().all() and weights[0, 2] < 1e-37
    assert weights[1, :2].tolist() == [1.0, 0.5] and weights[1, 2].isnan()
    assert ops.moe_route(logits, None, 3)[0][1].isnan().all()


@pytest.mark.parametrize("scoring", ["sigmoid", "softmax"])
def test_every_kernel_gives_the_same_bits(scoring: str) -> None:
    inputs = Inputs(seed=8)
    logits, bias = inputs.normal(40, 256, scale=3), inputs.normal(256, scale=0.1)
    isas = cpu_isas()[cpu_isas().index(best_isa()) :]
    names = ["host", "host", "host", *(f"cpu-{isa}" for isa in isas)]
    host = native.load("host")
    kept = native.libraries.of("cpu")
    results = []
    try:
        for order, name in enumerate(names):
            native.libraries.use("cpu", native.load(name))
            host.order_threads(order)
            results.append(ops.moe_route(logits, bias, 40, 8, 4, scoring, True, 1.5))
    finally:
        host.order_threads(0)
        native.libraries.use("cpu", kept)
    for weights, ids in results[1:]:
        assert torch.equal(ids, results[0][1])
        assert torch.equal(weights.view(torch.int32), results[0][0].view(torch.int32))


def test_bad_arguments_are_named() -> None:
    logits, bias = torch.zeros(2, 64), torch.zeros(64)
    cases: list[tuple[str, tuple[object, ...]]] = [
        (r"logits: dtype torch.float64 is none of", (logits.double(), None, 4)),
        (r"logits: shape \(64,\) where", (bias, None, 4)),
        (r"logits: strides .* gaps", (torch.zeros(64, 64).T, None, 4)),
        (r"logits: there are no experts", (torch.zeros(2, 0), None, 4)),
        (r"bias: shape \(32,\) where \[64\]", (logits, bias[:32], 4)),
        (r"bias: dtype torch.bfloat16", (logits, bias.bfloat16(), 4)),
        (r"bias: is on meta, not on cpu", (logits, bias.to("meta"), 4)),
        (r"bias: strides", (logits, torch.zeros(128)[::2], 4)),
        (r"num_groups: 7 do not divide 64 experts", (logits, None, 4, 7, 1)),
        (r"num_groups: 0 do not divide", (logits, None, 4, 0, 1)),
        (r"topk_groups: 9 of 8 groups", (logits, None, 4, 8, 9)),
        (r"topk_groups: 0 of 8 groups", (logits, None, 4, 8, 0)),
        (r"top_k: 17 of 16 experts", (logits, None, 17, 8, 2)),
        (r"top_k: 0 of 64 experts", (logits, None, 0)),
        (r"scoring: 'tanh' is none of sigmoid, softmax", (logits, None, 4, 1, 1, "tanh")),
        (r"scale: inf is not finite", (logits, None, 4, 1, 1, "sigmoid", True, math.inf)),
    ]
    for message, arguments in cases:
        with pytest.raises(ArgumentError, match=f"moe_route: {message}"):
            ops.moe_route(*arguments)  # type: ignore[arg-type]


def test_more_than_the_kernels_have_room_for(implementation: str) -> None:
    logits = Inputs(seed=3).normal(2, 1024)
    _, ids = ops.moe_route(logits, None, 4, 64, 8)
    assert ids.tolist() == exact(logits, None, 4, 64, 8, "sigmoid")[0]


def test_shapes_alone() -> None:
    weights, ids = ops.moe_route(torch.empty(5, 64, device="meta"), None, 4)
    assert (weights.shape, weights.dtype) == ((5, 4), torch.float32)
    assert (ids.shape, ids.dtype) == ((5, 4), torch.int32)
