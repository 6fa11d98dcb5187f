"""What follows the projections of latent attention: norm, rotation, append to the paged cache."""

from __future__ import annotations

import torch
from torch import Tensor

from forebay_kernels import native, reference
from forebay_kernels.checks import FLOATS, check_tensor, require
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


def _check_mla(
    kv: Tensor,
    q_pe: Tensor,
    weight: Tensor,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    cache: Tensor,
    slot_mapping: Tensor,
    scale: Tensor | None,
) -> None:
    op, device = "mla_post", kv.device
    check_tensor(op, "kv", kv, dtypes=FLOATS, shape=(None, None), device=device)
    tokens, width = kv.shape
    check_tensor(op, "weight", weight, dtypes=(kv.dtype,), shape=(None,), device=device)
    latent = weight.shape[0]
    require(0 < latent < width, op, "weight", f"{latent} values for rows of {width}")
    shape = (tokens, None, width - latent)
    check_tensor(op, "q_pe", q_pe, dtypes=(kv.dtype,), shape=shape, device=device)
    cache_dtypes = (kv.dtype, E4M3)
    check_tensor(op, "cache", cache, dtypes=cache_dtypes, shape=(None, None, width), device=device)
    for name, tensor in (("kv", kv), ("q_pe", q_pe), ("cache", cache)):
        check_rows(op, name, tensor)
    check_weight(op, "weight", weight, latent, kv)
    check_angles(op, cos, sin, tokens, width - latent, device)
    require(2 * cos.shape[1] == width - latent, op, "cos", "not all of q_pe is rotated")
    require(eps >= 0.0, op, "eps", f"{eps} is negative")
    check_scale(op, "scale", scale, cache)
    check_slot_mapping(op, slot_mapping, tokens, device)
    check_slots(op, slot_mapping, cache)


def _mla_post(
    kv: Tensor,
    q_pe: Tensor,
    weight: Tensor,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    cache: Tensor,
    slot_mapping: Tensor,
    interleaved: bool,
    scale: Tensor | None,
) -> Tensor:
    _check_mla(kv, q_pe, weight, eps, cos, sin, cache, slot_mapping, scale)
    tokens, num_heads, rotated = q_pe.shape
    out = torch.empty_like(q_pe, memory_format=torch.contiguous_format)
    if native.call(
        "mla_post",
        kv.device,
        kv=kv.data_ptr(),
        q_pe=q_pe.data_ptr(),
        weight=weight.data_ptr(),
        cos=cos.data_ptr(),
        sin=sin.data_ptr(),
        slots=slot_mapping.data_ptr(),
        scale=native.address(scale),
        out=out.data_ptr(),
        cache=cache.data_ptr(),
        tokens=tokens,
        num_blocks=cache.shape[0],
        block_size=cache.shape[1],
        kv_stride=kv.stride(0),
        token_stride=q_pe.stride(0),
        head_stride=q_pe.stride(1),
        block_stride=cache.stride(0),
        slot_stride=cache.stride(1),
        num_heads=num_heads,
        latent=weight.shape[0],
        rotated=rotated,
        interleaved=interleaved,
        dtype=native.DTYPE_CODES[kv.dtype],
        cache_dtype=native.DTYPE_CODES[cache.dtype],
        num_threads=torch.get_num_threads(),
        eps=eps,
    ):
        return out
    return reference.mla_post(
        kv, q_pe, weight, eps, cos, sin, cache, slot_mapping, interleaved, scale
    )


def _mla_post_meta(
    kv: Tensor,
    q_pe: Tensor,
    weight: Tensor,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    cache: Tensor,
    slot_mapping: Tensor,
    interleaved: bool,
    scale: Tensor | None,
) -> Tensor:
    _check_mla(kv, q_pe, weight, eps, cos, sin, cache, slot_mapping, scale)
    return torch.empty_like(q_pe, memory_format=torch.contiguous_format)


_MLA_POST = register(
    "mla_post(Tensor kv, Tensor q_pe, Tensor weight, float eps, Tensor cos, Tensor sin,"
    " Tensor(a!) cache, Tensor slot_mapping, bool interleaved, Tensor? scale) -> Tensor",
    _mla_post,
    _mla_post_meta,
)


def mla_post(
    kv: Tensor,
    q_pe: Tensor,
    weight: Tensor,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    cache: Tensor,
    slot_mapping: Tensor,
    *,
    interleaved: bool = True,
    scale: Tensor | None = None,
) -> Tensor:
    """Latent attention: norms the latents, rotates k_pe and q_pe, writes latents and k_pe to their
    slots, returns q_pe.

    kv: [T, L + R], the latent, then k_pe (512 + 64 in DeepSeek's models), rows at any distance.
    q_pe: [T, H, R], any strides but the last. weight: [L], of the latent's RMS norm.
    cos, sin: fp32 [T, R / 2]. cache: [num_blocks, block_size, L + R], in kv's dtype or e4m3.
    slot_mapping, scale: as in qkv_post.

    Returns q_pe rotated, [T, H, R]. Raises ArgumentError.
    """
    out: Tensor = _MLA_POST(
        kv, q_pe, weight, eps, cos, sin, cache, slot_mapping, interleaved, scale
    )
    return out
