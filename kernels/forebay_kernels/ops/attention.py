"""Attention over the paged cache, and partial attentions put together."""

from __future__ import annotations

import torch
from torch import Tensor

from forebay_kernels import native, reference
from forebay_kernels.checks import FLOATS, check_aligned, check_tensor, require
from forebay_kernels.registry import register

MAX_PARTS = 64


def _check_merge(outs: Tensor, lses: Tensor) -> None:
    op, device = "merge_lse", outs.device
    check_tensor(op, "outs", outs, dtypes=FLOATS, shape=(None,) * 4, device=device)
    parts, tokens, heads, width = outs.shape
    require(1 <= parts <= MAX_PARTS, op, "outs", f"{parts} parts, not 1 to {MAX_PARTS}")
    shape = (parts, tokens, heads)
    check_tensor(op, "lses", lses, dtypes=(torch.float32,), shape=shape, device=device)
    require(width > 0, op, "outs", "heads are empty")
    require(outs[0].is_contiguous(), op, "outs", f"strides {outs.stride()}: parts have gaps")
    require(lses[0].is_contiguous(), op, "lses", f"strides {lses.stride()}: parts have gaps")
    check_aligned(op, "outs", outs)


def _merge_lse(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    out, lse = _merge_lse_meta(outs, lses)
    parts, tokens, heads, width = outs.shape
    if native.call(
        "merge_lse",
        outs.device,
        outs=outs.data_ptr(),
        lses=lses.data_ptr(),
        out=out.data_ptr(),
        lse=lse.data_ptr(),
        parts=parts,
        rows=tokens * heads,
        width=width,
        outs_stride=outs.stride(0),
        lses_stride=lses.stride(0),
        dtype=native.DTYPE_CODES[outs.dtype],
        num_threads=torch.get_num_threads(),
    ):
        return out, lse
    return reference.merge_lse(outs, lses)


def _merge_lse_meta(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    _check_merge(outs, lses)
    return outs.new_empty(outs.shape[1:]), lses.new_empty(lses.shape[1:])


_MERGE_LSE = register(
    "merge_lse(Tensor outs, Tensor lses) -> (Tensor, Tensor)", _merge_lse, _merge_lse_meta
)


def merge_lse(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over all keys from attentions over disjoint parts of them.

    outs: [S, T, H, D], one part after another at any distance, S up to 64: fp32, bf16 or fp16.
    lses: fp32 [S, T, H], the natural logarithm of each part's sum of exponentials. -inf: the part
        saw no key, and its `outs` are not looked at. A NaN or +inf gives NaN.

    Returns (out [T, H, D], lse fp32 [T, H]), summed in fp32 in the order of the parts; zeros and
    -inf where no part saw a key. Raises ArgumentError.
    """
    out: tuple[Tensor, Tensor] = _MERGE_LSE(outs, lses)
    return out
