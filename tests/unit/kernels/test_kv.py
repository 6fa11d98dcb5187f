from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import pytest
import torch
from crc32c import crc32c
from torch import Tensor

from forebay_kernels import native, ops, reference
from forebay_kernels.testkit import Inputs, error_of

DTYPES = [torch.bfloat16, torch.float16]
CODECS = ["raw", "fp8"]
FP8_ERROR = 0.04


@dataclass(frozen=True)
class Kv:
    """What the tokens of a request hold: [L, P, T, H, D]."""

    values: Tensor

    @classmethod
    def draw(cls, inputs: Inputs, *shape: int, dtype: torch.dtype) -> Kv:
        """Groups of very different sizes."""
        scales = torch.exp(inputs.normal(*shape[:-1], 1, scale=2.0))
        return cls((inputs.normal(*shape) * scales).to(dtype))

    def cached(self, block_size: int, table: list[int], start: int) -> Tensor:
        """A cache that has them, and poison elsewhere."""
        layers, planes, num_tokens, num_heads, width = self.values.shape
        shape = (layers, planes, max(table) + 2, block_size, num_heads, width)
        cache = Inputs(seed=0).poisoned(*shape, dtype=self.values.dtype)
        tokens = torch.arange(start, start + num_tokens)
        cache[:, :, torch.tensor(table)[tokens // block_size], tokens % block_size] = self.values
        return cache

    def heads(self, first: int, count: int) -> Kv:
        return Kv(self.values.narrow(3, first, count))


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


def _same(actual: Tensor, expected: Tensor) -> bool:
    return torch.equal(_bits(actual), _bits(expected))


def _pack(cache: Tensor, table: list[int], start: int, num_tokens: int, codec: str) -> Tensor:
    layers, planes, _, _, heads, width = cache.shape
    size = ops.payload_bytes(layers, planes, num_tokens, heads, width, cache.element_size(), codec)
    out = Inputs(seed=0).poisoned(size, dtype=torch.uint8)
    crc = ops.kv_pack(cache, table, start, num_tokens, out, codec)
    assert crc == crc32c(out.numpy())
    return out


def _reference(cache: Tensor, table: list[int], start: int, num_tokens: int, codec: str) -> Tensor:
    return reference.pack_kv(cache, torch.tensor(table), start, num_tokens, codec == "fp8")


def _table(inputs: Inputs, start: int, num_tokens: int, block_size: int) -> list[int]:
    num_blocks = -(-(start + num_tokens) // block_size)
    return [int(block) for block in inputs.permutation(num_blocks + 2)[:num_blocks]]


def _head_major(cache: Tensor) -> Tensor:
    return cache.transpose(3, 4).contiguous().transpose(3, 4)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_pair_of_layouts(implementation: str, dtype: torch.dtype, codec: str) -> None:
    """From each tensor-parallel size and block size to each, between ranks that share heads;
    sources with fewer ranks than their target are head-major."""
    inputs, num_heads, num_tokens, start = Inputs(seed=11), 4, 21, 13
    kv = Kv.draw(inputs, 1, 2, num_tokens, num_heads, 32, dtype=dtype)
    tables = {size: _table(inputs, start, num_tokens, size) for size in (16, 64)}
    firsts = iter(inputs.integers(36, low=0, high=num_heads).tolist())
    for ranks, to_ranks, size, to_size in product((1, 2, 4), (1, 2, 4), (16, 64), (16, 64)):
        of_source, of_target = num_heads // ranks, num_heads // to_ranks
        shared = min(of_source, of_target)
        first = next(firsts) // shared * shared
        cache = kv.heads(first // of_source * of_source, of_source).cached(
            size, tables[size], start
        )
        if ranks < to_ranks:
            cache = _head_major(cache)
        sent = cache.narrow(4, first % of_source, shared)
        payload = _pack(sent, tables[size], start, num_tokens, codec)
        wanted = kv.heads(first, shared)
        if codec == "fp8":
            assert _same(payload, _reference(sent, tables[size], start, num_tokens, codec))
            wanted = Kv(_decoded(payload, wanted.values))
        else:
            assert _same(payload, wanted.values.flatten())

        shape = (1, 2, max(tables[to_size]) + 2, to_size, of_target, 32)
        target = inputs.poisoned(*shape, dtype=dtype)
        taken = target.narrow(4, first % of_target, shared)
        crc = ops.kv_unpack(payload, taken, tables[to_size], start, num_tokens, codec)
        assert crc == crc32c(payload.numpy())
        whole = inputs.poisoned(*shape, dtype=dtype)
        place = whole.narrow(4, first % of_target, shared)
        place.copy_(wanted.cached(to_size, tables[to_size], start))
        assert _same(target, whole)


def _decoded(payload: Tensor, like: Tensor) -> Tensor:
    codes = payload[: like.numel()].view(torch.float8_e4m3fn).view(like.shape)
    scales = payload[like.numel() :].clone().view(torch.float32).view(*like.shape[:-1], -1)
    return reference.dequantise_groups(codes, scales, ops.KV_GROUP).to(like.dtype)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(
    ("planes", "heads", "width", "dtype"),
    [
        pytest.param(1, 1, 576, torch.bfloat16, id="mla"),
        pytest.param(2, 3, 128, torch.bfloat16, id="128"),
        pytest.param(2, 2, 64, torch.float32, id="fp32"),
        pytest.param(1, 2, 576, torch.float32, id="fp32 576"),
        pytest.param(2, 5, 80, torch.float16, id="80"),
        pytest.param(2, 3, 96, torch.bfloat16, id="96"),
        pytest.param(1, 2, 192, torch.bfloat16, id="192"),
        pytest.param(2, 3, 7, torch.float32, id="odd"),
        pytest.param(1, 9, 100, torch.bfloat16, id="not in 16 bytes"),
    ],
)
def test_shapes(
    implementation: str, planes: int, heads: int, width: int, dtype: torch.dtype, codec: str
) -> None:
    inputs, start, num_tokens, block_size = Inputs(seed=width), 5, 43, 16
    kv = Kv.draw(inputs, 2, planes, num_tokens, heads, width, dtype=dtype)
    table = _table(inputs, start, num_tokens, block_size)
    cache = kv.cached(block_size, table, start)
    payload = _pack(cache, table, start, num_tokens, codec)
    assert _same(payload, _reference(cache, table, start, num_tokens, codec))
    target = inputs.poisoned(*cache.shape, dtype=dtype)
    ops.kv_unpack(payload, target, table, start, num_tokens, codec)
    wanted = kv.values if codec == "raw" else _decoded(payload, kv.values)
    assert error_of(wanted, kv.values.double()).relative < FP8_ERROR
    assert _same(target, Kv(wanted).cached(block_size, table, start))


def test_many_tokens(implementation: str) -> None:
    """On a GPU: several ranges of several tiles a warp, the first of each cut."""
    num_tokens = 611 if implementation == "host" else 67
    inputs, block_size = Inputs(seed=3), 16
    kv = Kv.draw(inputs, 3, 2, num_tokens, 3, 64, dtype=torch.bfloat16)
    table = _table(inputs, 0, num_tokens, block_size)
    cache = kv.cached(block_size, table, 0)
    for codec in CODECS:
        payload = _pack(cache, table, 0, num_tokens, codec)
        assert _same(payload, _reference(cache, table, 0, num_tokens, codec))
        target = torch.zeros_like(cache)
        assert ops.kv_unpack(payload, target, table, 0, num_tokens, codec) == crc32c(
            payload.numpy()
        )
        wanted = kv.values if codec == "raw" else _decoded(payload, kv.values)
        assert _same(_pack(target, table, 0, num_tokens, "raw"), wanted.flatten())


@pytest.mark.parametrize("offset", [0, 1, 17])
def test_any_address(implementation: str, offset: int) -> None:
    """After a message's header, say; on CPUs with a payload that is written past the caches."""
    num_tokens = 1100 if implementation.startswith("cpu-") else 20
    inputs = Inputs(seed=offset)
    bits = inputs.integers(2, 1, 140, 8, 16, 128, low=-30000, high=30000, dtype=torch.int16)
    cache = bits.view(torch.bfloat16)
    table = inputs.permutation(140)
    size = ops.payload_bytes(2, 1, num_tokens, 16, 128, 2, "raw")
    out = torch.frombuffer(bytearray(size + offset), dtype=torch.uint8)[offset:]
    crc = ops.kv_pack(cache, table, 3, num_tokens, out)
    assert crc == crc32c(out.numpy())
    wanted = reference.pack_kv(cache, table, 3, num_tokens, False)
    assert torch.equal(out, wanted)
    target = torch.zeros_like(cache)
    assert ops.kv_unpack(out, target, table, 3, num_tokens) == crc
    assert torch.equal(reference.pack_kv(target, table, 3, num_tokens, False), wanted)


def test_every_token_finds_its_place(implementation: str) -> None:
    """All starts and lengths within three blocks; every element says where it was."""
    for block_size, heads in product((1, 3, 4), (1, 3)):
        shape = (1, 2, 5, block_size, heads, 4)
        cache = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)
        table = [3, 0, 2]
        tokens = cache[:, :, table].flatten(2, 3)
        for start in range(3 * block_size):
            for num_tokens in range(1, 3 * block_size - start + 1):
                expected = tokens.narrow(2, start, num_tokens)
                payload = _pack(cache, table, start, num_tokens, "raw")
                assert _same(payload, expected.flatten())
                target = torch.full_like(cache, -1.0)
                ops.kv_unpack(payload, target, table, start, num_tokens)
                assert _same(
                    target[:, :, table].flatten(2, 3).narrow(2, start, num_tokens), expected
                )
                assert int((target >= 0).sum()) == expected.numel()


@pytest.mark.parametrize("codec", CODECS)
def test_every_width_of_a_row(implementation: str, codec: str) -> None:
    for width in range(8, 600, 8 if implementation == "host" else 40):
        cache = Inputs(seed=width).normal(1, 1, 2, 8, 3, width, dtype=torch.float16)
        payload = _pack(cache, [1, 0], 3, 9, codec)
        assert _same(payload, _reference(cache, [1, 0], 3, 9, codec))


@pytest.mark.parametrize("codec", CODECS)
def test_blocks_that_do_not_exist(implementation: str, codec: str) -> None:
    cache = Inputs(seed=1).normal(2, 2, 4, 16, 2, 64, dtype=torch.bfloat16)
    payload = _pack(cache, [3, -1, 0], 9, 30, codec)
    assert _same(payload, _reference(cache, [3, -1, 0], 9, 30, codec))
    target = torch.full_like(cache, 7.0)
    ops.kv_unpack(payload, target, [3, -1, 0], 9, 30, codec)
    assert bool((target[:, :, [1, 2]] == 7.0).all())
    assert bool((target[:, :, 3, :9] == 7.0).all() and (target[:, :, 0, 7:] == 7.0).all())
    assert bool((target[:, :, 3, 9:] != 7.0).all() and (target[:, :, 0, :7] != 7.0).all())
    ops.kv_unpack(payload, target, [3, 1, 0], 9, 30, codec)
    assert bool((target[:, :, 1] == 0.0).all())


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float32], ids=str)
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_shows(implementation: str, value: float, dtype: torch.dtype) -> None:
    cache = Inputs(seed=2).normal(1, 1, 1, 4, 2, 192, dtype=dtype)
    cache[0, 0, 0, 1, 1, 130] = value
    raw = _pack(cache, [0], 0, 4, "raw")
    assert _same(raw, cache.flatten())
    payload = _pack(cache, [0], 0, 4, "fp8")
    assert _same(payload, _reference(cache, [0], 0, 4, "fp8"))
    target, again = torch.zeros_like(cache), torch.zeros_like(cache)
    ops.kv_unpack(payload, target, [0], 0, 4, "fp8")
    reference.unpack_kv(payload, again, torch.tensor([0]), 0, 4, True)
    assert _same(target, again)
    lost = torch.zeros_like(cache, dtype=torch.bool)
    lost[0, 0, 0, 1, 1, 128:] = True
    assert torch.equal(target.isnan(), lost)


