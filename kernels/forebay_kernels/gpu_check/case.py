"""One row of the benchmark: an op at a shape, its floor, what it is compared with."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from forebay_kernels.testkit import Inputs

COPY_BYTES_PER_S = 4.3e12
"""Measured on an H200: a device-to-device copy, bytes read plus bytes written."""
BF16_FLOP_PER_S = 790e12
"""Measured on an H200: a bf16 matrix product."""

Arguments = tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Peer:
    """What else computes the same from the same arguments. `module`: what must be importable;
    `prepare` gives the function and may raise whatever an unfitting version of it raises.
    graph: whether it can be captured (one that waits for the device cannot)."""

    name: str
    prepare: Callable[[], Callable[..., Any]]
    module: str = "torch"
    graph: bool = True

    def missing(self) -> str | None:
        """Why it is not there."""
        found = importlib.util.find_spec(self.module) is not None
        return None if found else f"{self.module} is not installed"


def imported(module: str, name: str) -> Callable[..., Any]:
    """A peer's function, looked up when it is wanted: it may be absent."""
    function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return function


@dataclass(frozen=True, slots=True)
class Target:
    """share: of the floor's rate that must be reached; times: how many times faster than each
    peer."""

    share: float | None = None
    seconds: float | None = None
    times: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))

    def __str__(self) -> str:
        parts = [] if self.share is None else [f">= {self.share * 100:.0f} % of floor"]
        if self.seconds is not None:
            parts.append(f"<= {self.seconds * 1e6:g} us")
        parts += [f">= {ratio:g}x {peer}" for peer, ratio in self.times.items()]
        return ", ".join(parts)


@dataclass(frozen=True, slots=True)
class Case:
    """inputs: fresh arguments on the device of its Inputs; run: the op; check: raises
    AssertionError, given arguments that `run` has had and what it returned. num_bytes: the fewest
    that device memory must move; num_flops likewise. Arguments may be written by `run`: twice on
    the same ones must be right too, and so must be `check` on what two runs left."""

    op: str
    shape: str
    num_bytes: int
    inputs: Callable[[Inputs], Arguments]
    run: Callable[..., Any]
    check: Callable[[Arguments, Any], None]
    num_flops: int = 0
    target: Target = Target()
    peers: tuple[Peer, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.op} {self.shape}"

    @property
    def floor_s(self) -> float:
        return floor_s(self.num_bytes, self.num_flops)


def floor_s(num_bytes: int, num_flops: int) -> float:
    return max(num_bytes / COPY_BYTES_PER_S, num_flops / BF16_FLOP_PER_S)


def bytes_of(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def dtype_name(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
