"""The benchmark's cases, at their own shapes on a GPU and at tiny ones on both."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves

from forebay_kernels.gpu_check.case import Case
from forebay_kernels.gpu_check.cases import all_cases
from forebay_kernels.gpu_check.speed import Tally, run_checked
from forebay_kernels.testkit import Inputs

TINY = all_cases(tiny=True)
SEEDS = [torch.seed() % (1 << 31) for _ in range(3)]


@pytest.mark.parametrize("case", TINY, ids=lambda case: case.name)
def test_tiny(case: Case, device: torch.device, library: Tally) -> None:
    for seed in SEEDS:
        run_checked(case, Inputs(seed, device), library)


@pytest.mark.parametrize("case", all_cases(tiny=False), ids=lambda case: case.name)
def test_full(case: Case, device: torch.device, library: Tally) -> None:
    if device.type != "cuda":
        pytest.skip("sizes of a GPU")
    run_checked(case, Inputs(SEEDS[0], device), library)
    torch.cuda.empty_cache()


@pytest.mark.parametrize("case", TINY, ids=lambda case: case.name)
def test_captured_in_a_graph(case: Case, device: torch.device, library: Tally) -> None:
    """Replayed on other numbers in the same places: nothing of a call is fixed at its capture."""
    if device.type != "cuda":
        pytest.skip("graphs are CUDA's")
    arguments = case.inputs(Inputs(SEEDS[0], device))
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        case.run(*arguments)
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = case.run(*arguments)
    _overwrite(arguments, case.inputs(Inputs(SEEDS[1], device)))
    graph.replay()
    torch.cuda.synchronize(device)
    case.check(arguments, result)


@pytest.mark.parametrize("case", TINY, ids=lambda case: case.name)
def test_same_bits_on_a_stream_of_its_own(case: Case, device: torch.device, library: Tally) -> None:
    if device.type != "cuda":
        pytest.skip("streams are CUDA's")
    expected = case.run(*case.inputs(Inputs(SEEDS[0], device)))
    arguments = case.inputs(Inputs(SEEDS[0], device))
    torch.cuda.synchronize(device)
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        actual = case.run(*arguments)
    stream.synchronize()
    for one, other in zip(tree_leaves(actual), tree_leaves(expected), strict=True):
        if isinstance(one, torch.Tensor):
            assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def _overwrite(targets: tuple[Any, ...], sources: tuple[Any, ...]) -> None:
    for target, source in zip(tree_leaves(targets), tree_leaves(sources), strict=True):
        if isinstance(target, torch.Tensor):
            target.copy_(source)