def test_codes_and_scales_of_any_bits_are_read_alike(implementation: str) -> None:
    inputs = Inputs(seed=8)
    size = ops.payload_bytes(1, 1, 40, 2, 128, 2, "fp8")
    payload = inputs.integers(size, low=0, high=256).to(torch.uint8)
    for dtype in (*DTYPES, torch.float32):
        target = torch.zeros(1, 1, 3, 16, 2, 128, dtype=dtype)
        again = torch.zeros_like(target)
        ops.kv_unpack(payload, target, [2, 0, 1], 0, 40, "fp8")
        reference.unpack_kv(payload, again, torch.tensor([2, 0, 1]), 0, 40, True)
        assert _same(target, again)


def test_a_changed_byte_changes_the_checksum(implementation: str) -> None:
    cache = Inputs(seed=4).normal(1, 2, 3, 16, 2, 64, dtype=torch.float16)
    payload = _pack(cache, [2, 1], 0, 29, "fp8")
    before = crc32c(payload.numpy())
    for at in (0, 2000, payload.numel() - 1):
        changed = payload.clone()
        changed[at] ^= 1
        crc = ops.kv_unpack(changed, cache, [2, 1], 0, 29, "fp8")
        assert crc == crc32c(changed.numpy()) != before


def test_no_tokens(implementation: str) -> None:
    cache, nothing = torch.ones(1, 2, 3, 16, 2, 64), torch.empty(0, dtype=torch.uint8)
    assert ops.kv_pack(cache, [], 0, 0, nothing) == 0
    assert ops.kv_unpack(nothing, cache, [1], 7, 0, "fp8") == 0
    assert bool((cache == 1.0).all())


