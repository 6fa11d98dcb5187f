"""What follows the q, k and v projections: norm per head, rotation, append to the paged cache."""

from __future__ import annotations

import torch
from torch import Tensor

from forebay_kernels import native, reference
from forebay_kernels.checks import FLOATS, check_tensor, is_aligned, plain, require
from forebay_kernels.ops.appending import (
    E4M3,
    check_angles,
    check_rows,
    check_scale,
    check_slot_mapping,
    check_slots,
    check_weight,
)
from forebay_kernels.registry import register


def _check_qkv(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> None:
    op, device = "qkv_post", qkv.device
    if not (
        len(shape := qkv.shape) == 3
        and len(cache_shape := k_cache.shape) == 4
        and v_cache.shape == cache_shape
        and shape[2] == cache_shape[3] > 0
        and shape[1] >= 2 * cache_shape[2]
        and qkv.dtype in FLOATS
        and _is_plain_rows(qkv, qkv.dtype, device)
        and (k_cache.dtype is qkv.dtype or k_cache.dtype is E4M3)
        and _is_plain_rows(k_cache, k_cache.dtype, device)
        and _is_plain_rows(v_cache, k_cache.dtype, device)
        and _are_plain_angles(cos, sin, shape[0], shape[2], device)
        and _are_plain_slots(slot_mapping, shape[0], device)
        and (q_weight is None or (q_weight.shape == shape[2:] and plain(q_weight, qkv)))
        and (k_weight is None or (k_weight.shape == shape[2:] and plain(k_weight, qkv)))
        and eps >= 0.0
        and k_scale is None
        and v_scale is None
    ):
        _check_each_of_qkv(
            qkv, cos, sin, k_cache, v_cache, slot_mapping, q_weight, k_weight, eps, k_scale, v_scale
        )
    check_slots(op, slot_mapping, k_cache)


def _check_each_of_qkv(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> None:
    op, device = "qkv_post", qkv.device
    check_tensor(op, "qkv", qkv, dtypes=FLOATS, shape=(None, None, None), device=device)
    tokens, num_heads, width = qkv.shape
    require(width > 0, op, "qkv", "heads are empty")
    cache_dtypes = (qkv.dtype, E4M3)
    shape = (None, None, None, width)
    check_tensor(op, "k_cache", k_cache, dtypes=cache_dtypes, shape=shape, device=device)
    cache_shape = tuple(k_cache.shape)
    check_tensor(op, "v_cache", v_cache, dtypes=(k_cache.dtype,), shape=cache_shape, device=device)
    for name, tensor in (("qkv", qkv), ("k_cache", k_cache), ("v_cache", v_cache)):
        check_rows(op, name, tensor)
    least = 2 * cache_shape[2]
    require(num_heads >= least, op, "qkv", f"{num_heads} heads where the caches take {least}")
    check_angles(op, cos, sin, tokens, width, device)
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        if weight is not None:
            check_weight(op, name, weight, width, qkv)
    require(eps >= 0.0, op, "eps", f"{eps} is negative")
    check_scale(op, "k_scale", k_scale, k_cache)
    check_scale(op, "v_scale", v_scale, v_cache)
    check_slot_mapping(op, slot_mapping, tokens, device)


def _is_plain_rows(tensor: Tensor, dtype: torch.dtype, device: torch.device) -> bool:
    return (
        tensor.dtype is dtype
        and tensor.device == device
        and (tensor.is_contiguous() or tensor.stride(-1) == 1)
        and is_aligned(tensor)
    )


def _are_plain_angles(
    cos: Tensor, sin: Tensor, tokens: int, width: int, device: torch.device
) -> bool:
    shape = cos.shape
    return (
        len(shape) == 2
        and shape[0] == tokens
        and 2 * shape[1] <= width
        and sin.shape == shape
        and cos.dtype is torch.float32
        and cos.device == device
        and plain(cos, cos)
        and plain(sin, cos)
    )


def _are_plain_slots(slot_mapping: Tensor, tokens: int, device: torch.device) -> bool:
    return (
        slot_mapping.dtype is torch.int64
        and slot_mapping.device == device
        and slot_mapping.shape == (tokens,)
        and slot_mapping.is_contiguous()
    )


def _qkv_post(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    interleaved: bool,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> Tensor:
    _check_qkv(
        qkv, cos, sin, k_cache, v_cache, slot_mapping, q_weight, k_weight, eps, k_scale, v_scale
    )
    tokens, num_heads, head_dim = qkv.shape
    num_blocks, block_size, num_kv_heads, _ = k_cache.shape
    token_stride, head_stride, _ = qkv.stride()
    k_block_stride, k_slot_stride, k_head_stride, _ = k_cache.stride()
    v_block_stride, v_slot_stride, v_head_stride, _ = v_cache.stride()
    num_q_heads = num_heads - 2 * num_kv_heads
    q = qkv.new_empty((tokens, num_q_heads, head_dim))
    if native.call(
        "qkv_post",
        qkv.device,
        qkv=qkv.data_ptr(),
        cos=cos.data_ptr(),
        sin=sin.data_ptr(),
        slots=slot_mapping.data_ptr(),
        q_weight=native.address(q_weight),
        k_weight=native.address(k_weight),
        k_scale=native.address(k_scale),
        v_scale=native.address(v_scale),
        q=q.data_ptr(),
        k_cache=k_cache.data_ptr(),
        v_cache=v_cache.data_ptr(),
        tokens=tokens,
        num_blocks=num_blocks,
        block_size=block_size,
        token_stride=token_stride,
        head_stride=head_stride,
        k_block_stride=k_block_stride,
        k_slot_stride=k_slot_stride,
        k_head_stride=k_head_stride,
        v_block_stride=v_block_stride,
        v_slot_stride=v_slot_stride,
        v_head_stride=v_head_stride,
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rotated=2 * cos.shape[1],
        interleaved=interleaved,
        dtype=native.DTYPE_CODES[qkv.dtype],
        cache_dtype=native.DTYPE_CODES[k_cache.dtype],
        num_threads=torch.get_num_threads(),
        eps=eps,
    ):
        return q
    return reference.qkv_post(
        qkv, cos, sin, k_cache, v_cache, slot_mapping, q_weight, k_weight, eps, interleaved,
        k_scale, v_scale,
    )  # fmt: skip


def _qkv_post_meta(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    interleaved: bool,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> Tensor:
    _check_qkv(
        qkv, cos, sin, k_cache, v_cache, slot_mapping, q_weight, k_weight, eps, k_scale, v_scale
    )
    return qkv.new_empty((qkv.shape[0], qkv.shape[1] - 2 * k_cache.shape[2], qkv.shape[2]))


_QKV_POST = register(
    "qkv_post(Tensor qkv, Tensor cos, Tensor sin, Tensor(a!) k_cache, Tensor(b!) v_cache,"
    " Tensor slot_mapping, Tensor? q_weight, Tensor? k_weight, float eps, bool interleaved,"
    " Tensor? k_scale, Tensor? v_scale) -> Tensor",
    _qkv_post,
    _qkv_post_meta,
)


def qkv_post(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    *,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 0.0,
    interleaved: bool = False,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """Rotates q and k, writes k and v to their slots, returns q.

    qkv: [T, Hq + 2 Hkv, D], the heads of q, then k, then v: fp32, bf16 or fp16; D without gaps.
    cos, sin: fp32 [T, R / 2], of each token's position times each frequency. The first R <= D
        values of a head are rotated in pairs (i, i + R / 2), or (2i, 2i + 1) where interleaved.
    k_cache, v_cache: [num_blocks, block_size, Hkv, D], any strides but D's, in qkv's dtype or
        e4m3.
    slot_mapping: int64 [T], block * block_size + offset; -1 writes nothing. A slot outside the
        cache is an error on a CPU, and writes nothing on a GPU. No two tokens share a slot.
    q_weight, k_weight: [D], in qkv's dtype: every head is RMS-normed with it and eps before it is
        rotated.
    k_scale, v_scale: fp32 [1] on the device, 1 where missing, for e4m3 caches: these hold
        e4m3(value * (1 / scale)), both operations rounded as fp32; beyond 448 counts as 448, NaN
        stays NaN.

    All of it is computed in fp32 and rounded once. Returns q: [T, Hq, D] in qkv's dtype. Raises
    ArgumentError.
    """
    out: Tensor = _QKV_POST(
        qkv, cos, sin, k_cache, v_cache, slot_mapping, q_weight, k_weight, eps, interleaved,
        k_scale, v_scale,
    )  # fmt: skip
    return out
