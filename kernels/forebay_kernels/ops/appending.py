"""Checks that qkv_post and mla_post share: of what is rotated, and of slots of a paged cache."""

from __future__ import annotations

import torch
from torch import Tensor

from forebay_kernels.checks import ArgumentError, check_aligned, check_tensor, require

E4M3 = torch.float8_e4m3fn


def check_rows(op: str, argument: str, tensor: Tensor) -> None:
    require(tensor.stride(-1) == 1, op, argument, f"strides {tensor.stride()}: heads have gaps")
    check_aligned(op, argument, tensor)


def check_weight(op: str, argument: str, weight: Tensor, width: int, like: Tensor) -> None:
    check_tensor(op, argument, weight, dtypes=(like.dtype,), shape=(width,), device=like.device)
    require(weight.is_contiguous(), op, argument, "has gaps")
    check_aligned(op, argument, weight)


def check_angles(
    op: str, cos: Tensor, sin: Tensor, tokens: int, width: int, device: torch.device
) -> None:
    dtypes = (torch.float32,)
    check_tensor(op, "cos", cos, dtypes=dtypes, shape=(tokens, None), device=device)
    check_tensor(op, "sin", sin, dtypes=dtypes, shape=tuple(cos.shape), device=device)
    rotated = 2 * cos.shape[1]
    require(rotated <= width, op, "cos", f"rotates {rotated} of {width} values")
    for name, tensor in (("cos", cos), ("sin", sin)):
        require(tensor.is_contiguous(), op, name, "has gaps")
        check_aligned(op, name, tensor)


def check_scale(op: str, argument: str, scale: Tensor | None, cache: Tensor) -> None:
    if scale is None:
        return
    require(cache.dtype is E4M3, op, argument, f"belongs to fp8 caches, not to {cache.dtype}")
    check_tensor(op, argument, scale, dtypes=(torch.float32,), shape=(1,), device=cache.device)


def check_slot_mapping(op: str, slot_mapping: Tensor, tokens: int, device: torch.device) -> None:
    dtypes, shape = (torch.int64,), (tokens,)
    check_tensor(op, "slot_mapping", slot_mapping, dtypes=dtypes, shape=shape, device=device)
    require(slot_mapping.is_contiguous(), op, "slot_mapping", "has gaps")


def check_slots(op: str, slot_mapping: Tensor, cache: Tensor) -> None:
    """Only where they can be read without waiting for a device."""
    if not slot_mapping.is_cpu or slot_mapping.shape[0] == 0:
        return
    low, high = (int(bound) for bound in torch.aminmax(slot_mapping))
    num_slots = cache.shape[0] * cache.shape[1]
    if low < -1 or high >= num_slots:
        wrong = low if low < -1 else high
        raise ArgumentError(op, "slot_mapping", f"slot {wrong} of a cache of {num_slots}")