def test_block_tables_as_tensors(implementation: str) -> None:
    cache = Inputs(seed=6).normal(1, 2, 4, 16, 2, 64, dtype=torch.bfloat16)
    expected = _pack(cache, [3, 1], 2, 20, "raw")
    for dtype in (torch.int32, torch.int64):
        out = torch.empty_like(expected)
        table = torch.tensor([3, 1], dtype=dtype)
        crc = torch.zeros(1, dtype=torch.int32)
        torch.ops.forebay.kv_pack(cache, table, 2, 20, ops.KV_CODECS["raw"], out, crc)
        assert torch.equal(out, expected)
        assert int(crc) & 0xFFFFFFFF == crc32c(out.numpy()) == ops.kv_pack(cache, table, 2, 20, out)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_no_order_of_threads_changes_a_bit(order: int) -> None:
    host, kept = native.load("host"), native.libraries.of("cpu")
    cache = Inputs(seed=5).normal(2, 2, 9, 16, 3, 128, dtype=torch.float16)
    table = [4, 8, 0, 2, 7, 1, 3]
    native.libraries.use("cpu", host)
    try:
        for codec in CODECS:
            payload = _reference(cache, table, 1, 105, codec)
            host.order_threads(order)
            assert _same(_pack(cache, table, 1, 105, codec), payload)
            target, again = torch.zeros_like(cache), torch.zeros_like(cache)
            ops.kv_unpack(payload, target, table, 1, 105, codec)
            reference.unpack_kv(payload, again, torch.tensor(table), 1, 105, codec == "fp8")
            assert _same(target, again)
    finally:
        host.order_threads(0)
        native.libraries.use("cpu", kept)


