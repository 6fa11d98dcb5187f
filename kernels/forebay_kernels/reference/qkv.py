"""What follows the q, k and v projections in plain torch: norm per head, rotation, append."""

from __future__ import annotations

import torch
from torch import Tensor

from forebay_kernels.reference.fp8 import E4M3_MAX


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Turns the first R values of every head; x: [T, H, D]; cos, sin: fp32 [T, R / 2].

    Pairs are (x[2i], x[2i + 1]) where interleaved, else (x[i], x[i + R / 2]). Returns fp32.
    """
    half = cos.shape[-1]
    out = x.float().clone()
    if interleaved:
        first, second = out[..., 0 : 2 * half : 2], out[..., 1 : 2 * half : 2]
    else:
        first, second = out[..., :half], out[..., half : 2 * half]
    cos, sin = cos[:, None, :], sin[:, None, :]
    turned = first * cos - second * sin, second * cos + first * sin
    first.copy_(turned[0])
    second.copy_(turned[1])
    return out


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm over the last dimension, in and to fp32."""
    factor = 1.0 / (x.float().square().mean(-1, keepdim=True) + eps).sqrt()
    return x.float() * (factor * weight.float())


def append(cache: Tensor, rows: Tensor, slots: Tensor, scale: Tensor | None) -> None:
    """Writes the fp32 rows [T, ...] to the slots of cache [num_blocks, block_size, ...]; a slot
    outside it is skipped, without asking the device for anything.

    An e4m3 cache gets rows * (1 / scale), each operation rounded as fp32, at most 448 either way.
    """
    num_slots = cache.shape[0] * cache.shape[1]
    if len(slots) == 0 or num_slots == 0:
        return
    if cache.dtype == torch.float8_e4m3fn:
        scaled = rows if scale is None else rows * (1.0 / scale)
        # As bytes: torch does not index every kind of fp8 tensor.
        rows = scaled.clamp(-E4M3_MAX, E4M3_MAX).to(cache.dtype).view(torch.uint8)
        cache = cache.view(torch.uint8)
    kept = (slots >= 0) & (slots < num_slots)
    # A skipped row becomes a second copy of one that is kept; of what lies there, if none is.
    numbers = torch.arange(len(slots), device=slots.device)
    source = torch.where(kept, numbers, kept.to(torch.uint8).argmax())
    slots = slots[source].clamp(0, num_slots - 1)
    places = slots // cache.shape[1], slots % cache.shape[1]
    rows = rows.to(cache.dtype)[source]
    cache.index_put_(places, torch.where(kept.any(), rows, cache[places]))


def qkv_post(
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
    num_kv_heads = k_cache.shape[2]
    num_q_heads = qkv.shape[1] - 2 * num_kv_heads
    q, k, v = qkv.split([num_q_heads, num_kv_heads, num_kv_heads], dim=1)
    q = q if q_weight is None else norm(q, q_weight, eps)
    k = k if k_weight is None else norm(k, k_weight, eps)
    append(k_cache, rotate(k, cos, sin, interleaved), slot_mapping, k_scale)
    append(v_cache, v.float(), slot_mapping, v_scale)
    return rotate(q, cos, sin, interleaved).to(qkv.dtype)


def mla_post(
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
    latent, k_pe = kv.split([len(weight), q_pe.shape[-1]], dim=-1)
    turned = rotate(k_pe[:, None, :], cos, sin, interleaved)[:, 0]
    append(cache, torch.cat((norm(latent, weight, eps), turned), dim=-1), slot_mapping, scale)
    return rotate(q_pe, cos, sin, interleaved).to(q_pe.dtype)
