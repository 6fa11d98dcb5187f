from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forebay.core.sampling import SamplingParams
from forebay.engine.interface import Batch, ScheduledSequence
from forebay.engine.profile import LLAMA2_70B_H100_TP8, StepProfile

PROFILE = StepProfile(((100, 1.0), (400, 2.0)), 0.5, 0.01, 0.001)


def scheduled(start: int, num_tokens: int, num_prompt_tokens: int) -> ScheduledSequence:
    return ScheduledSequence(
        tokens=[0] * (start + num_tokens),
        num_prompt_tokens=num_prompt_tokens,
        start=start,
        num_tokens=num_tokens,
        block_table=[],
        params=SamplingParams(),
        choices=(),
    )


@pytest.mark.parametrize(
    ("num_tokens", "seconds"),
    [(0, 0.0), (50, 0.5), (100, 1.0), (200, 2**0.5), (400, 2.0), (800, 4.0)],
)
def test_prefill_interpolates_between_its_points(num_tokens: int, seconds: float) -> None:
    assert PROFILE.prefill(num_tokens) == pytest.approx(seconds)


@given(st.lists(st.integers(1, 3000), min_size=1, max_size=6))
def test_chunks_of_a_prompt_cost_what_the_whole_costs(chunks: list[int]) -> None:
    total = sum(chunks)
    seconds, start = 0.0, 0
    for chunk in chunks:
        seconds += LLAMA2_70B_H100_TP8.step(Batch((scheduled(start, chunk, total),)))
        start += chunk
    assert seconds == pytest.approx(LLAMA2_70B_H100_TP8.prefill(total))


@given(st.integers(1, 20_000))
def test_more_tokens_take_longer(num_tokens: int) -> None:
    profile = LLAMA2_70B_H100_TP8
    assert 0 < profile.prefill(num_tokens) < profile.prefill(num_tokens + 1)


def test_decoding_costs_once_and_by_sequence_and_context() -> None:
    batch = Batch((scheduled(99, 1, 10), scheduled(199, 1, 10)))
    assert PROFILE.step(batch) == pytest.approx(0.5 + 2 * 0.01 + 300 * 0.001)


def test_a_prompt_of_one_token_is_no_decode_step() -> None:
    assert PROFILE.step(Batch((scheduled(0, 1, 1),))) == pytest.approx(0.01)
    mixed = Batch((scheduled(0, 100, 100), scheduled(9, 1, 5)))
    assert PROFILE.step(mixed) == pytest.approx(1.0 + 0.5 + 0.01 + 10 * 0.001)
