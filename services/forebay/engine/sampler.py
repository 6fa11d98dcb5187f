"""Sampling as a pure function of parameters, prompt, tokens so far, choice and logits.

For each row: penalties over the tokens and logit bias, then the operation `sample`: temperature,
min-p, top-k, top-p, and one draw of a counter-based generator whose key is the seed and whose
counter is the choice and the position of the token. No state and no order of calls: prefill and
decode worker, a migrated stream, a row in another batch and another kind of device give the same
token for the same logits.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from forebay.core.errors import InternalError
from forebay.core.sampling import SamplingParams
from forebay.engine.interface import SampledToken, ScheduledSequence
from forebay_kernels import ops

_LARGEST = float(np.finfo(np.float32).max)
_MASK64 = 0xFFFFFFFFFFFFFFFF


class _Draw(NamedTuple):
    """row: of the logits; seed: modulo 2**64; position: of the token among the generated ones."""

    seed: int
    row: int
    choice: int = 0
    position: int = 0
    top_k: int = 0
    temperature: float = 0.0
    top_p: float = 1.0
    min_p: float = 0.0


def sample(logits: Tensor, sequences: Seq[ScheduledSequence]) -> list[tuple[SampledToken, ...]]:
    """logits: fp32 or bf16 [R, vocabulary], row i for sequences[i]; one token per entry of its
    choices. A logit of -inf is a token that cannot be.

    Raises InternalError naming a row with a NaN, with +inf, or where no token can be: nothing
    sampled from it means anything.
    """
    adjusted = [i for i, item in enumerate(sequences) if _is_adjusted(item.params)]
    plain = [i for i, item in enumerate(sequences) if not _is_adjusted(item.params)]
    copies = _adjusted_rows(logits, [(i, sequences[i]) for i in adjusted])
    token_ids: list[list[int]] = [[] for _ in sequences]
    for rows, places, indices in (
        (logits, plain, plain),
        (copies, range(len(adjusted)), adjusted),
    ):
        drawn = _draw_all(rows, places, [sequences[i] for i in indices])
        for i, ids in zip(indices, drawn, strict=True):
            if -1 in ids:
                raise InternalError(f"row {i} of {len(logits)}: the model's logits are not finite")
            token_ids[i] = ids
    results = [tuple(map(SampledToken, ids)) for ids in token_ids]
    asking = [i for i, item in enumerate(sequences) if item.params.top_logprobs is not None]
    for i, log_sum in zip(asking, _log_sums(logits, asking), strict=True):
        num_top = sequences[i].params.top_logprobs or 0
        results[i] = _with_logprobs(logits[i].float(), log_sum, token_ids[i], num_top)
    return results


def adjust(logits: Tensor, params: SamplingParams, tokens: Seq[int], num_prompt: int) -> Tensor:
    """fp32 copy of a row [vocabulary] after penalties and bias, each touched logit in fp64.

    Repetition (over prompt and generated tokens) divides positive logits and multiplies negative
    ones; frequency counts generated tokens; presence asks whether there is one. Finite logits stay
    finite.
    """
    row = logits.to(torch.float32, copy=True)
    seen = np.asarray(tokens if params.repetition_penalty != 1.0 else (), dtype=np.int64)
    generated = np.asarray(tokens[num_prompt:], dtype=np.int64)
    biased = np.asarray(list(params.logit_bias), dtype=np.int64)
    ids = np.unique(np.concatenate((seen, generated, biased)))
    if len(ids) == 0:
        return row
    factors, offsets = np.ones(len(ids)), np.zeros(len(ids))
    factors[np.searchsorted(ids, seen)] = params.repetition_penalty
    counts = np.bincount(np.searchsorted(ids, generated), minlength=len(ids))
    offsets -= params.frequency_penalty * counts + params.presence_penalty * (counts > 0)
    offsets[np.searchsorted(ids, biased)] += np.asarray(list(params.logit_bias.values()))
    where = torch.from_numpy(ids).to(row.device)
    factor, offset = torch.from_numpy(np.stack((factors, offsets))).to(row.device)
    before = row[where].double()
    after = torch.where(before > 0, before / factor, before * factor) + offset
    after = torch.where(before.isfinite(), after.clamp(-_LARGEST, _LARGEST), before)
    row[where] = after.float()
    return row


def _is_adjusted(params: SamplingParams) -> bool:
    return params.has_penalties or bool(params.logit_bias)


def _adjusted_rows(logits: Tensor, items: Seq[tuple[int, ScheduledSequence]]) -> Tensor:
    rows = [
        adjust(logits[i], item.params, item.tokens, item.num_prompt_tokens) for i, item in items
    ]
    return torch.stack(rows) if rows else logits[:0]


def _draw_all(logits: Tensor, rows: Seq[int], sequences: Seq[ScheduledSequence]) -> list[list[int]]:
    """Per sequence the tokens of its choices, from its row of the logits; -1: it has none."""
    draws = [
        draw
        for row, sequence in zip(rows, sequences, strict=True)
        for draw in _draws(row, sequence)
    ]
    if not draws:
        return [[] for _ in sequences]
    tokens, _ = ops.sample(logits, *_as_tensors(draws, logits.device), logprobs=False)
    drawn = iter(tokens.tolist())
    return [[next(drawn) for _ in sequence.choices] for sequence in sequences]


def _draws(row: int, sequence: ScheduledSequence) -> list[_Draw]:
    params = sequence.params
    position = len(sequence.tokens) - sequence.num_prompt_tokens
    if params.greedy:
        return [_Draw(0, row) for _ in sequence.choices]
    seed = params.seed & _MASK64
    rest = (params.top_k, params.temperature, _rounded_down(params.top_p), params.min_p)
    return [_Draw(seed, row, choice, position, *rest) for choice in sequence.choices]


def _rounded_down(share: float) -> float:
    """To fp32: three of five equal tokens hold 0.6 of the mass, but not what 0.6 is in fp32."""
    nearest = np.float32(share)
    return float(nearest if float(nearest) <= share else np.nextafter(nearest, np.float32(0.0)))


def _as_tensors(draws: Seq[_Draw], device: torch.device) -> tuple[Tensor, ...]:
    """The settings in the order of `ops.sample`, sent to the device as one tensor."""
    columns = list(zip(*draws, strict=True))
    count = len(draws)
    packed = np.empty(9 * count, dtype=np.int32)
    packed[: 2 * count].view(np.uint64)[:] = np.array(columns[0], dtype=np.uint64)
    rest = packed[2 * count :].reshape(7, count)
    rest[:4] = columns[1:5]
    rest[4:].view(np.float32)[:] = columns[5:]
    sent = torch.from_numpy(packed).to(device)
    row, choice, position, top_k, *others = sent[2 * count :].view(7, count)
    temperature, top_p, min_p = (other.view(torch.float32) for other in others)
    seed = sent[: 2 * count].view(torch.int64)
    return row, temperature, top_k, top_p, min_p, seed, choice, position


def _log_sums(logits: Tensor, indices: Seq[int]) -> list[float]:
    """Of each row the logarithm of the sum of exponentials: its largest logit less the logprob."""
    if not indices:
        return []
    settings = _as_tensors([_Draw(0, i) for i in indices], logits.device)
    best, logprob = ops.sample(logits, *settings)
    log_sums: list[float] = (logits[settings[0], best].double() - logprob.double()).tolist()
    return log_sums


def _with_logprobs(
    row: Tensor, log_sum: float, token_ids: Seq[int], num_top: int
) -> tuple[SampledToken, ...]:
    top: tuple[tuple[int, float], ...] = ()
    if num_top:
        ids = _largest(row, min(num_top, len(row)))
        ids = ids[row[ids].sort(descending=True, stable=True).indices]
        ids = ids[row[ids].isfinite()]
        top = tuple(zip(ids.tolist(), (row[ids].double() - log_sum).tolist(), strict=True))
    logprobs = (row[list(token_ids)].double() - log_sum).tolist()
    return tuple(
        SampledToken(token_id, logprob, top)
        for token_id, logprob in zip(token_ids, logprobs, strict=True)
    )


def _largest(values: Tensor, count: int) -> Tensor:
    """Ascending indices of the `count` largest values; among equal ones the lower indices."""
    boundary = values.topk(count).values[-1]
    above = (values > boundary).nonzero()[:, 0]
    ties = (values == boundary).nonzero()[: count - len(above), 0]
    return torch.cat((above, ties)).sort().values
