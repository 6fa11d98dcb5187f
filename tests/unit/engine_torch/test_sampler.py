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
from forebay.engine.philox import uniform
from forebay.engine.sampler import _draw, adjust, sample, truncate

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
def test_the_kept_distribution_is_the_defined_one(overrides: dict[str, Any]) -> None:
    params = SamplingParams(**overrides)
    for seed in range(20):
        logits = row(seed)
        ids, weights = truncate(adjust(logits, params, [], 0), params)
        probabilities = torch.zeros(VOCAB_SIZE, dtype=torch.float64)
        probabilities[ids] = weights / weights.sum()
        expected = torch.tensor(expected_probabilities(logits, params), dtype=torch.float64)
        torch.testing.assert_close(probabilities, expected, rtol=1e-9, atol=1e-12)
        assert torch.equal(ids, ids.sort().values)


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
    expected = int(uniform(9, 0, 2) * 100_000)
    assert sample(logits, [short]) == sample(logits, [long]) == [(SampledToken(expected),)]


@pytest.mark.parametrize(
    ("share", "expected"), [(0.0, 12), (0.25, 14), (0.24999, 12), (0.5, 14), (1 - 2**-53, 14)]
)
def test_draws_at_the_edges_take_an_id_that_has_weight(share: float, expected: int) -> None:
    ids = torch.arange(10, 17)
    weights = torch.tensor([0.0, 0.0, 1.0, 0.0, 3.0, 0.0, 0.0], dtype=torch.float64)
    assert _draw(ids, weights, [share]) == [expected]


@pytest.mark.parametrize("total", [0.1, 0.3, 1.0, 7.0, 1e-300])
def test_the_last_draw_stays_below_the_total(total: float) -> None:
    weights = torch.tensor([total, 0.0], dtype=torch.float64)
    assert _draw(torch.arange(2), weights, [1 - 2**-53]) == [0]


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


@pytest.mark.parametrize("overrides", [{"top_k": 3}, {"top_p": 0.5}])
def test_ties_at_a_boundary_keep_the_lower_ids(overrides: dict[str, Any]) -> None:
    logits = torch.full((VOCAB_SIZE,), -50.0)
    logits[[3, 8, 21, 33, 40]] = 1.0
    logits[45] = 1.0 if "top_p" in overrides else 2.0
    params = SamplingParams(**overrides)
    ids, _ = truncate(adjust(logits, params, [], 0), params)
    assert ids.tolist() == ([3, 8, 45] if "top_k" in overrides else [3, 8, 21])


def test_top_k_of_one_and_tiny_top_p_are_greedy() -> None:
    for seed in range(10):
        logits = row(seed)
        best = int(logits.argmax())
        assert draw(logits, SamplingParams(top_k=1, seed=seed), 0) == best
        assert draw(logits, SamplingParams(top_p=1e-9, seed=seed), 0) == best
        assert draw(logits, SamplingParams(min_p=1.0, seed=seed), 0) == best


@given(top_p=st.floats(1e-6, 1.0, exclude_max=True), seed=st.integers(0, 1000))
def test_the_nucleus_is_the_smallest_that_reaches_top_p(top_p: float, seed: int) -> None:
    logits = row(seed, spread=4.0)
    params = SamplingParams(top_p=top_p)
    ids, _ = truncate(adjust(logits, params, [], 0), params)
    mass = logits.double().softmax(0)
    assert float(mass[ids].sum()) >= top_p - 1e-12
    assert len(ids) == 1 or float(mass[ids].sum() - mass[ids].min()) < top_p + 1e-12
    outside = torch.ones(VOCAB_SIZE, dtype=torch.bool)
    outside[ids] = False
    assert not outside.any() or mass[outside].max() <= mass[ids].min()


def test_a_top_k_beyond_the_vocabulary_keeps_all() -> None:
    params = SamplingParams(top_k=10**6)
    ids, _ = truncate(adjust(row(1), params, [], 0), params)
    assert len(ids) == VOCAB_SIZE


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
    assert torch.equal(adjust(logits, params, [1, 2, 3], 3), logits.double())


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
    assert (token.token_id, token.logprob) == (3, float(expected[3]))
    assert token.top == tuple((int(i), float(expected[i])) for i in best)


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


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_that_is_not_finite_is_named(value: float, temperature: float) -> None:
    logits = torch.zeros(3, VOCAB_SIZE)
    logits[2, 17] = value
    sequences = [scheduled(SamplingParams(temperature=temperature))] * 3
    with pytest.raises(InternalError, match="row 2 of 3"):
        sample(logits, sequences)


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
