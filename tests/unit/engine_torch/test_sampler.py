from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from forebay.core.errors import InternalError
from forebay.core.sampling import SamplingParams
from forebay.engine.interface import SampledToken, ScheduledSequence
from forebay.engine.sampler import adjust, sample

VOCAB_SIZE = 50


def row(seed: int, size: int = VOCAB_SIZE, spread: float = 2.0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * spread


def scheduled(
    params: SamplingParams,
    *,
    prompt: Sequence[int] = (1, 2, 3),
    generated: Sequence[int] = (),
    choices: tuple[int, ...] = (0,),
) -> ScheduledSequence:
    tokens = [*prompt, *generated]
    return ScheduledSequence(
        tokens, len(prompt), len(tokens) - 1, 1, list(range(10)), params, choices
    )


def draw(logits: Tensor, params: SamplingParams, position: int, choice: int = 0) -> int:
    sequence = scheduled(params, generated=[7] * position, choices=(choice,))
    ((token,),) = sample(logits[None], [sequence])
    return token.token_id


def expected_probabilities(logits: Tensor, params: SamplingParams) -> list[float]:
    """The definitions, spelled out over sorted Python lists."""
    scaled = [float(x) / params.temperature for x in logits.double()]
    top = max(scaled)
    order = sorted(range(len(scaled)), key=lambda i: (-scaled[i], i))
    kept = [i for i in order if math.exp(scaled[i] - top) >= params.min_p]
    kept = kept[: params.top_k or None]
    total = sum(math.exp(scaled[i] - top) for i in kept)
    nucleus: list[int] = []
    mass = 0.0
    for i in kept:
        if mass >= params.top_p and params.top_p < 1.0:
            break
        nucleus.append(i)
        mass += math.exp(scaled[i] - top) / total
    share = sum(math.exp(scaled[i] - top) for i in nucleus)
    return [math.exp(scaled[i] - top) / share if i in nucleus else 0.0 for i in range(len(scaled))]


SHAPES: list[dict[str, Any]] = [
    {},
    {"temperature": 0.5},
    {"temperature": 1.7},
    {"top_k": 5},
    {"top_p": 0.7},
    {"min_p": 0.1},
    {"temperature": 1.3, "min_p": 0.02, "top_k": 12, "top_p": 0.85},
]


@pytest.mark.parametrize("overrides", SHAPES)
def test_draws_follow_the_distribution(overrides: dict[str, Any]) -> None:
    """Chi-square over 3,000 positions; fixed seeds, so it passes or fails for good."""
    params = SamplingParams(seed=2024, **overrides)
    logits = row(5, size=12, spread=1.0)
    expected = expected_probabilities(logits, params)
    num_draws = 3000
    counts = [0] * len(expected)
    for position in range(num_draws):
        counts[draw(logits, params, position)] += 1
    possible = [i for i, share in enumerate(expected) if share > 0]
    assert sum(counts[i] for i in possible) == num_draws
    statistic = sum(
        (counts[i] - num_draws * expected[i]) ** 2 / (num_draws * expected[i]) for i in possible
    )
    degrees = len(possible) - 1
    assert statistic < degrees + 4 * math.sqrt(2 * degrees)


def test_choices_draw_on_their_own() -> None:
    params = SamplingParams(seed=3, n=8)
    logits = torch.zeros(1, 1000)
    (tokens,) = sample(logits, [scheduled(params, choices=tuple(range(8)))])
    ids = [token.token_id for token in tokens]
    assert len(set(ids)) == 8
    for choice, token_id in enumerate(ids):
        assert draw(logits[0], params, 0, choice) == token_id


@pytest.mark.parametrize("changed", [{"seed": 4}, {"temperature": 0.9}])
def test_another_seed_gives_other_tokens_and_the_same_gives_the_same(
    changed: dict[str, Any],
) -> None:
    params = SamplingParams(seed=3)
    logits = row(1, size=5000, spread=0.1)
    first = [draw(logits, params, position) for position in range(30)]
    assert first == [draw(logits, params, position) for position in range(30)]
    other = dataclasses.replace(params, **changed)
    assert first != [draw(logits, other, position) for position in range(30)]


def test_only_the_position_among_generated_tokens_matters_without_penalties() -> None:
    params = SamplingParams(seed=9)
    logits = torch.zeros(1, 100_000)
    short = scheduled(params, prompt=[1], generated=[4, 5])
    long = scheduled(params, prompt=[9] * 40, generated=[8, 3])
    third = sample(logits, [scheduled(SamplingParams(seed=9), prompt=[1], generated=[4])])
    assert sample(logits, [short]) == sample(logits, [long]) != third


MIXED = [
    SamplingParams(temperature=0.0),
    SamplingParams(seed=1),
    SamplingParams(seed=2, top_p=0.8, top_logprobs=3),
    SamplingParams(seed=3, top_k=7, min_p=0.01),
    SamplingParams(temperature=0.0, presence_penalty=1.5, frequency_penalty=0.5),
    SamplingParams(seed=4, repetition_penalty=1.3, logit_bias={4: 5.0}),
    SamplingParams(temperature=0.005, top_logprobs=0),
]


@given(order=st.permutations(range(len(MIXED))), size=st.integers(1, len(MIXED)))
def test_a_row_does_not_depend_on_its_neighbours(order: list[int], size: int) -> None:
    logits = torch.stack([row(seed) for seed in range(len(MIXED))])
    sequences = [
        scheduled(params, generated=[i, 7, 7], choices=(0, 2)) for i, params in enumerate(MIXED)
    ]
    alone = [sample(logits[i : i + 1], [sequences[i]])[0] for i in range(len(MIXED))]
    batch = order[:size]
    together = sample(logits[batch], [sequences[i] for i in batch])
    assert together == [alone[i] for i in batch]


def test_greedy_takes_the_lowest_of_equal_logits() -> None:
    logits = torch.zeros(2, VOCAB_SIZE)
    logits[:, [9, 17, 30]] = 3.0
    plain = scheduled(SamplingParams(temperature=0.0), choices=(0, 1))
    biased = scheduled(SamplingParams(temperature=0.0, logit_bias={9: -1.0}))
    assert sample(logits, [plain, biased]) == [
        (SampledToken(9), SampledToken(9)),
        (SampledToken(17),),
    ]


@pytest.mark.parametrize("temperature", [0.0, 0.001, 0.00999])
def test_temperatures_near_zero_are_greedy(temperature: float) -> None:
    logits = row(3)
    assert draw(logits, SamplingParams(temperature=temperature, seed=5), 3) == int(logits.argmax())


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"top_k": 3}, {3, 8, 45}),
        ({"top_p": 0.5}, {3, 8, 21}),
        ({"top_p": 1 / 6}, {3}),
        ({"top_p": 0.51}, {3, 8, 21, 33}),
    ],
)
def test_ties_at_a_boundary_keep_the_lower_ids(
    overrides: dict[str, Any], expected: set[int]
) -> None:
    logits = torch.full((VOCAB_SIZE,), -50.0)
    logits[[3, 8, 21, 33, 40]] = 1.0
    logits[45] = 1.0 if "top_p" in overrides else 2.0
    params = SamplingParams(seed=8, **overrides)
    assert {draw(logits, params, position) for position in range(60)} == expected


