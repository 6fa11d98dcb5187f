"""Payloads are what the memory holds, by token and not by block, and go into any other memory."""

from __future__ import annotations

import random
import warnings

import pytest
import torch
from crc32c import crc32c
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from forebay.core.errors import KvTransferError
from forebay.core.kv_codec import KvCodec
from forebay.engine.interface import KvSlice
from forebay.engine.kv_memory import KvMemory

LAYERS, HEADS = 3, 4
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def kv_memory(
    *, block_size: int, head_dim: int = 8, dtype: torch.dtype = torch.float32, num_tokens: int = 64
) -> KvMemory:
    """Of random numbers, so that whatever is not written shows."""
    memory = KvMemory(
        num_layers=LAYERS,
        num_blocks=-(-num_tokens // block_size) + 2,
        block_size=block_size,
        num_kv_heads=HEADS,
        head_dim=head_dim,
        dtype=dtype,
        device=torch.device("cpu"),
    )
    assert not memory.cache.any()
    memory.cache.copy_(torch.randn(memory.cache.shape))
    return memory


def table_of(memory: KvMemory, seed: int) -> list[int]:
    blocks = list(range(memory.cache.shape[2]))
    random.Random(seed).shuffle(blocks)
    return blocks


def tokens_of(memory: KvMemory, table: list[int], part: KvSlice) -> Tensor:
    """[layers, 2, tokens, heads, head_dim], by plain indexing."""
    size = memory.block_size
    rows = [
        memory.cache[:, :, table[token // size], token % size]
        for token in range(part.token_start, part.token_end)
    ]
    layers = slice(part.layer_start, part.layer_end)
    return torch.stack(rows, 2)[layers, :, :, part.head_start : part.head_end]


def packed(memory: KvMemory, table: list[int], part: KvSlice, codec: KvCodec) -> bytes:
    """Behind a few other bytes, as in a message: nothing is aligned there."""
    message = bytearray(b"\xaa" * (7 + memory.payload_bytes(part, codec) + 5))
    payload = memoryview(message)[7:-5]
    assert memory.pack(table, part, codec, payload) == crc32c(payload)
    assert message[:7] == b"\xaa" * 7 and message[-5:] == b"\xaa" * 5
    return bytes(payload)


def unpack(
    memory: KvMemory, table: list[int], part: KvSlice, codec: KvCodec, payload: bytes
) -> None:
    message = b"\xbb" * 3 + payload
    memory.unpack(table, part, codec, memoryview(message)[3:], crc32c(payload))
    assert message == b"\xbb" * 3 + payload


def as_received(values: Tensor, codec: KvCodec, dtype: torch.dtype) -> Tensor:
    """What comes out at the other end; by the definition in worker.proto."""
    if codec is KvCodec.RAW:
        return values
    groups = values.float().split(128, dim=-1)
    received = []
    for group in groups:
        largest = group.abs().amax(-1, keepdim=True)
        inverse = torch.full_like(largest, 448.0) / largest
        codes = (group * inverse).clamp(-448, 448).to(torch.float8_e4m3fn)
        received.append(codes.float() * (largest / 448.0))
    return torch.cat(received, -1).to(dtype)


@st.composite
def parts(draw: st.DrawFn) -> KvSlice:
    layer, head = draw(st.integers(0, LAYERS - 1)), draw(st.integers(0, HEADS - 1))
    return KvSlice(
        layer_start=layer,
        num_layers=draw(st.integers(1, LAYERS - layer)),
        token_start=draw(st.integers(0, 40)),
        num_tokens=draw(st.integers(1, 24)),
        head_start=head,
        num_heads=draw(st.integers(1, HEADS - head)),
    )


@settings(max_examples=50)
@given(
    part=parts(),
    sizes=st.tuples(st.sampled_from([1, 3, 4, 16]), st.sampled_from([1, 4, 5, 32])),
    dtype=st.sampled_from(DTYPES),
    codec=st.sampled_from(KvCodec),
    head_dim=st.sampled_from([8, 64, 160]),
    seed=st.integers(0, 2**31),
)
def test_what_was_packed_arrives_between_any_block_sizes(
    part: KvSlice,
    sizes: tuple[int, int],
    dtype: torch.dtype,
    codec: KvCodec,
    head_dim: int,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    source, target = (kv_memory(block_size=size, dtype=dtype, head_dim=head_dim) for size in sizes)
    tables = table_of(source, seed), table_of(target, seed + 1)
    before = target.cache.clone()
    payload = packed(source, tables[0], part, codec)
    sent = tokens_of(source, tables[0], part)
    if codec is KvCodec.RAW:
        assert payload == sent.contiguous().view(torch.uint8).numpy().tobytes()
    unpack(target, tables[1], part, codec, payload)
    expected = as_received(sent, codec, dtype)
    assert torch.equal(tokens_of(target, tables[1], part), expected)
    num_changed = int((target.cache != before).any(-1).sum())
    assert num_changed == part.num_layers * 2 * part.num_tokens * part.num_heads


@pytest.mark.parametrize("codec", KvCodec)
def test_payloads_may_take_the_way_of_a_gpu(codec: KvCodec) -> None:
    """Over a buffer between message and cache, one for all."""
    source, target = kv_memory(block_size=4), kv_memory(block_size=16)
    source._is_staged = target._is_staged = True
    tables = table_of(source, 1), table_of(target, 2)
    for num_tokens in (5, 24, 1):
        part = KvSlice(1, 2, 3, num_tokens, 1, 3)
        payload = packed(source, tables[0], part, codec)
        unpack(target, tables[1], part, codec, payload)
        expected = as_received(tokens_of(source, tables[0], part), codec, torch.float32)
        assert torch.equal(tokens_of(target, tables[1], part), expected)
        with pytest.raises(KvTransferError, match="corrupt"):
            target.unpack(tables[1], part, codec, memoryview(payload), crc32c(payload) ^ 1)
        assert not tokens_of(target, tables[1], part).any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_fp8_keeps_four_bits_of_each_number(dtype: torch.dtype) -> None:
    """Of numbers down to a 30,000th of their group's largest, three and the leading one."""
    memory, other = (kv_memory(block_size=16, dtype=dtype, head_dim=64) for _ in range(2))
    part = KvSlice(0, LAYERS, 0, 48, 0, HEADS)
    table = table_of(memory, 1)
    payload = packed(memory, table, part, KvCodec.FP8)
    assert len(payload) == LAYERS * 2 * 48 * HEADS * (64 + 4)
    unpack(other, table, part, KvCodec.FP8, payload)
    sent = tokens_of(memory, table, part).float()
    error = (tokens_of(other, table, part).float() - sent).abs()
    largest = sent.abs().amax(-1, keepdim=True)
    rounding = 2.0**-8 if dtype is torch.bfloat16 else 2.0**-11
    assert (error <= (2.0**-4 + rounding) * sent.abs() + largest / 448 * 2.0**-10).all()
    assert error.max() > 0


def test_packed_again_it_is_nearly_the_same() -> None:
    """What came in fp8 loses next to nothing when it goes on in fp8."""
    memory, second, third = (kv_memory(block_size=16, head_dim=64) for _ in range(3))
    part = KvSlice(0, LAYERS, 0, 48, 0, HEADS)
    table = table_of(memory, 1)
    unpack(second, table, part, KvCodec.FP8, packed(memory, table, part, KvCodec.FP8))
    unpack(third, table, part, KvCodec.FP8, packed(second, table, part, KvCodec.FP8))
    once, twice = tokens_of(second, table, part), tokens_of(third, table, part)
    torch.testing.assert_close(twice, once, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("codec", KvCodec)
def test_a_corrupt_payload_leaves_zeros_and_nothing_else(codec: KvCodec) -> None:
    """0xFF are numbers that are none in every dtype: they may not stay, for a masked slot counts
    with a weight of 0, and 0 * NaN is NaN."""
    memory = kv_memory(block_size=4, dtype=torch.bfloat16)
    part = KvSlice(1, 2, 3, 7, 1, 2)
    table = table_of(memory, 3)
    payload = packed(memory, table, part, codec)
    before = memory.cache.clone()
    corrupt = payload[:20] + b"\xff\xff\xff\xff" + payload[24:]
    with pytest.raises(KvTransferError, match="corrupt"):
        memory.unpack(table, part, codec, memoryview(corrupt), crc32c(payload))
    assert not tokens_of(memory, table, part).any()
    for token in range(part.token_start, part.token_end):
        block, slot = table[token // 4], token % 4
        before[part.layer_start : part.layer_end, :, block, slot, 1:3] = 0
    assert torch.equal(memory.cache, before)
    unpack(memory, table, part, codec, payload)
    assert tokens_of(memory, table, part).any()


@pytest.mark.parametrize("codec", KvCodec)
@pytest.mark.parametrize("by", [-1, 1, 16])
def test_a_payload_of_another_length_writes_nothing(codec: KvCodec, by: int) -> None:
    memory = kv_memory(block_size=4)
    part = KvSlice(0, LAYERS, 0, 5, 0, HEADS)
    payload = bytes(memory.payload_bytes(part, codec) + by)
    before = memory.cache.clone()
    with pytest.raises(KvTransferError, match="bytes"):
        memory.unpack([0, 1], part, codec, memoryview(payload), crc32c(payload))
    assert torch.equal(memory.cache, before)


def test_a_payload_of_the_other_codec_is_refused_by_its_length() -> None:
    memory = kv_memory(block_size=4)
    part = KvSlice(0, LAYERS, 0, 5, 0, HEADS)
    payload = packed(memory, [0, 1], part, KvCodec.RAW)
    with pytest.raises(KvTransferError, match="bytes"):
        memory.unpack([0, 1], part, KvCodec.FP8, memoryview(payload), crc32c(payload))


def test_received_bytes_are_read_without_a_warning() -> None:
    """torch warns, once a process, of buffers that are read-only."""
    memory = kv_memory(block_size=4)
    part = KvSlice(0, 1, 0, 1, 0, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        unpack(memory, [0], part, KvCodec.RAW, bytes(memory.payload_bytes(part, KvCodec.RAW)))


def test_copies_of_blocks_read_before_they_write() -> None:
    memory = kv_memory(block_size=4)
    before = memory.cache.clone()
    memory.copy_blocks([(1, 2), (2, 3)])
    assert torch.equal(memory.cache[:, :, 2], before[:, :, 1])
    assert torch.equal(memory.cache[:, :, 3], before[:, :, 2])
