"""CRC-32C in plain torch.

A CRC is kept as its register holds it, lowest bit first: bit 31 - i is the coefficient of x^i. The
register that a message leaves behind when it starts from 0 is linear in the message and does not
see zeros in front of it; `crc32c` adds what the usual start and end values make of it.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

_POLYNOMIAL = 0x82F63B78
_ONES = 0xFFFFFFFF
_STRETCH = 64
"""Bytes that are taken two at a time; all stretches of a message go in step."""


def crc32c(data: Tensor) -> int:
    """Of uint8 [N], on any device."""
    size = data.numel()
    if size == 0:
        return 0
    started = _multiply(_ONES, _power_of_x(8 * size))
    return _register_after(data) ^ started ^ _ONES


def _register_after(data: Tensor) -> int:
    padded = F.pad(data.reshape(-1), (-data.numel() % _STRETCH, 0))
    words = padded.view(torch.int16).view(-1, _STRETCH // 2).T.long() & 0xFFFF
    table = _table_of_words(data.device)
    registers = torch.zeros_like(words[0])
    for word in words:
        registers = table[registers & 0xFFFF ^ word] ^ registers >> 16
    size = _STRETCH
    while registers.numel() > 1:
        pairs = F.pad(registers, (registers.numel() % 2, 0)).view(-1, 2)
        registers = _followed_by_zeros(pairs[:, 0], size) ^ pairs[:, 1]
        size *= 2
    return int(registers)


def _followed_by_zeros(registers: Tensor, num_bytes: int) -> Tensor:
    tables = _tables_of_zeros(num_bytes, registers.device)
    out = tables[0][registers & 0xFF]
    for i in range(1, 4):
        out = out ^ tables[i][registers >> 8 * i & 0xFF]
    return out


@cache
def _table_of_words(device: torch.device) -> Tensor:
    """int64 [2^16]: the register that two bytes leave behind."""
    return _linear([_multiply(1 << bit, _power_of_x(16)) for bit in range(16)]).to(device)


@cache
def _tables_of_zeros(num_bytes: int, device: torch.device) -> Tensor:
    """int64 [4, 256]: each byte of a register after so many zeros."""
    power = _power_of_x(8 * num_bytes)
    images = [_multiply(1 << bit, power) for bit in range(32)]
    return torch.stack([_linear(images[i : i + 8]) for i in range(0, 32, 8)]).to(device)


def _linear(images: list[int]) -> Tensor:
    """int64 [2^len(images)]: the sum of the images of each index's bits."""
    table = torch.zeros(1, dtype=torch.int64)
    for image in images:
        table = torch.cat([table, table ^ image])
    return table


def _power_of_x(exponent: int) -> int:
    out, square = 1 << 31, 1 << 30
    while exponent:
        if exponent & 1:
            out = _multiply(out, square)
        square = _multiply(square, square)
        exponent >>= 1
    return out


def _multiply(a: int, b: int) -> int:
    """a * b modulo the polynomial."""
    out = 0
    for bit in range(31, -1, -1):
        if a >> bit & 1:
            out ^= b
        b = b >> 1 ^ (_POLYNOMIAL if b & 1 else 0)
    return out