def test_top_k_of_one_and_tiny_top_p_are_greedy() -> None:
    for seed in range(10):
        logits = row(seed)
        best = int(logits.argmax())
        assert draw(logits, SamplingParams(top_k=1, seed=seed), 0) == best
        assert draw(logits, SamplingParams(top_p=1e-9, seed=seed), 0) == best
        assert draw(logits, SamplingParams(min_p=1.0, seed=seed), 0) == best


def test_a_token_of_no_probability_is_never_drawn() -> None:
    logits = torch.full((5000,), -3000.0)
    logits[4321] = 3000.0
    for position in range(50):
        assert draw(logits, SamplingParams(seed=position), position) == 4321


def test_penalties() -> None:
    logits = torch.tensor([2.0, -2.0, 3.0, 0.5, -1.0, 4.0])
    params = SamplingParams(
        repetition_penalty=2.0, frequency_penalty=0.25, presence_penalty=1.0, logit_bias={5: -7.0}
    )
    adjusted = adjust(logits, params, [0, 1, 2, 2, 4, 2], num_prompt=3)
    expected = [1.0, -4.0, 1.5 - 2 * 0.25 - 1.0, 0.5, -2.0 - 0.25 - 1.0, -3.0]
    assert adjusted.tolist() == expected
    assert logits.tolist() == [2.0, -2.0, 3.0, 0.5, -1.0, 4.0]


def test_penalties_without_generated_tokens_touch_only_repeated_prompt_tokens() -> None:
    params = SamplingParams(frequency_penalty=1.0, presence_penalty=1.0)
    logits = row(4)
    assert torch.equal(adjust(logits, params, [1, 2, 3], 3), logits)


@pytest.mark.parametrize("penalty", [1e-320, 1e-30, 10.0])
def test_no_penalty_makes_a_logit_infinite(penalty: float) -> None:
    logits = torch.tensor([3e38, -3e38, 0.0, -math.inf])
    params = SamplingParams(repetition_penalty=penalty, logit_bias={0: 100.0, 3: 100.0})
    adjusted = adjust(logits, params, [0, 1, 2, 3], 4)
    assert adjusted[:3].isfinite().all() and adjusted[3] == -math.inf
    assert sample(logits[None], [scheduled(params, prompt=[0, 1, 2])])[0][0].token_id == 0


