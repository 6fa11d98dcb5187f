from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from torch import Tensor

from forebay_kernels import native, ops
from forebay_kernels.checks import ArgumentError
from forebay_kernels.native import libraries
from forebay_kernels.ops.sampling import MAX_VOCAB
from forebay_kernels.testkit import Inputs

INF = math.inf


def settings(
    draws: int,
    *,
    rows: Sequence[int] | int = 0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int = 1,
) -> tuple[Tensor, ...]:
    """The choices 0, 1, 2, ... of one position, or of the given rows."""
    each = torch.tensor(rows, dtype=torch.int32).expand(draws).contiguous()
    return (
        each,
        torch.full((draws,), temperature),
        torch.full((draws,), top_k, dtype=torch.int32),
        torch.full((draws,), top_p),
        torch.full((draws,), min_p),
        torch.full((draws,), seed),
        torch.arange(draws, dtype=torch.int32),
        torch.full((draws,), 5, dtype=torch.int32),
    )


def chosen(logits: Tensor, draws: int = 1, **overrides: float) -> list[int]:
    token, _ = ops.sample(logits[None], *settings(draws, **overrides))  # type: ignore[arg-type]
    ids: list[int] = token.tolist()
    return ids


@dataclass(frozen=True)
class Case:
    logits: Tensor
    bitmask: Tensor | None
    settings: tuple[Tensor, ...]


NUM_DRAWS = 16
NUM_SETTINGS = 12
"""Of each batch of rows below: settings; draws with each."""


def hostile_rows(inputs: Inputs) -> list[tuple[str, Tensor]]:
    def spread(vocab: int, scale: float) -> Tensor:
        return inputs.normal(vocab, scale=scale)

    near = torch.full((3001,), 2.0)
    near[inputs.permutation(3001)[:1500]] = math.nextafter(2.0, 3.0)
    near = torch.nextafter(near, torch.where(spread(3001, 1.0) > 0, INF, -INF))
    holes = spread(5003, 3.0)
    holes[100:4000] = -INF
    zeros = torch.zeros(777)
    zeros[::2] = -0.0
    peaks = spread(9999, 0.5)
    peaks[[3, 4000, 9998]] = torch.tensor([14.0, 13.99, 12.0])
    return [
        ("one", torch.tensor([-3.5])),
        ("seven", spread(7, 2.0)),
        ("flat", torch.full((5000,), 1.25)),
        ("flat beyond any list of candidates", torch.full((20011,), -7.0)),
        ("two blocks of a row", spread(33000, 2.0)),
        ("near ties", near),
        ("tiny", spread(2049, 1e-40)),
        ("huge", spread(1000, 1e38)),
        ("wide", spread(1023, 400.0)),
        ("narrow", spread(1025, 0.001)),
        ("holes", holes),
        ("zeros of both signs", zeros),
        ("peaks", peaks),
        ("few values", spread(6000, 1.0).mul(4).round().div(4)),
    ]


