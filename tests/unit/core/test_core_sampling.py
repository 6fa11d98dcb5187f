from __future__ import annotations

from dataclasses import replace

import pytest

from forebay.core import sampling
from forebay.core.errors import InvalidRequest
from forebay.core.sampling import SamplingParams

VOCAB = 100
NAN, INF = float("nan"), float("inf")
OK = SamplingParams()


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("temperature", (0.0, 1e-4, 2.0)),
        ("top_p", (1e-9, 1.0)),
        ("min_p", (0.0, 1.0)),
        ("presence_penalty", (-2.0, 2.0)),
        ("frequency_penalty", (-2.0, 2.0)),
        ("repetition_penalty", (1e-3, 10.0)),
        ("top_k", (0, 2**31 - 1)),
        ("n", (1, sampling.MAX_CHOICES)),
        ("max_tokens", (1, 2**31 - 1)),
        ("seed", (-(2**63), 2**64 - 1)),
        ("top_logprobs", (None, 0, sampling.MAX_TOP_LOGPROBS)),
        ("stop", ((), ("x",) * sampling.MAX_STOP_STRINGS, ("x" * 256,))),
        ("stop_token_ids", ((), (0, VOCAB - 1), (1,) * sampling.MAX_STOP_TOKEN_IDS)),
        ("logit_bias", ({}, {0: -100.0, VOCAB - 1: 100.0})),
    ],
)
def test_the_ends_of_every_range_are_good(name: str, values: tuple[object, ...]) -> None:
    for value in values:
        replace(OK, **{name: value}).validate(VOCAB)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("temperature", (-0.1, 2.1, NAN, INF, -INF)),
        ("top_p", (0.0, -1.0, 1.1, NAN)),
        ("min_p", (-0.1, 1.1, NAN)),
        ("presence_penalty", (-2.1, 2.1, NAN, INF)),
        ("frequency_penalty", (-2.1, 2.1, NAN, INF)),
        ("repetition_penalty", (0.0, -1.0, 10.1, NAN, INF)),
        ("top_k", (-1, 2**31)),
        ("n", (0, -1, sampling.MAX_CHOICES + 1)),
        ("max_tokens", (0, -5, 2**31)),
        ("seed", (-(2**63) - 1, 2**64)),
        ("top_logprobs", (-1, sampling.MAX_TOP_LOGPROBS + 1)),
        ("stop", (("",), ("x" * 257,), ("x",) * (sampling.MAX_STOP_STRINGS + 1))),
        ("stop_token_ids", ((-1,), (VOCAB,), (1,) * (sampling.MAX_STOP_TOKEN_IDS + 1))),
        ("logit_bias", ({-1: 0.0}, {VOCAB: 0.0}, {0: 100.1}, {0: NAN}, {0: -INF})),
        ("logit_bias", (dict.fromkeys(range(sampling.MAX_LOGIT_BIAS + 1), 1.0),)),
    ],
)
def test_everything_outside_names_its_field(name: str, values: tuple[object, ...]) -> None:
    for value in values:
        with pytest.raises(InvalidRequest) as caught:
            replace(OK, **{name: value}).validate(VOCAB)
        assert caught.value.param == name
        assert len(caught.value.message) < 300


@pytest.mark.parametrize(
    ("temperature", "greedy"), [(0.0, True), (1e-4, True), (0.0099, True), (0.01, False)]
)
def test_tiny_temperatures_are_greedy(temperature: float, greedy: bool) -> None:
    assert SamplingParams(temperature=temperature).greedy is greedy


def test_penalties_are_noticed() -> None:
    assert not OK.has_penalties
    for name, value in (
        ("presence_penalty", 0.1),
        ("frequency_penalty", -0.1),
        ("repetition_penalty", 1.1),
    ):
        assert replace(OK, **{name: value}).has_penalties
