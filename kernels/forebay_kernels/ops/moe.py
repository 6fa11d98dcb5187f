"""Mixture of experts around its matrix products: choosing experts, sorting tokens by them, and
bringing their outputs back. T tokens, E experts, K of them a token, N values a row."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from forebay_kernels import native, reference
from forebay_kernels.checks import FLOATS, check_aligned, check_tensor, require
from forebay_kernels.registry import register

SCORINGS = ("sigmoid", "softmax")
CHOICES_OF_ONE_BLOCK = 8192
"""More are sorted on a GPU by several blocks, in two launches."""
CHOICES_PER_BLOCK = 2048
MAX_BLOCKS = 128


def _check_route(
    logits: Tensor,
    bias: Tensor | None,
    top_k: int,
    num_groups: int,
    topk_groups: int,
    scoring: str,
    scale: float,
) -> None:
    op = "moe_route"
    dtypes = (torch.float32, torch.bfloat16)
    check_tensor(op, "logits", logits, dtypes=dtypes, shape=(None, None), device=logits.device)
    experts = logits.shape[1]
    require(experts > 0, op, "logits", "there are no experts")
    require(logits.stride(1) == 1, op, "logits", f"strides {logits.stride()}: rows have gaps")
    if bias is not None:
        check_tensor(
            op, "bias", bias, dtypes=(torch.float32,), shape=(experts,), device=logits.device
        )
        require(bias.is_contiguous(), op, "bias", f"strides {bias.stride()}: it has gaps")
    require(
        num_groups > 0 and experts % num_groups == 0,
        op, "num_groups", f"{num_groups} do not divide {experts} experts",
    )  # fmt: skip
    require(
        0 < topk_groups <= num_groups,
        op, "topk_groups", f"{topk_groups} of {num_groups} groups",
    )  # fmt: skip
    candidates = topk_groups * (experts // num_groups)
    require(0 < top_k <= candidates, op, "top_k", f"{top_k} of {candidates} experts")
    require(scoring in SCORINGS, op, "scoring", f"{scoring!r} is none of {', '.join(SCORINGS)}")
    require(math.isfinite(scale), op, "scale", f"{scale} is not finite")


def _moe_route(
    logits: Tensor,
    bias: Tensor | None,
    top_k: int,
    num_groups: int,
    topk_groups: int,
    scoring: str,
    renormalise: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    weights, ids = _moe_route_meta(
        logits, bias, top_k, num_groups, topk_groups, scoring, renormalise, scale
    )
    softmax = scoring == "softmax"
    done = native.call(
        "moe_route",
        logits.device,
        logits=logits.data_ptr(),
        bias=None if bias is None else bias.data_ptr(),
        weights=weights.data_ptr(),
        ids=ids.data_ptr(),
        tokens=logits.shape[0],
        logits_stride=logits.stride(0),
        dtype=native.DTYPE_CODES[logits.dtype],
        num_experts=logits.shape[1],
        top_k=top_k,
        num_groups=num_groups,
        topk_groups=topk_groups,
        softmax=softmax,
        renormalise=renormalise,
        num_threads=torch.get_num_threads(),
        scale=scale,
    )
    if not done:
        return reference.moe_route(
            logits, bias, top_k, num_groups, topk_groups, softmax, renormalise, scale
        )
    return weights, ids


def _moe_route_meta(
    logits: Tensor,
    bias: Tensor | None,
    top_k: int,
    num_groups: int,
    topk_groups: int,
    scoring: str,
    renormalise: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    _check_route(logits, bias, top_k, num_groups, topk_groups, scoring, scale)
    tokens = logits.shape[0]
    return (
        logits.new_empty(tokens, top_k, dtype=torch.float32),
        logits.new_empty(tokens, top_k, dtype=torch.int32),
    )


def _moe_align(ids: Tensor, num_experts: int, multiple: int) -> tuple[Tensor, Tensor, Tensor]:
    order, offsets, inverse = _moe_align_meta(ids, num_experts, multiple)
    choices = ids.numel()
    blocks = 1
    if choices > CHOICES_OF_ONE_BLOCK:
        blocks = min(MAX_BLOCKS, -(-choices // CHOICES_PER_BLOCK))
    workspace = ids.new_empty(blocks * num_experts) if blocks > 1 else None
    done = native.call(
        "moe_align",
        ids.device,
        ids=ids.data_ptr(),
        order=order.data_ptr(),
        offsets=offsets.data_ptr(),
        inverse=inverse.data_ptr(),
        workspace=None if workspace is None else workspace.data_ptr(),
        choices=choices,
        slots=order.numel(),
        num_experts=num_experts,
        multiple=multiple,
        num_blocks=blocks,
    )
    if not done:
        return reference.moe_align(ids, num_experts, multiple)
    return order, offsets, inverse


def _moe_align_meta(ids: Tensor, num_experts: int, multiple: int) -> tuple[Tensor, Tensor, Tensor]:
    op = "moe_align"
    check_tensor(op, "ids", ids, dtypes=(torch.int32,), shape=(None, None), device=ids.device)
    require(ids.is_contiguous(), op, "ids", f"strides {ids.stride()}: it has gaps")
    for name, number in (("num_experts", num_experts), ("multiple", multiple)):
        require(0 < number < 2**31, op, name, f"{number} is not in [1, 2^31)")
    slots = reference.num_slots(ids.numel(), num_experts, multiple)
    require(
        slots + multiple <= 2**31, op, "ids", f"{ids.numel()} choices need {slots} rows, past int32"
    )
    return ids.new_empty(slots), ids.new_empty(num_experts + 1), ids.new_empty(ids.numel())


def _moe_permute(x: Tensor, order: Tensor, top_k: int) -> Tensor:
    out = _moe_permute_meta(x, order, top_k)
    choices = x.shape[0] * top_k
    _check_below(order, choices, "moe_permute", "order", f"{choices} choices")
    done = native.call(
        "moe_permute",
        x.device,
        x=x.data_ptr(),
        order=order.data_ptr(),
        out=out.data_ptr(),
        tokens=x.shape[0],
        slots=order.numel(),
        row_bytes=x.shape[1] * x.element_size(),
        x_stride_bytes=x.stride(0) * x.element_size(),
        top_k=top_k,
        num_threads=torch.get_num_threads(),
    )
    return out if done else reference.moe_permute(x, order, top_k)


def _moe_permute_meta(x: Tensor, order: Tensor, top_k: int) -> Tensor:
    op = "moe_permute"
    dtypes = (*FLOATS, torch.float8_e4m3fn)
    check_tensor(op, "x", x, dtypes=dtypes, shape=(None, None), device=x.device)
    require(x.stride(1) == 1, op, "x", f"strides {x.stride()}: rows have gaps")
    check_aligned(op, "x", x)
    check_tensor(op, "order", order, dtypes=(torch.int32,), shape=(None,), device=x.device)
    require(order.is_contiguous(), op, "order", f"strides {order.stride()}: it has gaps")
    require(0 < top_k < 2**31, op, "top_k", f"{top_k} is not in [1, 2^31)")
    return x.new_empty(order.numel(), x.shape[1])


def _moe_unpermute(y: Tensor, inverse: Tensor, weights: Tensor, shared: Tensor | None) -> Tensor:
    out = _moe_unpermute_meta(y, inverse, weights, shared)
    _check_below(inverse, y.shape[0], "moe_unpermute", "inverse", f"{y.shape[0]} rows")
    done = native.call(
        "moe_unpermute",
        y.device,
        y=y.data_ptr(),
        inverse=inverse.data_ptr(),
        weights=weights.data_ptr(),
        shared=None if shared is None else shared.data_ptr(),
        out=out.data_ptr(),
        tokens=weights.shape[0],
        slots=y.shape[0],
        width=y.shape[1],
        y_stride=y.stride(0),
        shared_stride=0 if shared is None else shared.stride(0),
        dtype=native.DTYPE_CODES[y.dtype],
        top_k=weights.shape[1],
        num_threads=torch.get_num_threads(),
    )
    return out if done else reference.moe_unpermute(y, inverse, weights, shared)


def _moe_unpermute_meta(
    y: Tensor, inverse: Tensor, weights: Tensor, shared: Tensor | None
) -> Tensor:
    op = "moe_unpermute"
    check_tensor(op, "y", y, dtypes=FLOATS, shape=(None, None), device=y.device)
    check_tensor(
        op, "weights", weights, dtypes=(torch.float32,), shape=(None, None), device=y.device
    )
    tokens, top_k = weights.shape
    require(top_k > 0, op, "weights", "tokens have no experts")
    check_tensor(
        op, "inverse", inverse, dtypes=(torch.int32,), shape=(tokens * top_k,), device=y.device
    )
    for name, tensor in (("weights", weights), ("inverse", inverse)):
        require(tensor.is_contiguous(), op, name, f"strides {tensor.stride()}: it has gaps")
    named = [("y", y)]
    if shared is not None:
        shape = (tokens, y.shape[1])
        check_tensor(op, "shared", shared, dtypes=(y.dtype,), shape=shape, device=y.device)
        named.append(("shared", shared))
    for name, tensor in named:
        require(tensor.stride(1) == 1, op, name, f"strides {tensor.stride()}: rows have gaps")
        check_aligned(op, name, tensor)
    return y.new_empty(tokens, y.shape[1])


def _check_below(indices: Tensor, count: int, op: str, argument: str, what: str) -> None:
    """Only on a CPU, where reading them is no wait; on a GPU the kernel passes over such."""
    if indices.device.type == "cpu" and indices.numel() > 0:
        largest = int(indices.max())
        require(largest < count, op, argument, f"{largest} is out of range: there are {what}")


_MOE_ROUTE = register(
    "moe_route(Tensor logits, Tensor? bias, int top_k, int num_groups, int topk_groups,"
    " str scoring, bool renormalise, float scale) -> (Tensor, Tensor)",
    _moe_route,
    _moe_route_meta,
)
_MOE_ALIGN = register(
    "moe_align(Tensor ids, int num_experts, int multiple) -> (Tensor, Tensor, Tensor)",
    _moe_align,
    _moe_align_meta,
)
_MOE_PERMUTE = register(
    "moe_permute(Tensor x, Tensor order, int top_k) -> Tensor", _moe_permute, _moe_permute_meta
)
_MOE_UNPERMUTE = register(
    "moe_unpermute(Tensor y, Tensor inverse, Tensor weights, Tensor? shared) -> Tensor",
    _moe_unpermute,
    _moe_unpermute_meta,
)


def moe_route(
    logits: Tensor,
    bias: Tensor | None,
    top_k: int,
    num_groups: int = 1,
    topk_groups: int = 1,
    scoring: str = "sigmoid",
    renormalise: bool = True,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Chooses top_k experts for every token, as DeepSeek-V3 (sigmoid) and V2 (softmax) do.

    logits: fp32 or bf16 [T, E], rows without gaps; bias: fp32 [E], added to the scores for the
    choice only. Groups are E / num_groups neighbours; num_groups 1 means no groups. What exactly is
    computed: reference.moe_route. Returns (weights fp32 [T, K], ids int32 [T, K], best first).

    Whatever the logits are, the ids of a row are in [0, E) and no two are the same. An infinity is
    a number as any other to sigmoid; a NaN score is chosen last and its weight is NaN (and with
    renormalise all weights of its row). In softmax a NaN, +inf or nothing but -inf makes all scores
    NaN: the lowest ids are chosen. Kernels on a GPU and a CPU give the same bits. Raises
    ArgumentError.
    """
    out: tuple[Tensor, Tensor] = _MOE_ROUTE(
        logits, bias, top_k, num_groups, topk_groups, scoring, renormalise, scale
    )
    return out


