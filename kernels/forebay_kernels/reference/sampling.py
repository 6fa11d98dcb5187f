"""Sampling in plain torch, with the same tokens as the kernels: weights are integers, floats round
after every operation, and no sum depends on an order. See csrc/sampling/fixed.cuh."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

UNIT_BITS = 42
UNIT = 1 << UNIT_BITS
"""The weight of the most probable id."""
LOWEST_EXPONENT = -42.0
MIN_TEMPERATURE = 2.0**-64
"""Anything less is greedy."""
_LOG2E = float.fromhex("0x1.715476p+0")
_POWERS = tuple(
    map(
        float.fromhex,
        ("0x1.5bd97cp-10", "0x1.3ce8b2p-7", "0x1.c6b6dap-5", "0x1.ebf9c2p-3", "0x1.62e42ap-1"),
    )
)
"""2^f = 1 + f * (0.693... + f * (...)) for f in [-1/2, 1/2], to 2e-7; the last comes first."""
_NEAREST = 1.5 * 2.0**23
"""Adding it to a small float rounds that to an integer."""
_ID_BITS = 20
_SHARE_BITS = 30
_LOW32 = 0xFFFFFFFF


def sample(
    logits: Tensor,
    rows: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    choice: Tensor,
    position: Tensor,
    bitmask: Tensor | None,
    logprobs: bool,
) -> tuple[Tensor, Tensor]:
    """As `ops.sample`, which checks the arguments. Draws that share a row and everything but their
    random number are computed together."""
    values = logits.float() + 0.0  # no -0
    largest = values.amax(-1)
    broken = ~(largest < math.inf)
    allowed = values if bitmask is None else _masked(values, bitmask)
    best = allowed.amax(-1)
    impossible = broken | ~(best > -math.inf)
    greedy_ids = (allowed == best[:, None]).int().argmax(-1)
    bits = random_bits(seed, choice, position)
    tokens = torch.full(rows.shape, -1, dtype=torch.int32)
    logprob = torch.full(rows.shape, math.nan)
    for begin, end in _groups(rows, temperature, top_k, top_p, min_p):
        row = int(rows[begin])
        if not 0 <= row < len(logits) or bool(impossible[row]):
            continue
        if not float(temperature[begin]) >= MIN_TEMPERATURE:
            drawn = greedy_ids[row].expand(end - begin)
        else:
            kept = kept_weights(
                allowed[row],
                temperature[begin],
                int(top_k[begin]),
                float(top_p[begin]),
                float(min_p[begin]),
            )
            running = kept.cumsum(0)
            targets = multiply_high(bits[begin:end], running[-1])
            drawn = torch.searchsorted(running, targets, right=True)
        tokens[begin:end] = drawn.int().cpu()
        if logprobs:
            weights = weights_of(values[row], largest[row], torch.ones_like(largest[row]))
            chosen = values[row, drawn].double()
            logprob[begin:end] = _logprobs(chosen, float(largest[row]), int(weights.sum())).cpu()
    tokens = tokens.to(logits.device)
    return tokens, logprob.to(logits.device) if logprobs else logprob.new_empty(0)


def weights_of(row: Tensor, largest: Tensor, temperature: Tensor) -> Tensor:
    """int64 [V]: exp((row - largest) / temperature) in units of 2^-42, rounded down; 0 below that.

    row: fp32 [V]; largest, temperature: fp32 scalars as tensors.
    """
    scale = torch.ones_like(temperature) / temperature * _LOG2E
    exponent = (row - largest) * scale
    possible = exponent > LOWEST_EXPONENT
    exponent = torch.where(possible, exponent, LOWEST_EXPONENT)
    rounded = (exponent + _NEAREST) - _NEAREST
    fraction = exponent - rounded
    power = torch.full_like(fraction, _POWERS[0])
    for coefficient in (*_POWERS[1:], 1.0):
        power = power * fraction
        power = power + coefficient
    mantissa = (power * 2.0**24).long() << (UNIT_BITS - 24)
    return torch.where(possible, mantissa >> (-rounded).long(), 0)


def kept_weights(
    row: Tensor, temperature: Tensor, top_k: int, top_p: float, min_p: float
) -> Tensor:
    """int64 [V]: the weights of what min-p, top-k and top-p leave of a row, 0 elsewhere.

    row: fp32 [V], its largest value finite; temperature: fp32 scalar as a tensor. An id with a
    weight of 0 counts for nothing. Among equal logits at a boundary the lower ids stay.
    """
    weights = weights_of(row, row.amax(), temperature)
    lowest = max(1, math.ceil(min(min_p, 1.0) * UNIT)) if min_p > 0.0 else 1
    ids = (weights >= lowest).nonzero()[:, 0]
    if 0 < top_k < len(ids):
        ids = ids[_ranks(row[ids], ids).topk(top_k).indices]
    if top_p < 1.0:
        total = int(weights[ids].sum())
        share = math.ceil(max(top_p, 0.0) * (1 << _SHARE_BITS))
        wanted = max(1, -(-share * total >> _SHARE_BITS))
        # Others weigh too little to be reached: all of them together less than may be left out.
        ids = ids[weights[ids] >= (total - wanted) // (2 * len(ids))]
        ids = ids[_ranks(row[ids], ids).argsort(descending=True)]
        running = weights[ids].cumsum(0)
        ids = ids[: int((running < wanted).sum()) + 1]
    kept = torch.zeros_like(weights)
    kept[ids] = weights[ids]
    return kept


def random_bits(seed: Tensor, choice: Tensor, position: Tensor) -> Tensor:
    """int64 [R], all 64 bits random: the first two words of Philox 4x32-10 (Salmon, Moraes, Dror,
    Shaw: Parallel Random Numbers: As Easy as 1, 2, 3, SC 2011) with the key `seed` at the counter
    (choice, position, 0, 0)."""
    zero = torch.zeros_like(seed)
    first, second, _, _ = philox4x32(
        (choice.long() & _LOW32, position.long() & _LOW32, zero, zero),
        (seed & _LOW32, seed >> 32 & _LOW32),
    )
    return first << 32 | second


Words = tuple[Tensor, Tensor, Tensor, Tensor]


def philox4x32(counter: Words, key: tuple[Tensor, Tensor]) -> Words:
    """Four 32-bit words of each 128-bit counter and 64-bit key, all as int64 of 32 bits."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        low, high = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (
            (high >> 32 & _LOW32) ^ c1 ^ k0,
            high & _LOW32,
            (low >> 32 & _LOW32) ^ c3 ^ k1,
            low & _LOW32,
        )
        k0, k1 = (k0 + 0x9E3779B9) & _LOW32, (k1 + 0xBB67AE85) & _LOW32
    return c0, c1, c2, c3


