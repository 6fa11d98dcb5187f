"""Every tensor that Python code allocates without a value, full of poison."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from forebay_kernels.testkit.inputs import INTEGERS, POISON

_ALLOCATORS = ("empty", "empty_like")


@contextmanager
def poisoned_allocations() -> Iterator[None]:
    """While it lasts, torch.empty and torch.empty_like give poison: what an op allocates for its
    outputs and does not write shows (`written`, a NaN, an absurd integer)."""
    originals = {name: getattr(torch, name) for name in _ALLOCATORS}
    for name, original in originals.items():
        setattr(torch, name, _poisoning(original))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(torch, name, original)


def _poisoning(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def allocate_poisoned(*args: Any, **kwargs: Any) -> Tensor:
        out = allocate(*args, **kwargs)
        size = out.element_size()
        if out.device.type != "meta" and size in POISON:
            out.view(INTEGERS[size]).fill_(POISON[size])
        return out

    return allocate_poisoned
