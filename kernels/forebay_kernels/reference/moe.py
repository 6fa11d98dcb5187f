"""Mixture of experts around its matrix products, in plain torch.

T tokens each choose K of E experts: T * K choices, numbered token by token. Rows are what a grouped
matrix product reads: the choices sorted by expert, with gaps.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LOWEST = -(2**31)


def moe_route(
    logits: Tensor,
    bias: Tensor | None,
    top_k: int,
    num_groups: int,
    topk_groups: int,
    softmax: bool,
    renormalise: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Scores are sigmoid(logits) or softmax(logits), ranks the scores + bias. A group's rank is the
    sum of its two best (sigmoid) or its best (softmax); of the topk_groups best groups the top_k
    best experts are chosen, best first. A tie goes to the lower id, a NaN ranks below all numbers.
    Weights are the scores without bias, divided by their sum + 1e-20 if wished, times scale."""
    values = logits.float()
    scores = values.softmax(-1) if softmax else values.sigmoid()
    biased = scores if bias is None else scores + bias
    if topk_groups < num_groups:
        biased_groups = biased.unflatten(-1, (num_groups, -1))
        best = _best_first(_ranks(biased_groups))
        two = biased_groups.gather(-1, best[..., :2])
        of_groups = two[..., 0] if softmax or two.shape[-1] == 1 else two[..., 0] + two[..., 1]
        kept = _best_first(_ranks(of_groups))[:, :topk_groups]
        dropped = torch.ones_like(of_groups, dtype=torch.bool).scatter_(1, kept, False)
        ranks = _ranks(biased_groups).masked_fill(dropped[..., None], _LOWEST).flatten(-2)
    else:
        ranks = _ranks(biased)
    ids = _best_first(ranks)[:, :top_k]
    weights = scores.gather(-1, ids)
    if renormalise:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return weights * scale, ids.to(torch.int32)


def _ranks(scores: Tensor) -> Tensor:
    """int32 that order as the scores do, NaN below all but _LOWEST."""
    bits = scores.contiguous().view(torch.int32)
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return ordered.masked_fill(scores.isnan(), _LOWEST + 1)


def _best_first(ranks: Tensor) -> Tensor:
    """Positions; of equals the lower first."""
    return ranks.sort(dim=-1, descending=True, stable=True)[1]


def num_slots(num_choices: int, num_experts: int, multiple: int) -> int:
    """Rows that are enough whatever the choices are."""
    bound = num_choices + min(num_choices, num_experts) * (multiple - 1)
    return bound // multiple * multiple


def moe_align(ids: Tensor, num_experts: int, multiple: int) -> tuple[Tensor, Tensor, Tensor]:
    chosen = ids.flatten().long()
    num_choices = chosen.numel()
    slots = num_slots(num_choices, num_experts, multiple)
    expert = torch.where((chosen >= 0) & (chosen < num_experts), chosen, num_experts)
    counts = expert.new_zeros(num_experts + 1).scatter_add_(0, expert, torch.ones_like(expert))
    padded = (counts[:-1] + multiple - 1) // multiple * multiple
    offsets = torch.cat((counts.new_zeros(1), padded.cumsum(0)))
    sorted_expert, choice = expert.sort(stable=True)
    first = counts.cumsum(0) - counts
    row = torch.arange(num_choices, device=ids.device) - first[sorted_expert]
    row = torch.where(sorted_expert < num_experts, row + offsets[sorted_expert], -1)
    inverse = torch.empty_like(choice).scatter_(0, choice, row)
    order = choice.new_full((slots + 1,), -1)
    order[torch.where(row >= 0, row, slots)] = choice
    return order[:slots].int(), offsets.int(), inverse.int()


def moe_permute(x: Tensor, order: Tensor, top_k: int) -> Tensor:
    tokens = len(x)
    source = x.view(torch.uint8) if x.element_size() == 1 else x
    if tokens == 0:
        return x.new_zeros(len(order), x.shape[1], dtype=source.dtype).view(x.dtype)
    token = torch.div(order, top_k, rounding_mode="floor").long()
    filled = (token >= 0) & (token < tokens)
    rows = source[token.clamp(0, tokens - 1)].masked_fill_(~filled[:, None], 0)
    return rows.view(x.dtype)


def moe_unpermute(y: Tensor, inverse: Tensor, weights: Tensor, shared: Tensor | None) -> Tensor:
    tokens, top_k = weights.shape
    slots = len(y)
    if shared is None:
        total = torch.zeros(tokens, y.shape[1], device=y.device)
    else:
        total = shared.to(torch.float32, copy=True)
    if slots > 0:
        rows = inverse.view(tokens, top_k).long()
        for k in range(top_k):
            row = rows[:, k]
            present = (row >= 0) & (row < slots)
            part = weights[:, k, None] * y[row.clamp(0, slots - 1)].float()
            total = torch.where(present[:, None], total + part, total)
    return total.to(y.dtype)
