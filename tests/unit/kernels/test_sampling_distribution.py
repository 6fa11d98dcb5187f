"""What is drawn, and how often: definitions spelled out in float64, and chi-square."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from forebay_kernels import ops
from forebay_kernels.reference.sampling import (
    UNIT,
    kept_weights,
    multiply_high,
    philox4x32,
    random_bits,
    weights_of,
)
from forebay_kernels.testkit import Inputs, chi_square_p_value

FULL = 0xFFFFFFFF
SHAPES: list[dict[str, Any]] = [
    {},
    {"temperature": 0.5},
    {"temperature": 1.7},
    {"top_k": 5},
    {"top_p": 0.7},
    {"min_p": 0.1},
    {"temperature": 1.3, "min_p": 0.02, "top_k": 12, "top_p": 0.85},
]


def kept(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> Tensor:
    return kept_weights(logits, torch.tensor(temperature), top_k, top_p, min_p)


def defined_probabilities(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> Tensor:
    """fp64 [V], by the definitions over sorted lists."""
    scaled = (logits.double() / temperature).tolist()
    top = max(scaled)
    mass = [math.exp(value - top) for value in scaled]
    order = [i for i in sorted(range(len(mass)), key=lambda i: (-scaled[i], i)) if mass[i] >= min_p]
    order = order[: top_k or None]
    total = sum(mass[i] for i in order)
    out = torch.zeros(len(mass), dtype=torch.float64)
    running = 0.0
    for i in order:
        if running >= top_p * total and top_p < 1.0:
            break
        out[i] = mass[i]
        running += mass[i]
    return out / out.sum()


@pytest.mark.parametrize("overrides", SHAPES)
def test_the_kept_distribution_is_the_defined_one(overrides: dict[str, Any]) -> None:
    for seed in range(20):
        logits = Inputs(seed).normal(50, scale=2.0)
        weights = kept(logits, **overrides).double()
        expected = defined_probabilities(logits, **overrides)
        torch.testing.assert_close(weights / weights.sum(), expected, rtol=2e-6, atol=1e-12)


@given(top_p=st.floats(1e-6, 1.0, exclude_max=True), seed=st.integers(0, 1000))
def test_the_nucleus_is_the_smallest_that_reaches_top_p(top_p: float, seed: int) -> None:
    logits = Inputs(seed).normal(50, scale=4.0)
    ids = kept(logits, top_p=top_p).nonzero()[:, 0]
    mass = logits.double().softmax(0)
    assert float(mass[ids].sum()) >= top_p - 1e-6
    assert len(ids) == 1 or float(mass[ids].sum() - mass[ids].min()) < top_p + 1e-6
    outside = torch.ones(50, dtype=torch.bool)
    outside[ids] = False
    assert not outside.any() or mass[outside].max() <= mass[ids].min()


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_weights_are_exponentials(temperature: float) -> None:
    """Every weight is off by what fp32 exponents are off by, at most, and is a whole number."""
    row = torch.linspace(-60.0, 3.0, 40_001)
    exact = ((row.double() - 3.0) / temperature).exp() * UNIT
    weights = weights_of(row, row.amax(), torch.tensor(temperature))
    error = (weights - exact).abs()
    exponent = (exact / UNIT).log2().abs()
    assert (error <= 1.01 + exact * (3e-7 + 2e-7 * exponent)).all()
    assert weights[-1] == UNIT and (weights >= 0).all()
    assert (weights[exact < 0.9] == 0).all()


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"temperature": 0.6},
        {"top_k": 40},
        {"top_p": 0.9},
        {"min_p": 0.02},
        {"temperature": 1.5, "min_p": 0.001, "top_k": 300, "top_p": 0.95},
    ],
    ids=str,
)
def test_a_million_draws_follow_the_distribution(overrides: dict[str, Any]) -> None:
    """A thousand ids: a few peaks over a flat tail. Fixed seeds: it passes or fails for good."""
    logits = Inputs(seed=77).normal(1000, scale=0.7)
    logits[[5, 400, 990]] += 5.0
    draws = 1_000_000
    positions = torch.arange(draws, dtype=torch.int32)
    token, _ = ops.sample(
        logits[None],
        torch.zeros(draws, dtype=torch.int32),
        torch.full((draws,), overrides.get("temperature", 1.0)),
        torch.full((draws,), overrides.get("top_k", 0), dtype=torch.int32),
        torch.full((draws,), overrides.get("top_p", 1.0)),
        torch.full((draws,), overrides.get("min_p", 0.0)),
        torch.full((draws,), 123456789),
        positions % 16,
        positions // 16,
        logprobs=False,
    )
    counts = torch.bincount(token, minlength=1000)
    p_value = chi_square_p_value(counts, defined_probabilities(logits, **overrides))
    print(f"chi-square of {draws} draws {overrides}: p = {p_value:.3f}")
    assert p_value > 0.001


def test_chi_square_notices_a_wrong_distribution() -> None:
    logits = Inputs(seed=77).normal(100)
    probabilities = logits.double().softmax(0)
    counts = (probabilities * 1_000_000).round().long()
    assert chi_square_p_value(counts, probabilities) > 0.999
    assert chi_square_p_value(counts, (logits.double() * 1.05).softmax(0)) < 1e-6
    possible = torch.tensor([0.5, 0.5, 0.0], dtype=torch.float64)
    assert chi_square_p_value(torch.tensor([50, 50, 0]), possible) == 1.0
    assert chi_square_p_value(torch.tensor([50, 49, 1]), possible) == 0.0
    assert chi_square_p_value(torch.tensor([9]), torch.ones(1, dtype=torch.float64)) == 1.0


def words(*values: int) -> list[Tensor]:
    return [torch.tensor(value) for value in values]


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        (
            (FULL, FULL, FULL, FULL),
            (FULL, FULL),
            [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD],
        ),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_published_vectors_of_the_generator(
    counter: tuple[int, ...], key: tuple[int, ...], expected: list[int]
) -> None:
    """kat_vectors of the Random123 library."""
    c, k = words(*counter), words(*key)
    assert [int(word) for word in philox4x32((c[0], c[1], c[2], c[3]), (k[0], k[1]))] == expected


def test_flat_rows_show_the_random_bits(implementation: str) -> None:
    """Of a thousand equal weights the id is the thousandth of [0, 1) that the bits are in."""
    seeds = torch.tensor([0, 1, -1, 2**63 - 1, -(2**63), 12345])
    choice = torch.tensor([0, 3, 15, 2**31 - 1, -1, 7], dtype=torch.int32)
    position = torch.tensor([0, 9, 2**31 - 1, 5, -1, 70], dtype=torch.int32)
    count = len(seeds)
    token, _ = ops.sample(
        torch.zeros(1, 1000),
        torch.zeros(count, dtype=torch.int32),
        torch.ones(count),
        torch.zeros(count, dtype=torch.int32),
        torch.ones(count),
        torch.zeros(count),
        seeds,
        choice,
        position,
    )
    bits = [value & 0xFFFFFFFFFFFFFFFF for value in random_bits(seeds, choice, position).tolist()]
    assert bits[0] == 0x6627E8D5E169C58D
    assert token.tolist() == [value * 1000 >> 64 for value in bits]


@given(bits=st.integers(-(2**63), 2**63 - 1), total=st.integers(0, 2**62 - 1))
def test_products_of_64_bits_are_exact(bits: int, total: int) -> None:
    high = multiply_high(torch.tensor(bits), torch.tensor(total))
    assert int(high) == (bits & 0xFFFFFFFFFFFFFFFF) * total >> 64


def test_random_bits_are_spread_evenly() -> None:
    positions = torch.arange(40_000, dtype=torch.int32)
    bits = random_bits(torch.full((40_000,), 12345), positions % 4, positions // 4)
    shares = (bits >> 11 & 2**53 - 1).double() * 2.0**-53
    assert abs(float(shares.mean()) - 0.5) < 0.006
    assert abs(float(shares.var()) - 1 / 12) < 0.002
    assert len(bits.unique()) == 40_000
