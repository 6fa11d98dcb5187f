"""What attention needs to know of a step: computed once, used by every layer.

`mask` and `block_tables` say the same as the lengths; they are laid out ahead so that no layer
builds them again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """B sequences with one query each.

    block_tables: int64 [B, num_blocks], padded with a block of the sequence itself.
    context_lens: int64 [B], the tokens each query sees, its own included.
    mask: [B, 1, 1, num_blocks * block_size] in the cache's dtype: 0 where seen, else -inf.
    """

    block_tables: Tensor
    context_lens: Tensor
    mask: Tensor

    @classmethod
    def build(
        cls,
        block_tables: Sequence[Sequence[int]],
        context_lens: Sequence[int],
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> DecodePlan:
        """Tables may be longer than their context; they are cut to what it covers."""
        counts = [-(-length // block_size) for length in context_lens]
        width = max(counts)
        rows = [
            [*table[:count], *([table[0]] * (width - count))]
            for table, count in zip(block_tables, counts, strict=True)
        ]
        lengths = torch.tensor(context_lens, dtype=torch.int64)
        seen = torch.arange(width * block_size)[None, :] < lengths[:, None]
        return cls(
            block_tables=torch.tensor(rows, dtype=torch.int64).to(device),
            context_lens=lengths.to(device),
            mask=_additive(seen, dtype)[:, None, None, :].to(device),
        )


@dataclass(frozen=True, slots=True)
class PrefillPlan:
    """A chunk of one sequence: tokens [start, start + num_tokens), each seeing all up to itself.

    block_table: int64 [num_blocks], covering start + num_tokens tokens.
    mask: [num_tokens, num_blocks * block_size] in the cache's dtype: 0 where seen, else -inf.
    """

    block_table: Tensor
    start: int
    num_tokens: int
    mask: Tensor

    @classmethod
    def build(
        cls,
        block_table: Sequence[int],
        start: int,
        num_tokens: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> PrefillPlan:
        num_blocks = -(-(start + num_tokens) // block_size)
        positions = torch.arange(start, start + num_tokens)
        seen = torch.arange(num_blocks * block_size)[None, :] <= positions[:, None]
        return cls(
            block_table=torch.tensor(list(block_table[:num_blocks]), dtype=torch.int64).to(device),
            start=start,
            num_tokens=num_tokens,
            mask=_additive(seen, dtype).to(device),
        )


def _additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, float("-inf"))
