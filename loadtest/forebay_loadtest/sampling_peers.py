"""Other ways to draw a token on a CPU, to measure ours against."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from forebay.core.sampling import SamplingParams

Method = Callable[[Tensor, Sequence[SamplingParams]], list[int]]
"""logits fp32 [R, vocabulary] and the parameters of each row, to one token a row."""


def softmax_and_sort(logits: Tensor, params: Sequence[SamplingParams]) -> list[int]:
    """All rows at once: softmax, and where a row truncates a sort and running sums, as the shortest
    torch code does it; `multinomial` draws."""
    temperature = torch.tensor([item.temperature for item in params])
    probabilities = (logits / temperature[:, None]).softmax(-1)
    if any(item.top_k > 0 or item.top_p < 1.0 for item in params):
        ordered, ids = probabilities.sort(dim=-1, descending=True)
        vocab = logits.shape[1]
        top_k = torch.tensor([item.top_k or vocab for item in params])
        top_p = torch.tensor([item.top_p for item in params])
        ordered[torch.arange(vocab) >= top_k[:, None]] = 0.0
        before = ordered.cumsum(-1) - ordered
        ordered[before >= (top_p * ordered.sum(-1))[:, None]] = 0.0
        probabilities = torch.zeros_like(probabilities).scatter_(1, ids, ordered)
    drawn: list[int] = probabilities.multinomial(1)[:, 0].tolist()
    return drawn


def fp64_by_row(logits: Tensor, params: Sequence[SamplingParams]) -> list[int]:
    """Row by row in fp64, with a top-k selection and a sort of only those ids that top-p can reach:
    how the engine drew before it had an operation for it."""
    return [_fp64_row(row, item) for row, item in zip(logits, params, strict=True)]


def _fp64_row(logits: Tensor, params: SamplingParams) -> int:
    row = logits.double()
    weights = torch.exp((row - row.max()) / params.temperature)
    ids = torch.arange(len(row))
    if params.min_p > 0.0:
        ids = (weights >= params.min_p).nonzero()[:, 0]
    if 0 < params.top_k < len(ids):
        values = row[ids]
        boundary = values.topk(params.top_k).values[-1]
        above = (values > boundary).nonzero()[:, 0]
        ties = (values == boundary).nonzero()[: params.top_k - len(above), 0]
        ids = ids[torch.cat((above, ties)).sort().values]
    if params.top_p < 1.0:
        mass = weights[ids]
        total = mass.cumsum(0)[-1]
        near = ids[mass * (2 * len(ids)) >= (1.0 - params.top_p) * total]
        order = row[near].sort(descending=True, stable=True).indices
        running = weights[near[order]].cumsum(0)
        count = int(torch.searchsorted(running, params.top_p * total)) + 1
        ids = near[order[:count]].sort().values
    running = weights[ids].cumsum(0)
    target = torch.rand((), dtype=torch.float64) * running[-1]
    return int(ids[torch.searchsorted(running, target, right=True)])