def multiply_high(bits: Tensor, total: Tensor) -> Tensor:
    """floor(bits * total / 2^64), bits taken as unsigned, 0 <= total < 2^62. Products of 32-bit
    halves wrap around into the sign, which masks take away."""
    high, low = bits >> 32 & _LOW32, bits & _LOW32
    total_high, total_low = total >> 32, total & _LOW32
    middle = (
        (low * total_low >> 32 & _LOW32) + (low * total_high & _LOW32) + (high * total_low & _LOW32)
    )
    return (
        high * total_high
        + (low * total_high >> 32 & _LOW32)
        + (high * total_low >> 32 & _LOW32)
        + (middle >> 32)
    )


def _masked(values: Tensor, bitmask: Tensor) -> Tensor:
    """-inf where the bit of an id is 0; id i has bit i % 32 of word i // 32."""
    ids = torch.arange(values.shape[1], device=values.device)
    bits = bitmask.index_select(1, ids // 32) >> (ids % 32).int() & 1
    return values.masked_fill(bits == 0, -math.inf)


def _groups(*settings: Tensor) -> list[tuple[int, int]]:
    """Stretches of draws that have all of these in common, bit by bit."""
    columns = list(zip(*(setting.view(torch.int32).tolist() for setting in settings), strict=True))
    starts = [i for i in range(len(columns)) if i == 0 or columns[i] != columns[i - 1]]
    return list(pairwise([*starts, len(columns)]))


def _ranks(values: Tensor, ids: Tensor) -> Tensor:
    """int64: greater for greater values, and for lower ids among equal ones. No -0 in values."""
    bits = values.view(torch.int32).long()
    keys = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return (keys << _ID_BITS) - ids


def _logprobs(chosen: Tensor, largest: float, total: int) -> Tensor:
    """fp32; chosen: float64."""
    return (0.0 - ((largest - chosen) + _log_of_sum(total))).float()


def _log_of_sum(total: int) -> float:
    """ln(total / UNIT), rounded after every operation; ln m = 2 atanh((m - 1) / (m + 1))."""
    exponent = total.bit_length() - UNIT_BITS
    mantissa = float(total << 64 - total.bit_length() >> 11) * 2.0**-53
    if mantissa < float.fromhex("0x1.6a09e667f3bcdp-1"):
        mantissa *= 2.0
        exponent -= 1
    z = (mantissa - 1.0) / (mantissa + 1.0)
    series = 0.0
    for odd in range(19, 0, -2):
        series = series * (z * z) + 2.0 / odd
    return exponent * float.fromhex("0x1.62e42fefa39efp-1") + z * series