def moe_align(ids: Tensor, num_experts: int, multiple: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sorts choices by expert; those of an expert keep their order, and its rows are padded to a
    multiple of `multiple`.

    ids: int32 [T, K]; outside [0, num_experts), as with experts of another rank: no row. Returns
    order int32 [reference.num_slots(...)]: the choice t * K + k in each row, -1 where there is
    none; offsets int32 [num_experts + 1]: each expert's first row, last the rows in use; inverse
    int32 [T * K]: the row of each choice, or -1. Raises ArgumentError.
    """
    out: tuple[Tensor, Tensor, Tensor] = _MOE_ALIGN(ids, num_experts, multiple)
    return out


def moe_permute(x: Tensor, order: Tensor, top_k: int) -> Tensor:
    """x: [T, N] fp32, bf16, fp16 or e4m3, rows without gaps; order: int32 [slots] of moe_align.
    Returns [slots, N]: row i is x[order[i] // top_k], or zeros where order[i] is negative. Raises
    ArgumentError, on a CPU for an order of T * top_k or more too; on a GPU such rows are zeros."""
    out: Tensor = _MOE_PERMUTE(x, order, top_k)
    return out


def moe_unpermute(
    y: Tensor, inverse: Tensor, weights: Tensor, shared: Tensor | None = None
) -> Tensor:
    """y: [slots, N] fp32, bf16 or fp16, rows without gaps; inverse: int32 [T * K] of moe_align;
    weights: fp32 [T, K]; shared: [T, N] in y's dtype, as of an expert that every token uses.

    Returns [T, N] in y's dtype: shared[t] + sum over k of weights[t, k] * y[inverse[t * K + k]],
    added in that order in fp32; a negative inverse contributes nothing. The same bits everywhere.
    Raises ArgumentError, on a CPU for an inverse of `slots` or more too; on a GPU such contribute
    nothing."""
    out: Tensor = _MOE_UNPERMUTE(y, inverse, weights, shared)
    return out
