"""How long a call takes on the device: captured into a CUDA graph, replayed, the median taken."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from forebay_kernels.gpu_check.case import Arguments

ROTATED_BYTES = 180e6
"""Inputs of one round together, three times an H200's second-level cache: every call finds its own
in device memory."""
MAX_SETS = 256
MIN_ROUNDS, MAX_ROUNDS = 11, 101

Pass = Callable[[], None]


@dataclass(frozen=True, slots=True)
class Contender:
    """graph: whether `run` can be captured."""

    name: str
    run: Callable[..., Any]
    graph: bool = True


@dataclass(frozen=True, slots=True)
class Timing:
    """seconds: of one call, median over the rounds; low, high: the 10th and 90th percentile.
    how: `graph`, `eager` (launches included) or `cpu`."""

    seconds: float
    low: float
    high: float
    rounds: int
    how: str


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a contender has no time."""

    reason: str


def num_sets(bytes_each: int) -> int:
    return max(2, min(MAX_SETS, -(-int(ROTATED_BYTES) // max(bytes_each, 1))))


def compare(
    contenders: Sequence[Contender],
    sets: Sequence[Arguments],
    device: torch.device,
    budget_s: float,
) -> dict[str, Timing | Failure]:
    """Rounds in turn, forwards and backwards, so that what drifts (clocks, heat) drifts for all.
    One round of a contender is one call for each set of arguments."""
    outcome: dict[str, Timing | Failure] = {}
    ready: dict[str, tuple[Pass, str]] = {}
    for contender in contenders:
        try:
            ready[contender.name] = _prepare(contender, sets, device)
        except Exception as error:
            outcome[contender.name] = Failure(f"{type(error).__name__}: {str(error)[:300]}")
    samples: dict[str, list[float]] = {name: [] for name in ready}
    began = time.monotonic()
    for number in range(MAX_ROUNDS):
        if number >= MIN_ROUNDS and time.monotonic() - began > budget_s:
            break
        for name in list(ready) if number % 2 == 0 else reversed(list(ready)):
            samples[name].append(_seconds(ready[name][0], device) / len(sets))
    for name, (_, how) in ready.items():
        outcome[name] = _summary(samples[name], how)
    return outcome


def _summary(samples: list[float], how: str) -> Timing:
    tenths = statistics.quantiles(samples, n=10)
    return Timing(statistics.median(samples), tenths[0], tenths[-1], len(samples), how)


def _prepare(
    contender: Contender, sets: Sequence[Arguments], device: torch.device
) -> tuple[Pass, str]:
    def one_pass() -> list[Any]:
        return [contender.run(*arguments) for arguments in sets]

    def eager() -> None:
        one_pass()

    if device.type != "cuda":
        one_pass()
        return eager, "cpu"
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(2):
            one_pass()
    torch.cuda.current_stream(device).wait_stream(side)
    torch.cuda.synchronize(device)
    if not contender.graph:
        return eager, "eager"
    return _Graph(one_pass).replay, "graph"


class _Graph:
    """One pass, captured. The outputs are kept: each call writes to memory of its own."""

    def __init__(self, one_pass: Callable[[], list[Any]]) -> None:
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._outputs = one_pass()
        self._graph.replay()
        torch.cuda.synchronize()

    def replay(self) -> None:
        self._graph.replay()


def _seconds(one_pass: Pass, device: torch.device) -> float:
    if device.type != "cuda":
        began = time.perf_counter()
        one_pass()
        return time.perf_counter() - began
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    one_pass()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3
