"""KV of a request between a paged cache and one buffer for the wire, in plain torch.

Cache: [L, P, num_blocks, block_size, H, D]. Tokens stand in the coordinates of the block table:
token t is in slot t % block_size of block block_table[t // block_size].

Payload, raw: the elements [L, P, T, H, D]. With the fp8 codec: e4m3 codes [L, P, T, H, D], then
fp32 scales [L, P, T, H, G], G = ceil(D / 128): groups of one head, so that a head's bytes are the
same whatever other heads go with it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from forebay_kernels.reference.fp8 import dequantise_groups, quantise_groups

GROUP = 128


def pack_kv(
    cache: Tensor, block_table: Tensor, token_start: int, num_tokens: int, fp8: bool
) -> Tensor:
    """uint8 [bytes]. Tokens of blocks that do not exist (id -1) are zeros. A group with an infinity
    or a NaN has a scale of NaN, and codes of 0."""
    ids, slots, exists = _slots(cache, block_table, token_start, num_tokens)
    rows = cache[:, :, ids, slots].masked_fill_(~exists[:, None, None], 0)
    if not fp8:
        return rows.contiguous().view(torch.uint8).flatten()
    codes, scales = quantise_groups(rows.float(), GROUP)
    lost = scales.isnan().repeat_interleave(GROUP, -1)[..., : codes.shape[-1]]
    numbers = codes.view(torch.uint8).masked_fill_(lost, 0)
    return torch.cat([numbers.flatten(), scales.contiguous().view(torch.uint8).flatten()])


def unpack_kv(
    payload: Tensor,
    cache: Tensor,
    block_table: Tensor,
    token_start: int,
    num_tokens: int,
    fp8: bool,
) -> None:
    """Writes what pack_kv gave; nothing for blocks that do not exist."""
    ids, slots, exists = _slots(cache, block_table, token_start, num_tokens)
    shape = (*cache.shape[:2], num_tokens, *cache.shape[4:])
    payload = payload.clone()  # which begins at a multiple of the elements' size
    if fp8:
        num_codes = cache[:, :, 0, 0].numel() * num_tokens
        codes = payload[:num_codes].view(torch.float8_e4m3fn).view(shape)
        scales = payload[num_codes:].clone().view(torch.float32).view(*shape[:-1], -1)
        values = dequantise_groups(codes, scales, GROUP)
        rows = values.to(cache.dtype)
        bits = rows.view(torch.int32 if rows.dtype == torch.float32 else torch.int16)
        bits.masked_fill_(values.isnan(), torch.iinfo(bits.dtype).max)  # as GPUs write them
    else:
        rows = payload.view(cache.dtype).view(shape)
    cache[:, :, ids[exists], slots[exists]] = rows[:, :, exists]


def _slots(
    cache: Tensor, block_table: Tensor, token_start: int, num_tokens: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Of each token: block (any, where there is none), slot, and whether there is one."""
    num_blocks, block_size = cache.shape[2:4]
    tokens = torch.arange(token_start, token_start + num_tokens, device=block_table.device)
    ids = block_table.long()[tokens // block_size]
    exists = (ids >= 0) & (ids < num_blocks)
    return ids.clamp(0, num_blocks - 1), tokens % block_size, exists