def test_a_large_bias_bans_or_forces() -> None:
    logits = row(6)
    best = int(logits.argmax())
    banned = SamplingParams(logit_bias={best: -100.0}, seed=1)
    forced = SamplingParams(logit_bias={11: 100.0}, seed=1)
    for position in range(20):
        assert draw(logits, banned, position) != best
        assert draw(logits, forced, position) == 11


def test_logprobs_are_of_the_raw_logits() -> None:
    logits = row(7)
    params = SamplingParams(
        temperature=0.3, top_k=4, presence_penalty=2.0, logit_bias={3: 50.0}, top_logprobs=4
    )
    ((token,),) = sample(logits[None], [scheduled(params)])
    expected = logits.double().log_softmax(0)
    best = expected.argsort(descending=True)[:4]
    assert token.token_id == 3
    assert token.logprob == pytest.approx(float(expected[3]), abs=1e-6)
    assert [i for i, _ in token.top] == best.tolist()
    assert [share for _, share in token.top] == pytest.approx(expected[best].tolist(), abs=1e-6)


def test_a_token_has_one_logprob() -> None:
    """The same among the alternatives, for any choice and any truncation."""
    logits = row(7)[None]
    for overrides in ({}, {"top_k": 2}, {"presence_penalty": 0.1}, {"temperature": 0.0}):
        params = SamplingParams(top_logprobs=20, n=4, seed=1, **overrides)
        (tokens,) = sample(logits, [scheduled(params, choices=(0, 1, 2, 3))])
        known: dict[int, float] = {}
        for token in tokens:
            assert token.logprob is not None
            for token_id, logprob in (*token.top, (token.token_id, token.logprob)):
                assert known.setdefault(token_id, logprob) == logprob


def test_top_logprobs_zero_gives_only_the_tokens_own() -> None:
    params = SamplingParams(temperature=0.0, top_logprobs=0)
    ((token,),) = sample(row(8)[None], [scheduled(params)])
    assert token.logprob is not None and token.top == ()


def test_equal_logprobs_are_listed_lower_ids_first() -> None:
    logits = torch.zeros(1, VOCAB_SIZE)
    logits[0, 30] = 1.0
    params = SamplingParams(temperature=0.0, top_logprobs=4)
    ((token,),) = sample(logits, [scheduled(params)])
    assert [token_id for token_id, _ in token.top] == [30, 0, 1, 2]


@pytest.mark.parametrize("value", [math.nan, -math.nan, math.inf])
@pytest.mark.parametrize(
    "overrides",
    [{"temperature": 0.0}, {}, {"top_p": 0.9}, {"presence_penalty": 1.0, "logit_bias": {17: 1.0}}],
)
def test_a_row_that_is_not_finite_is_named(value: float, overrides: dict[str, Any]) -> None:
    logits = torch.zeros(3, VOCAB_SIZE)
    logits[2, 17] = value
    sequences = [scheduled(SamplingParams(**overrides))] * 3
    with pytest.raises(InternalError, match="row 2 of 3"):
        sample(logits, sequences)


@pytest.mark.parametrize("overrides", [{"temperature": 0.0}, {}, {"logit_bias": {17: 100.0}}])
def test_a_logit_of_minus_infinity_is_a_token_that_cannot_be(overrides: dict[str, Any]) -> None:
    logits = torch.full((2, VOCAB_SIZE), -math.inf)
    logits[:, [9, 30]] = torch.tensor([1.0, 2.0])
    params = SamplingParams(top_logprobs=5, **overrides)
    for position in range(20):
        tokens = sample(logits, [scheduled(params, generated=[1] * position)] * 2)
        for (token,) in tokens:
            assert token.token_id in (9, 30)
            assert [token_id for token_id, _ in token.top] == [30, 9]
    logits[1] = -math.inf
    with pytest.raises(InternalError, match="row 1 of 2"):
        sample(logits, [scheduled(params)] * 2)


def test_bf16_logits_give_what_the_same_logits_give_as_fp32() -> None:
    logits = torch.stack([row(seed) for seed in range(len(MIXED))]).bfloat16()
    sequences = [scheduled(params, generated=[7]) for params in MIXED]
    assert sample(logits, sequences) == sample(logits.float(), sequences)


def test_the_global_generator_is_neither_read_nor_moved() -> None:
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    first = sample(row(9)[None], [scheduled(SamplingParams(seed=6))])
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(2)
    assert sample(row(9)[None], [scheduled(SamplingParams(seed=6))]) == first


def test_the_number_of_threads_changes_nothing() -> None:
    logits = row(10, size=60_000)[None]
    params = SamplingParams(seed=6, top_p=0.97, temperature=1.4, n=16)
    sequences = [scheduled(params, choices=tuple(range(16)))]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = sample(logits, sequences)
    finally:
        torch.set_num_threads(before)
    assert sample(logits, sequences) == alone
