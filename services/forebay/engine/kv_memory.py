"""A runner's paged KV memory, and how its content is written down and read back."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence as Seq

import numpy as np
import torch
from torch import Tensor

from forebay.core.errors import ConfigurationError, KvTransferError
from forebay.core.kv_codec import KvCodec
from forebay.engine.interface import KvSlice
from forebay_kernels import ops

_KEY_AND_VALUE = 2


class KvMemory:
    """cache: [layers, 2 (key, value), num_blocks, block_size, kv_heads, head_dim], zeros at first.
    layers: each one's keys and values, views of it."""

    def __init__(
        self,
        *,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Raises ConfigurationError when the device has not that much memory."""
        shape = (num_layers, _KEY_AND_VALUE, num_blocks, block_size, num_kv_heads, head_dim)
        self.cache = _zeroed(shape, dtype, device)
        self.layers = [(layer[0], layer[1]) for layer in self.cache]
        self.block_size = block_size
        self._staging = torch.empty(0, dtype=torch.uint8)
        self._is_staged = not self.cache.is_cpu

    def payload_bytes(self, part: KvSlice, codec: KvCodec) -> int:
        return ops.payload_bytes(
            part.num_layers,
            _KEY_AND_VALUE,
            part.num_tokens,
            part.num_heads,
            self.cache.shape[-1],
            self.cache.itemsize,
            codec.value,
        )

    def pack(
        self, block_table: Seq[int], part: KvSlice, codec: KvCodec, payload: memoryview
    ) -> int:
        """As `Runner.export_kv`."""
        out = _as_tensor(payload)
        packed = self._buffer(out.numel()) if self._is_staged else out
        checksum = ops.kv_pack(
            self._narrowed(part), *self._tokens(block_table, part), packed, codec.value
        )
        if packed is not out:
            out.copy_(packed)
        return checksum

    def unpack(
        self,
        block_table: Seq[int],
        part: KvSlice,
        codec: KvCodec,
        payload: memoryview,
        checksum: int,
    ) -> None:
        """As `Runner.import_kv`."""
        expected = self.payload_bytes(part, codec)
        if payload.nbytes != expected:
            raise KvTransferError(f"KV payload of {payload.nbytes} bytes where {expected} belong")
        packed = _as_tensor(payload)
        if self._is_staged:
            packed = self._buffer(expected).copy_(packed)
        view, tokens = self._narrowed(part), self._tokens(block_table, part)
        if ops.kv_unpack(packed, view, *tokens, codec.value) != checksum:
            zeros = self._buffer(self.payload_bytes(part, KvCodec.RAW)).zero_()
            ops.kv_unpack(zeros, view, *tokens, KvCodec.RAW.value)
            raise KvTransferError("a KV payload is corrupt: its checksum differs")

    def copy_blocks(self, block_copies: Seq[tuple[int, int]]) -> None:
        """(source, destination) block ids; every source is read before any is written."""
        copies = torch.tensor(block_copies, dtype=torch.int64).to(self.cache.device)
        sources, destinations = copies.T
        self.cache.index_copy_(2, destinations, self.cache.index_select(2, sources))

    def _narrowed(self, part: KvSlice) -> Tensor:
        layers = self.cache.narrow(0, part.layer_start, part.num_layers)
        return layers.narrow(4, part.head_start, part.num_heads)

    def _tokens(self, block_table: Seq[int], part: KvSlice) -> tuple[Seq[int], int, int]:
        """Block table, first token and number of tokens, without the blocks before the first."""
        first = part.token_start // self.block_size
        last = -(-part.token_end // self.block_size)
        start = part.token_start - first * self.block_size
        return block_table[first:last], start, part.num_tokens

    def _buffer(self, num_bytes: int) -> Tensor:
        """For one payload at a time; of a GPU's KV, in host memory that it can read and write."""
        if self._staging.numel() < num_bytes:
            pinned = self.cache.is_cuda
            self._staging = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=pinned)
        return self._staging[:num_bytes]


def _as_tensor(buffer: memoryview) -> Tensor:
    """uint8, the same bytes; they must outlive it. By address, because torch warns of buffers that
    are read-only, as what was received is. Nothing is written to such a one."""
    address = np.frombuffer(buffer, np.uint8).ctypes.data
    content = (ctypes.c_uint8 * buffer.nbytes).from_address(address)
    return torch.frombuffer(content, dtype=torch.uint8)


def _zeroed(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros, because a masked slot that was never written must not hold a NaN (0 * NaN is NaN).
    On the CPU through numpy, whose zeros take no memory before they are written; torch's do.
    Raises ConfigurationError when the device has not that much."""
    num_bytes = math.prod(shape) * dtype.itemsize
    try:
        if device.type == "cpu":
            return torch.from_numpy(np.zeros(num_bytes, dtype=np.uint8)).view(dtype).view(shape)
        return torch.zeros(shape, dtype=dtype, device=device)
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise ConfigurationError(
            f"{num_bytes} bytes for KV are more than the {device.type} device has left"
        ) from error
