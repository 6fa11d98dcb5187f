"""Sampling as a pure function of parameters, prompt, tokens so far, choice and logits.

For each row, in fp64: penalties over the tokens, logit bias, temperature, min-p, top-k, top-p, then
the inverse of the cumulative distribution over the kept token ids in ascending order at one draw
of the counter-based generator. No state and no order of calls: prefill and decode worker, a
migrated stream and a row in another batch give the same token for the same logits. Sums that
decide anything are running sums, whose result does not depend on the number of threads.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from forebay.core.errors import InternalError
from forebay.core.sampling import SamplingParams
from forebay.engine.interface import SampledToken, ScheduledSequence
from forebay.engine.philox import uniform


def sample(logits: Tensor, sequences: Seq[ScheduledSequence]) -> list[tuple[SampledToken, ...]]:
    """logits: fp32 [R, vocabulary], row i for sequences[i]; one token per entry of its choices.

    Raises InternalError naming a row that is not finite: nothing sampled from it means anything.
    """
    _check_finite(logits)
    results: list[tuple[SampledToken, ...] | None] = [None] * len(sequences)
    plain = [i for i, sequence in enumerate(sequences) if _is_plain_greedy(sequence.params)]
    if plain:
        rows = logits if len(plain) == len(sequences) else logits[plain]
        for i, token_id in zip(plain, rows.argmax(dim=-1).tolist(), strict=True):
            results[i] = (SampledToken(token_id),) * len(sequences[i].choices)
    return [
        _sample_row(logits[i], sequence) if (tokens := results[i]) is None else tokens
        for i, sequence in enumerate(sequences)
    ]


def adjust(logits: Tensor, params: SamplingParams, tokens: Seq[int], num_prompt: int) -> Tensor:
    """fp64 copy of a row [vocabulary] after penalties and bias.

    Repetition (over prompt and generated tokens) divides positive logits and multiplies negative
    ones; frequency counts generated tokens; presence asks whether there is one.
    """
    row = logits.to(torch.float64, copy=True)
    if params.repetition_penalty != 1.0 and tokens:
        ids = torch.tensor(sorted(set(tokens)), dtype=torch.int64, device=row.device)
        seen = row[ids]
        penalty = params.repetition_penalty
        row[ids] = torch.where(seen > 0, seen / penalty, seen * penalty)
    generated = tokens[num_prompt:]
    if generated and (params.frequency_penalty != 0.0 or params.presence_penalty != 0.0):
        ids, counts = torch.unique(
            torch.tensor(generated, dtype=torch.int64, device=row.device), return_counts=True
        )
        row[ids] -= params.frequency_penalty * counts.double() + params.presence_penalty
    if params.logit_bias:
        ids = torch.tensor(list(params.logit_bias), dtype=torch.int64, device=row.device)
        biases = list(params.logit_bias.values())
        row[ids] += torch.tensor(biases, dtype=torch.float64, device=row.device)
    return row


def truncate(adjusted: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """(token ids ascending, unnormalised probabilities fp64) of what temperature, min-p, top-k
    and top-p leave of an adjusted row; at least the most probable token. Among equal logits at
    a boundary the lower ids stay."""
    weights = torch.exp((adjusted - adjusted.max()) / params.temperature)
    ids = torch.arange(len(adjusted), device=adjusted.device)
    if params.min_p > 0.0:
        ids = (weights >= params.min_p).nonzero()[:, 0]
    if 0 < params.top_k < len(ids):
        ids = ids[_largest(adjusted[ids], params.top_k)]
    if params.top_p < 1.0:
        ids = _nucleus(adjusted, weights, ids, params.top_p)
    return ids, weights[ids]


def _check_finite(logits: Tensor) -> None:
    low, high = logits.aminmax(dim=-1)
    finite = (low - high).isfinite()
    if not bool(finite.all()):
        row = int((~finite).nonzero()[0, 0])
        raise InternalError(f"row {row} of {len(logits)}: the model's logits are not finite")


def _is_plain_greedy(params: SamplingParams) -> bool:
    return (
        params.greedy
        and not params.has_penalties
        and not params.logit_bias
        and params.top_logprobs is None
    )


def _sample_row(logits: Tensor, sequence: ScheduledSequence) -> tuple[SampledToken, ...]:
    params = sequence.params
    adjusted = adjust(logits, params, sequence.tokens, sequence.num_prompt_tokens)
    if params.greedy:
        token_ids = [int(adjusted.argmax())] * len(sequence.choices)
    else:
        position = len(sequence.tokens) - sequence.num_prompt_tokens
        draws = [uniform(params.seed, choice, position) for choice in sequence.choices]
        token_ids = _draw(*truncate(adjusted, params), draws)
    if params.top_logprobs is None:
        return tuple(SampledToken(token_id) for token_id in token_ids)
    return _with_logprobs(logits, token_ids, params.top_logprobs)


def _draw(ids: Tensor, weights: Tensor, draws: Seq[float]) -> list[int]:
    """The first id whose running sum exceeds draw * total; an id of weight 0 never does. Draws are
    at most 1 - 2**-53, for which the rounded product is below the total."""
    running = weights.cumsum(0)
    targets = torch.tensor(draws, dtype=torch.float64, device=running.device) * running[-1]
    indices = torch.searchsorted(running, targets, right=True)
    drawn: list[int] = ids[indices].tolist()
    return drawn


def _largest(values: Tensor, count: int) -> Tensor:
    """Ascending indices of the `count` largest values; among equal ones the lower indices."""
    boundary = values.topk(count).values[-1]
    above = (values > boundary).nonzero()[:, 0]
    ties = (values == boundary).nonzero()[: count - len(above), 0]
    return torch.cat((above, ties)).sort().values


def _nucleus(adjusted: Tensor, weights: Tensor, ids: Tensor, top_p: float) -> Tensor:
    """The fewest ids, most probable first, that hold at least top_p of the mass; ascending.

    Only ids with at least half of their even share of the mass 1 - top_p get sorted: all the
    others together hold less than what may be left out.
    """
    mass = weights[ids]
    total = mass.cumsum(0)[-1]
    candidates = ids[mass * (2 * len(ids)) >= (1.0 - top_p) * total]
    order = adjusted[candidates].sort(descending=True, stable=True).indices
    running = weights[candidates[order]].cumsum(0)
    count = int(torch.searchsorted(running, top_p * total)) + 1
    return candidates[order[:count]].sort().values


def _with_logprobs(logits: Tensor, token_ids: Seq[int], num_top: int) -> tuple[SampledToken, ...]:
    logprobs = logits.double().log_softmax(dim=-1)
    top: tuple[tuple[int, float], ...] = ()
    if num_top:
        ids = _largest(logprobs, min(num_top, len(logprobs)))
        ids = ids[logprobs[ids].sort(descending=True, stable=True).indices]
        top = tuple(zip(ids.tolist(), logprobs[ids].tolist(), strict=True))
    return tuple(SampledToken(token_id, float(logprobs[token_id]), top) for token_id in token_ids)
