"""The operations in plain torch, for every device and dtype: what faster ones are compared with.

T tokens of a step lie flat, one after another. Hq query heads share Hkv key-value heads in groups
of G = Hq / Hkv neighbours; D is the head dimension. Caches are [num_blocks, block_size, Hkv, D].
Sums, exponentials and the softmax run in fp32 whatever the dtype of the tensors is.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from forebay_kernels.plans import DecodePlan, PrefillPlan


def rotary_embedding(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the pairs (x[i], x[i + D/2]) of every head.

    x: [T, H, D], any strides; cos, sin: fp32 [T, D/2], of each token's position times each
    frequency. Returns a new contiguous [T, H, D] in x's dtype.
    """
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    cos, sin = cos[:, None, :], sin[:, None, :]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    out[..., :half] = first * cos - second * sin
    out[..., half:] = second * cos + first * sin
    return out


def append_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """Writes k[t] and v[t] (both [T, Hkv, D], any strides) to slot slot_mapping[t].

    slot_mapping: int64 [T]; slot = block id * block_size + offset; -1 writes nothing. Caches are
    views whose blocks and slots are contiguous.
    """
    if bool((slot_mapping < 0).any()):
        kept = slot_mapping >= 0
        k, v, slot_mapping = k[kept], v[kept], slot_mapping[kept]
    k_cache.view(-1, *k.shape[1:]).index_copy_(0, slot_mapping, k)
    v_cache.view(-1, *v.shape[1:]).index_copy_(0, slot_mapping, v)


def paged_decode(q: Tensor, k_cache: Tensor, v_cache: Tensor, plan: DecodePlan) -> Tensor:
    """One query per sequence over its cached keys and values, scaled by D ** -0.5.

    q: [B, Hq, D]. Returns [B, Hq, D]. The G queries of a group stand where a prompt's positions
    would, so that keys and values are never expanded to Hq heads.
    """
    num_seqs, num_heads, head_dim = q.shape
    num_kv_heads = k_cache.shape[2]
    keys, values = (
        cache.index_select(0, plan.block_tables.flatten())
        .view(num_seqs, -1, num_kv_heads, head_dim)
        .transpose(1, 2)
        for cache in (k_cache, v_cache)
    )
    grouped = q.reshape(num_seqs, num_kv_heads, num_heads // num_kv_heads, head_dim)
    out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=plan.mask)
    return out.reshape(num_seqs, num_heads, head_dim)


def paged_prefill(q: Tensor, k_cache: Tensor, v_cache: Tensor, plan: PrefillPlan) -> Tensor:
    """A chunk's queries over the cached prefix and the chunk itself (already appended).

    q: [num_tokens, Hq, D]. Returns [num_tokens, Hq, D]. Keys and values are seen G times through
    a stride of 0, never copied.
    """
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads = k_cache.shape[2]
    group = num_heads // num_kv_heads
    keys, values = (
        cache.index_select(0, plan.block_table)
        .view(-1, num_kv_heads, head_dim)
        .transpose(0, 1)
        .expand(group, -1, -1, -1)
        for cache in (k_cache, v_cache)
    )
    grouped = q.reshape(num_tokens, num_kv_heads, group, head_dim).permute(2, 1, 0, 3)
    out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=plan.mask)
    return out.permute(2, 1, 0, 3).reshape(num_tokens, num_heads, head_dim)
