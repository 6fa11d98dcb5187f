"""A step laid out flat for a forward pass."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch
from torch import Tensor

from forebay.engine.interface import Batch, ScheduledSequence
from forebay_kernels.ops import DecodePlan, PrefillPlan


@dataclass(frozen=True, slots=True)
class StepInputs:
    """T tokens: first one of each decode plan's sequences, then each prefill plan's chunk.

    token_ids, positions, slot_mapping: int64 [T].
    sample_rows: int64 [R], flat indices of the tokens whose logits are wanted.
    sampled: for each of sample_rows the index of its sequence in the batch.
    """

    token_ids: Tensor
    positions: Tensor
    slot_mapping: Tensor
    decode_plans: tuple[DecodePlan, ...]
    prefill_plans: tuple[PrefillPlan, ...]
    sample_rows: Tensor
    sampled: tuple[int, ...]


def build_inputs(
    batch: Batch, block_size: int, dtype: torch.dtype, device: torch.device
) -> StepInputs:
    """dtype: of the KV cache."""
    sequences = batch.sequences
    decode = [i for i, sequence in enumerate(sequences) if sequence.num_tokens == 1]
    decode.sort(key=lambda i: sequences[i].start)
    prefill = [i for i, sequence in enumerate(sequences) if sequence.num_tokens > 1]
    token_ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    sample_rows: list[int] = []
    sampled: list[int] = []
    for i in decode + prefill:
        sequence = sequences[i]
        end = sequence.start + sequence.num_tokens
        assert sequence.num_tokens > 0 and end <= len(sequence.tokens)
        token_ids += sequence.tokens[sequence.start : end]
        positions += range(sequence.start, end)
        slots += slot_range(sequence.block_table, sequence.start, end, block_size)
        if sequence.choices:
            assert end == len(sequence.tokens)
            sample_rows.append(len(token_ids) - 1)
            sampled.append(i)

    def as_tensor(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64).to(device)

    return StepInputs(
        token_ids=as_tensor(token_ids),
        positions=as_tensor(positions),
        slot_mapping=as_tensor(slots),
        decode_plans=tuple(
            DecodePlan.build(
                [sequence.block_table for sequence in group],
                [sequence.start + 1 for sequence in group],
                block_size,
                dtype,
                device,
            )
            for group in _groups_of_like_length([sequences[i] for i in decode])
        ),
        prefill_plans=tuple(
            PrefillPlan.build(s.block_table, s.start, s.num_tokens, block_size, dtype, device)
            for s in (sequences[i] for i in prefill)
        ),
        sample_rows=as_tensor(sample_rows),
        sampled=tuple(sampled),
    )


def slot_range(block_table: Seq[int], start: int, end: int, block_size: int) -> list[int]:
    """Slots (block id * block_size + offset) of tokens [start, end)."""
    return [
        block_table[position // block_size] * block_size + position % block_size
        for position in range(start, end)
    ]


def _groups_of_like_length(ascending: list[ScheduledSequence]) -> list[list[ScheduledSequence]]:
    """Cuts where the context passes twice the group's shortest plus 256 tokens, so that one long
    sequence does not make all others gather and mask as much as it does."""
    groups: list[list[ScheduledSequence]] = []
    for sequence in ascending:
        if groups and sequence.start <= 2 * groups[-1][0].start + 256:
            groups[-1].append(sequence)
        else:
            groups.append([sequence])
    return groups