def test_sizes_of_payloads() -> None:
    assert ops.payload_bytes(30, 2, 10, 3, 64, 2, "raw") == 30 * 2 * 10 * 3 * 128
    assert ops.payload_bytes(30, 2, 10, 3, 64, 2, "fp8") == 30 * 2 * 10 * 3 * (64 + 4)
    assert ops.payload_bytes(61, 1, 10, 1, 576, 2, "fp8") == 61 * 10 * (576 + 20)


def test_a_cache_of_more_than_two_billion_elements(implementation: str) -> None:
    """Of which the system gives only the pages that are touched."""
    num_blocks = (1 << 31) // (16 * 64) + 3
    cache = torch.empty(1, 1, num_blocks, 16, 1, 64, dtype=torch.bfloat16)
    table = [num_blocks - 1, 0, num_blocks - 2]
    cache[:, :, table] = Inputs(seed=9).normal(1, 1, 3, 16, 1, 64, dtype=torch.bfloat16)
    wanted = cache[:, :, table].flatten(2, 3).narrow(2, 5, 40).flatten()
    payload = _pack(cache, table, 5, 40, "raw")
    assert _same(payload, wanted)
    cache[:, :, table] = 0
    ops.kv_unpack(payload, cache, table, 5, 40)
    assert _same(_pack(cache, table, 5, 40, "raw"), wanted)
