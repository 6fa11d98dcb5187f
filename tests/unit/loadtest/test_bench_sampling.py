from __future__ import annotations

import torch

from forebay.core.sampling import SamplingParams
from forebay_kernels.testkit import Inputs
from forebay_loadtest.sampling import agreement, chi_squares, exact_probabilities
from forebay_loadtest.sampling_peers import fp64_by_row, softmax_and_sort

SHAPES = [
    SamplingParams(),
    SamplingParams(top_k=3),
    SamplingParams(top_p=0.5),
    SamplingParams(temperature=0.7, top_k=20, top_p=0.9),
]


def test_every_way_draws_what_the_parameters_keep() -> None:
    torch.manual_seed(0)
    logits = Inputs(1).normal(64, scale=2.0)
    for params in SHAPES:
        kept = exact_probabilities(logits, params)
        assert abs(float(kept.sum()) - 1.0) < 1e-12
        for way in (fp64_by_row, softmax_and_sort):
            drawn = way(logits.expand(400, 64), [params] * 400)
            counts = torch.bincount(torch.tensor(drawn), minlength=64)
            assert not counts[kept == 0.0].any()
            assert (counts / 400 - kept).abs().max() < 0.1


def test_the_report_counts_draws() -> None:
    assert [item["draws"] for item in chi_squares(2000, seed=1)] == [2000] * 6
    for counts in agreement(128, seed=2).values():
        assert counts == {"draws": 128, "different": 0}
