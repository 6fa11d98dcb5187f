"""Fresh random inputs, and outputs that show what was not written."""

from __future__ import annotations

import torch
from torch import Tensor

POISON = {1: 0x7B, 2: 0x7FB5, 4: 0x7FB5A5B7, 8: 0x7FB5A5B77B5A5B7B}
"""By size: bytes that are a NaN of that float, and no likely integer."""
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Inputs:
    """Draws from one seed on one device, so that a failure can be run again. A GPU draws other
    numbers than a CPU does."""

    def __init__(self, seed: int, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self._generator = torch.Generator(self.device).manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
        values = torch.randn(shape, generator=self._generator, device=self.device)
        return (values * scale).to(dtype)

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        values = torch.rand(shape, generator=self._generator, device=self.device)
        return values * (high - low) + low

    def integers(
        self, *shape: int, low: int, high: int, dtype: torch.dtype = torch.int64
    ) -> Tensor:
        """In [low, high)."""
        return torch.randint(
            low, high, shape, generator=self._generator, device=self.device, dtype=dtype
        )

    def permutation(self, count: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.randperm(count, generator=self._generator, device=self.device, dtype=dtype)

    def poisoned(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """For outputs: every element is the poison."""
        size = torch.empty((), dtype=dtype).element_size()
        out = torch.empty(shape, dtype=INTEGERS[size], device=self.device)
        return out.fill_(POISON[size]).view(dtype)


def is_poison(tensor: Tensor) -> Tensor:
    """bool, element by element."""
    size = tensor.element_size()
    out: Tensor = tensor.contiguous().view(INTEGERS[size]) == POISON[size]
    return out
