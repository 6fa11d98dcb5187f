"""kv_pack and kv_unpack: the KV of a request of Llama-8B between its blocks and the wire."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from forebay_kernels import ops, reference
from forebay_kernels.gpu_check.case import Arguments, Case, Peer, Target
from forebay_kernels.testkit import Inputs, error_of

_CODECS = {"raw": 0, "fp8": 1}
_START = 3
"""First token, inside the first block."""


@dataclass(frozen=True, slots=True)
class _Layout:
    """Of the cache; head_major: blocks are [head, slot], seen as [slot, head]. first_head: of the
    heads that are moved, all others stay (tensor parallelism of another size)."""

    layers: int
    tokens: int
    heads: int
    head_dim: int
    block_size: int
    head_major: bool = False
    first_head: int = 0
    num_heads: int = 0

    @property
    def moved(self) -> int:
        return self.num_heads or self.heads

    @property
    def elements(self) -> int:
        return self.layers * 2 * self.tokens * self.moved * self.head_dim

    @property
    def name(self) -> str:
        order = "head-major" if self.head_major else "token-major"
        heads = f"{self.moved} of {self.heads}" if self.num_heads else f"{self.heads}"
        return (
            f"{self.tokens} tokens {self.layers}x2x{heads}x{self.head_dim} bf16"
            f" block {self.block_size} {order}"
        )

    def cache(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """The view that is moved, and the block table: int64 on the device."""
        needed = -(-(_START + self.tokens) // self.block_size)
        num_blocks = needed + 5
        inner = (self.block_size, self.heads)
        block = inner[::-1] if self.head_major else inner
        shape = (self.layers, 2, num_blocks, *block, self.head_dim)
        cache = inputs.normal(*shape, dtype=torch.bfloat16)
        cache = cache.transpose(3, 4) if self.head_major else cache
        view = cache.narrow(4, self.first_head, self.moved)
        return view, inputs.permutation(num_blocks)[:needed]


def cases(tiny: bool) -> list[Case]:
    if tiny:
        layouts = [
            _Layout(2, 21, 4, 64, 16),
            _Layout(2, 21, 4, 64, 16, head_major=True),
            _Layout(2, 40, 4, 128, 64, first_head=2, num_heads=2),
        ]
    else:
        layouts = [
            _Layout(32, 4096, 8, 128, 16),
            _Layout(32, 4096, 8, 128, 16, head_major=True),
            _Layout(32, 4096, 8, 128, 64, first_head=4, num_heads=4),
        ]
    packs = [_pack(layout, codec) for layout in layouts for codec in _CODECS]
    return packs + [_unpack(layout, codec) for layout in layouts for codec in _CODECS]


def _payload_bytes(layout: _Layout, codec: str) -> int:
    return ops.payload_bytes(
        layout.layers, 2, layout.tokens, layout.moved, layout.head_dim, 2, codec
    )


def _target(layout: _Layout, codec: str) -> Target:
    if layout.tokens < 4096:
        return Target()
    permuted = codec == "raw" and (layout.head_major or layout.num_heads > 0)
    return Target(share=0.9 if codec == "raw" else 0.85, times={"torch": 10.0} if permuted else {})


def _pack(layout: _Layout, codec: str) -> Case:
    def draw(inputs: Inputs) -> Arguments:
        cache, table = layout.cache(inputs)
        out = inputs.poisoned(_payload_bytes(layout, codec), dtype=torch.uint8)
        crc = inputs.poisoned(1, dtype=torch.int32)
        return cache, table, layout.tokens, _CODECS[codec], out, crc

    return Case(
        op="kv_pack",
        shape=f"{layout.name} {codec}",
        num_bytes=2 * layout.elements + _payload_bytes(layout, codec),
        inputs=draw,
        run=_run_pack,
        check=_check_pack,
        target=_target(layout, codec),
        peers=(Peer("torch", lambda: _torch_pack),) if codec == "raw" else (),
    )


def _run_pack(
    cache: Tensor, table: Tensor, tokens: int, codec: int, out: Tensor, crc: Tensor
) -> tuple[Tensor, Tensor]:
    torch.ops.forebay.kv_pack(cache, table, _START, tokens, codec, out, crc)
    return out, crc


def _check_pack(arguments: Arguments, result: Any) -> None:
    """The very bytes of the reference, and their CRC-32C."""
    cache, table, tokens, codec, _, _ = arguments
    out, crc = result
    wanted = reference.pack_kv(cache, table, _START, tokens, codec == _CODECS["fp8"])
    assert torch.equal(out, wanted), f"{int((out != wanted).sum())} bytes differ"
    assert int(crc) & 0xFFFFFFFF == reference.crc32c(wanted), "the checksum is another"


def _torch_pack(cache: Tensor, table: Tensor, tokens: int, *_: Any) -> Tensor:
    """index_select, then the tokens in order: what permutes them."""
    blocks = cache.index_select(2, table)
    rows = blocks.flatten(2, 3) if blocks.is_contiguous() else blocks.contiguous().flatten(2, 3)
    return rows[:, :, _START : _START + tokens].contiguous()


def _unpack(layout: _Layout, codec: str) -> Case:
    fp8 = codec == "fp8"

    def draw(inputs: Inputs) -> Arguments:
        cache, table = layout.cache(inputs)
        elements = inputs.normal(
            layout.layers, 2, layout.tokens, layout.moved, layout.head_dim, dtype=torch.bfloat16
        )
        if not fp8:
            payload = elements.view(torch.uint8).flatten()
        else:
            codes, scales = reference.quantise_groups(elements.float(), 128)
            parts = (codes.view(torch.uint8).flatten(), scales.view(torch.uint8).flatten())
            payload = torch.cat(parts)
        crc = inputs.poisoned(1, dtype=torch.int32)
        return payload, cache, table, layout.tokens, _CODECS[codec], crc

    return Case(
        op="kv_unpack",
        shape=f"{layout.name} {codec}",
        num_bytes=2 * layout.elements + _payload_bytes(layout, codec),
        inputs=draw,
        run=_run_unpack,
        check=_check_unpack,
        target=_target(layout, codec),
        peers=(Peer("torch", lambda: _torch_unpack),) if not fp8 else (),
    )


def _run_unpack(
    payload: Tensor, cache: Tensor, table: Tensor, tokens: int, codec: int, crc: Tensor
) -> Tensor:
    torch.ops.forebay.kv_unpack(payload, cache, table, _START, tokens, codec, crc)
    return crc


def _check_unpack(arguments: Arguments, crc: Any) -> None:
    payload, cache, table, tokens, codec, _ = arguments
    block_size = cache.shape[3]
    positions = torch.arange(_START, _START + tokens, device=cache.device)
    found = cache[:, :, table[positions // block_size], positions % block_size]
    if codec == _CODECS["raw"]:
        assert torch.equal(found.contiguous().view(torch.uint8).flatten(), payload)
    else:
        codes = payload[: found.numel()].view(torch.float8_e4m3fn).view(found.shape)
        scales = payload[found.numel() :].clone().view(torch.float32).view(*found.shape[:-1], -1)
        wanted = reference.dequantise_groups(codes, scales, 128)
        assert error_of(found, wanted.double()).relative < 4e-3
    assert int(crc) & 0xFFFFFFFF == reference.crc32c(payload), "the checksum is another"


def _torch_unpack(payload: Tensor, cache: Tensor, table: Tensor, tokens: int, *unused: Any) -> None:
    """Whole blocks by index_copy_, of the payload in the cache's order."""
    layers, planes, _, block_size, heads, head_dim = cache.shape
    rows = payload.view(cache.dtype).view(layers, planes, tokens, heads, head_dim)
    whole = tokens // block_size
    blocks = rows[:, :, : whole * block_size].unflatten(2, (whole, block_size))
    cache.index_copy_(2, table[:whole], blocks)
