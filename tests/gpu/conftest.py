"""Tests that run on a GPU, and are skipped where there is none. `make gpu-check` runs them by
itself (`--kernel-device=cpu` rehearses them); they need torch, pytest and forebay_kernels alone."""

from __future__ import annotations

import pytest
import torch

from forebay_kernels.gpu_check.speed import Tally, tally
from forebay_kernels.native import libraries


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kernel-device", default="cuda", help="where the kernels run")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    chosen = torch.device(request.config.getoption("kernel_device", "cuda"))
    if chosen.type == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return chosen


@pytest.fixture
def library(device: torch.device) -> Tally:
    kept = libraries.of(device.type)
    yield tally(device)
    libraries.use(device.type, kept)