@cache
def cases(dtype: torch.dtype) -> dict[str, Case]:
    inputs = Inputs(seed=11 if dtype == torch.float32 else 12)
    out: dict[str, Case] = {}
    for name, row in hostile_rows(inputs):
        vocab = len(row)

        def one_of(*values: float, dtype: torch.dtype = torch.float32) -> Tensor:
            """The same for all draws of a setting."""
            picked = inputs.integers(NUM_SETTINGS, low=0, high=len(values))
            return torch.tensor(values, dtype=dtype)[picked].repeat_interleave(NUM_DRAWS)

        count = NUM_SETTINGS * NUM_DRAWS
        logits = torch.stack((row, row.flip(0), row[inputs.permutation(vocab)])).to(dtype)
        words = inputs.integers(3, -(-vocab // 32), low=-(2**31), high=2**31, dtype=torch.int32)
        words[0] = -1
        out[name] = Case(
            logits,
            words if len(out) % 2 else None,
            (
                one_of(0, 1, 2, dtype=torch.int32),
                one_of(0.0, 1e-25, 0.01, 0.7, 1.0, 1.0, 5.0, 1e6, INF),
                one_of(0, 0, 0, 1, 2, 50, vocab - 1, vocab, 2**31 - 1, dtype=torch.int32),
                one_of(1.0, 1.0, 1e-30, 1e-6, 0.5, 0.9, 0.9, 0.999999),
                one_of(0.0, 0.0, 0.0, 1e-12, 0.05, 1.0),
                inputs.integers(count, low=-(2**63), high=2**63 - 1),
                inputs.integers(count, low=0, high=16, dtype=torch.int32),
                inputs.integers(count, low=0, high=4000, dtype=torch.int32),
            ),
        )
    return out


@cache
def expected(dtype: torch.dtype, name: str) -> tuple[Tensor, Tensor]:
    case, kept = cases(dtype)[name], libraries.of("cpu")
    libraries.use("cpu", None)
    try:
        return ops.sample(case.logits, *case.settings, case.bitmask)
    finally:
        libraries.use("cpu", kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_implementation_gives_the_same_tokens(
    implementation: str, dtype: torch.dtype
) -> None:
    """And the same bits of logprobs, as one batch and as batches split and mixed at random."""
    inputs = Inputs(seed=3)
    compared = different = 0
    for name, case in cases(dtype).items():
        tokens, logprobs = expected(dtype, name)
        count = len(tokens)
        batches = [torch.arange(count)]
        if implementation in ("torch", "host"):  # slow: one setting's draws stay together
            cuts = sorted(inputs.integers(2, low=0, high=count).tolist())
            batches = list(batches[0].tensor_split(cuts))
        else:
            cuts = sorted(inputs.integers(5, low=0, high=count).tolist())
            batches += inputs.permutation(count).tensor_split(cuts)
        for batch in batches:
            mixed = [setting[batch] for setting in case.settings]
            token, logprob = ops.sample(case.logits, *mixed, case.bitmask)
            same = token == tokens[batch]
            same &= logprob.view(torch.int32) == logprobs[batch].view(torch.int32)
            compared += len(batch)
            different += int((~same).sum())
    print(f"{implementation} {dtype}: {compared} draws, {different} differ from the reference")
    assert compared >= 14 * NUM_SETTINGS * NUM_DRAWS and different == 0


@pytest.mark.parametrize("order", [1, 2, 3])
def test_no_order_of_threads_changes_a_token(order: int) -> None:
    host, kept = native.load("host"), libraries.of("cpu")
    libraries.use("cpu", host)
    try:
        host.order_threads(order)
        for name in ("near ties", "two blocks of a row", "few values"):
            case = cases(torch.float32)[name]
            token, logprob = ops.sample(case.logits, *case.settings, case.bitmask)
            tokens, logprobs = expected(torch.float32, name)
            assert torch.equal(token, tokens)
            assert torch.equal(logprob.view(torch.int32), logprobs.view(torch.int32))
    finally:
        host.order_threads(0)
        libraries.use("cpu", kept)


def test_logprobs_are_those_of_the_whole_row(implementation: str) -> None:
    for scale in (0.0, 1.0, 10.0):
        logits = Inputs(seed=9).normal(3, 3000, scale=scale)
        setup = settings(12, rows=[0, 1, 2] * 4, temperature=0.5, top_k=9)
        token, logprob = ops.sample(logits, *setup)
        exact = logits.double().log_softmax(-1)[setup[0].long(), token.long()]
        assert ((logprob - exact).abs() <= 3e-7 + 6e-8 * exact.abs()).all()


def test_logprobs_only_where_wanted(implementation: str) -> None:
    token, logprob = ops.sample(torch.zeros(1, 9), *settings(4), logprobs=False)
    assert token.shape == (4,) and logprob.shape == (0,)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [math.nan, -math.nan, INF])
def test_a_broken_row_has_no_token_and_spoils_no_other(
    implementation: str, temperature: float, value: float
) -> None:
    logits = torch.zeros(4, 3000)
    logits[1, 2500] = value
    logits[2] = -INF
    mask = torch.full((4, 94), -1, dtype=torch.int32)
    mask[3] = 0
    setup = settings(5, rows=[0, 1, 2, 3, -1], temperature=temperature, top_p=0.9)
    token, logprob = ops.sample(logits, *setup, mask)
    assert token[0] >= 0 and token[1:].tolist() == [-1] * 4
    assert logprob[0] == pytest.approx(-math.log(3000), abs=1e-6) and logprob[1:].isnan().all()
    mask[1] = 0  # a NaN is one even where the grammar would not look
    mask[1, 0] = 1
    assert ops.sample(logits, *setup, mask)[0][1] == -1


def test_a_grammar_forbids_and_logprobs_do_not_care(implementation: str) -> None:
    logits = Inputs(seed=4).normal(1, 500, scale=3.0)
    allowed = [0, 31, 32, 77, 499]
    words = torch.zeros(1, 16, dtype=torch.int64)
    for token_id in allowed:
        words[0, token_id // 32] |= 1 << token_id % 32
    mask = (words << 32 >> 32).int()
    for overrides in ({}, {"top_k": 3}, {"temperature": 0.0}, {"top_p": 0.8}):
        token, logprob = ops.sample(logits, *settings(200, **overrides), mask)  # type: ignore[arg-type]
        assert set(token.tolist()) <= set(allowed)
        best = max(allowed, key=lambda token_id: float(logits[0, token_id]))
        assert best in token.tolist()
        exact = logits.double().log_softmax(-1)[0, token.long()]
        assert (logprob - exact).abs().max() < 2e-6


def test_the_most_probable_id_always_stays(implementation: str) -> None:
    logits = Inputs(seed=6).normal(2000, scale=2.0)
    best = int(logits.argmax())
    for overrides in (
        {"top_k": 1},
        {"top_p": 1e-38},
        {"top_p": 0.0},
        {"top_p": -1.0},
        {"min_p": 1.0},
        {"min_p": 7.0},
        {"temperature": 1e-10},
        {"temperature": -1.0},
        {"temperature": math.nan},
    ):
        assert set(chosen(logits, 20, **overrides)) == {best}
    assert len(set(chosen(logits, 200, top_p=math.nan, min_p=math.nan, top_k=-5))) > 50


def test_ties_at_a_boundary_keep_the_lower_ids(implementation: str) -> None:
    logits = torch.full((3000,), -50.0)
    logits[[3, 8, 2100, 2700, 2999]] = 1.0
    assert set(chosen(logits, 90, top_k=3)) == {3, 8, 2100}
    assert set(chosen(logits, 90, top_p=0.59)) == {3, 8, 2100}
    assert set(chosen(logits, 90, top_p=0.61)) == {3, 8, 2100, 2700}
    assert chosen(logits, 2, temperature=0.0) == [3, 3]
    assert set(chosen(torch.zeros(10000), 60, top_k=2)) == {0, 1}


def test_rows_with_distance_between_them_and_at_odd_addresses(implementation: str) -> None:
    wide = Inputs(seed=8).normal(4, 1500, scale=2.0)
    view = wide[:, 3:1410]
    setup = settings(8, rows=[0, 1, 2, 3] * 2, top_p=0.9)
    for actual, wanted in zip(
        ops.sample(view, *setup), ops.sample(view.contiguous(), *setup), strict=True
    ):
        assert torch.equal(actual, wanted)


def test_more_draws_than_one_launch_handles(implementation: str) -> None:
    logits = Inputs(seed=8).normal(2, 60, scale=2.0)
    setup = settings(600, rows=[0] * 255 + [1] * 345, top_k=9)
    token, _ = ops.sample(logits, *setup)
    alone = [ops.sample(logits, *(s[i : i + 1] for s in setup))[0] for i in (0, 254, 255, 256, 599)]
    assert token[[0, 254, 255, 256, 599]].tolist() == [int(one) for one in alone]


def test_nothing_to_draw(implementation: str) -> None:
    for num_rows in (0, 2):
        token, logprob = ops.sample(torch.zeros(num_rows, 50), *settings(0))
        assert (token.shape, logprob.shape) == ((0,), (0,))


def test_bad_arguments_are_named() -> None:
    logits, good = torch.zeros(2, 40), settings(3)

    def replaced(index: int, tensor: Tensor) -> list[Tensor]:
        return [tensor if i == index else setting for i, setting in enumerate(good)]

    with pytest.raises(ArgumentError, match=r"sample: logits: dtype torch.float16 is none"):
        ops.sample(logits.half(), *good)
    with pytest.raises(ArgumentError, match=r"sample: logits: 0 ids to a row"):
        ops.sample(torch.zeros(2, 0), *good)
    with pytest.raises(ArgumentError, match=rf"sample: logits: {MAX_VOCAB + 1} ids"):
        ops.sample(torch.zeros(1, 1).expand(1, MAX_VOCAB + 1), *good)
    with pytest.raises(ArgumentError, match=r"sample: logits: rows have gaps"):
        ops.sample(torch.zeros(40, 2).T, *good)
    with pytest.raises(ArgumentError, match=r"sample: rows: dtype torch.int64 is none"):
        ops.sample(logits, *replaced(0, good[0].long()))
    with pytest.raises(ArgumentError, match=r"sample: rows: 0 to 2 where -1 to 1 belong"):
        ops.sample(logits, *settings(3, rows=[0, 1, 2]))
    with pytest.raises(ArgumentError, match=r"sample: top_p: shape \(4,\) where \[3\]"):
        ops.sample(logits, *replaced(3, torch.ones(4)))
    with pytest.raises(ArgumentError, match=r"sample: seed: is on meta, not on cpu"):
        ops.sample(logits, *replaced(5, good[5].to("meta")))
    with pytest.raises(ArgumentError, match=r"sample: min_p: has gaps"):
        ops.sample(logits, *replaced(4, torch.zeros(6)[::2]))
    with pytest.raises(ArgumentError, match=r"sample: bitmask: shape \(2, 1\) where \[2, 2\]"):
        ops.sample(logits, *good, torch.zeros(2, 1, dtype=torch.int32))


def test_shapes_alone() -> None:
    setup = [setting.to("meta") for setting in settings(5)]
    token, logprob = ops.sample(torch.zeros(2, 9, device="meta"), *setup)
    assert (token.shape, token.dtype, logprob.shape) == ((5,), torch.int32, (5,))
