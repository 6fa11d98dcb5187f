"""KV of a request between a paged cache and one buffer for the wire, with its checksum."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from forebay_kernels import native, reference
from forebay_kernels.checks import FLOATS, ArgumentError
from forebay_kernels.params import constants
from forebay_kernels.registry import register

KV_GROUP = 128
"""Neighbouring values of one head that share a scale in the fp8 codec."""

_NUMBERS = constants("KvCodec")
_RAW, _FP8 = _NUMBERS["FOREBAY_KV_RAW"], _NUMBERS["FOREBAY_KV_FP8"]
KV_CODECS = {"raw": _RAW, "fp8": _FP8}
_HOST_BLOCKS = 16
"""Of a kernel that writes to host memory: the bus is full long before, and a model's step beside it
keeps its multiprocessors."""
_BLOCKS_PER_MULTIPROCESSOR = 2
_BLOCKS_WITHOUT_GPU = 4


def payload_bytes(
    layers: int, planes: int, tokens: int, heads: int, head_dim: int, itemsize: int, codec: str
) -> int:
    """Of [layers, planes, tokens, heads, head_dim] elements of `itemsize` bytes. Raises
    ArgumentError on an unknown codec."""
    rows = layers * planes * tokens * heads
    return rows * _row_bytes(head_dim, itemsize, _codec("payload_bytes", codec))


def kv_pack(
    cache: Tensor,
    block_table: Sequence[int] | Tensor,
    token_start: int,
    num_tokens: int,
    out: Tensor,
    codec: str = "raw",
) -> int:
    """Gathers tokens [token_start, token_start + num_tokens) of all layers into `out`.

    cache: [L, P, num_blocks, block_size, H, D] of fp32, bf16 or fp16; P planes: 2 for key and
    value, 1 for an MLA latent. Any strides but D's, which is 1: a head-major cache, a range of
    layers or the heads for one rank are views. block_table: [n] ids, as numbers or int32/int64;
    token t is in block block_table[t // block_size]; -1: its tokens are zeros. out: uint8
    [payload_bytes(...)], on the cache's device or in pinned host memory, on a GPU at a multiple of
    16 bytes. codec: "raw", elements [L, P, T, H, D]; "fp8", e4m3 codes [L, P, T, H, D] and then
    fp32 scales [L, P, T, H, ceil(D / 128)].

    Returns the CRC-32C of `out`; for a cache on a GPU that waits for the kernel. Raises
    ArgumentError; an id on a GPU that is out of range counts as -1.
    """
    table = _table("kv_pack", block_table, cache)
    crc = torch.zeros(1, dtype=torch.int32, device=cache.device)
    _pack(cache, table, token_start, num_tokens, _codec("kv_pack", codec), out, crc)
    return int(crc) & 0xFFFFFFFF


def kv_unpack(
    payload: Tensor,
    cache: Tensor,
    block_table: Sequence[int] | Tensor,
    token_start: int,
    num_tokens: int,
    codec: str = "raw",
) -> int:
    """Writes what kv_pack gave to its tokens' places in `cache`, whose block size, strides and
    place of the heads may be others than those packed from. Arguments as kv_pack's; -1 in
    block_table: nothing is written. Slots of other tokens stay as they are.

    Returns the CRC-32C of `payload` as it was read, for the caller to compare: nothing is undone
    when it differs. Raises ArgumentError.
    """
    table = _table("kv_unpack", block_table, cache)
    crc = torch.zeros(1, dtype=torch.int32, device=cache.device)
    _unpack(payload, cache, table, token_start, num_tokens, _codec("kv_unpack", codec), crc)
    return int(crc) & 0xFFFFFFFF


def _row_bytes(head_dim: int, itemsize: int, codec: int) -> int:
    """Of one head of one token, its scales included."""
    return head_dim * itemsize if codec == _RAW else head_dim + 4 * -(-head_dim // KV_GROUP)


def _codec(op: str, codec: str) -> int:
    number = KV_CODECS.get(codec)
    if number is None:
        raise ArgumentError(op, "codec", f"{codec!r} is none of {', '.join(KV_CODECS)}")
    return number


def _table(op: str, block_table: Sequence[int] | Tensor, cache: Tensor) -> Tensor:
    """On the cache's device. Ids that can be read here are in range."""
    if isinstance(block_table, Tensor):
        _check_ids(op, block_table, cache)
        return block_table
    if not block_table:
        return torch.empty(0, dtype=torch.int64, device=cache.device)
    try:
        numbers = array("q", block_table)
    except (TypeError, OverflowError) as error:
        raise ArgumentError(op, "block_table", f"no list of block ids: {error}") from error
    _check_range(op, min(numbers), max(numbers), cache)
    table = torch.frombuffer(numbers, dtype=torch.int64)
    return table if cache.device.type == "cpu" else table.to(cache.device)


def _check_ids(op: str, ids: Tensor, cache: Tensor) -> None:
    if ids.device.type == "cpu" and ids.numel() > 0 and not ids.is_floating_point():
        lowest, highest = torch.aminmax(ids)
        _check_range(op, int(lowest), int(highest), cache)


def _check_range(op: str, lowest: int, highest: int, cache: Tensor) -> None:
    if cache.ndim == 6 and not -1 <= lowest <= highest < cache.shape[2]:
        problem = f"ids from {lowest} to {highest} for a cache of {cache.shape[2]} blocks"
        raise ArgumentError(op, "block_table", problem)


def _check(
    op: str,
    cache: Tensor,
    block_table: Tensor,
    token_start: int,
    num_tokens: int,
    codec: int,
    buffer: tuple[str, Tensor],
    crc: Tensor,
) -> None:
    if cache.dtype not in FLOATS:
        raise ArgumentError(
            op, "cache", f"dtype {cache.dtype} is none of float32, bfloat16, float16"
        )
    if cache.ndim != 6 or 0 in cache.shape[3:]:
        shape = tuple(cache.shape)
        raise ArgumentError(op, "cache", f"shape {shape} where [L, P, blocks, slots, H, D] belongs")
    if cache.stride(-1) != 1 and cache.shape[-1] > 1:
        raise ArgumentError(op, "cache", f"strides {cache.stride()}: heads have gaps")
    if codec not in (_RAW, _FP8):
        raise ArgumentError(op, "codec", f"{codec} is none of {list(KV_CODECS.values())}")
    for name, count in (("token_start", token_start), ("num_tokens", num_tokens)):
        if count < 0:
            raise ArgumentError(op, name, f"{count} is negative")
    if block_table.dtype not in (torch.int32, torch.int64) or not (
        block_table.ndim == 1 and block_table.is_contiguous()
    ):
        raise ArgumentError(op, "block_table", "is not one contiguous row of int32 or int64")
    if block_table.device != cache.device:
        raise ArgumentError(op, "block_table", f"is on {block_table.device}, not {cache.device}")
    if crc.dtype != torch.int32 or crc.shape != (1,) or crc.device != cache.device:
        raise ArgumentError(op, "crc", f"is not one int32 on {cache.device}")
    block_size = cache.shape[3]
    last = token_start + num_tokens - 1
    if num_tokens > 0 and last // block_size >= len(block_table):
        problem = f"{len(block_table)} blocks of {block_size} tokens do not reach token {last}"
        raise ArgumentError(op, "block_table", problem)
    _check_buffer(op, *buffer, cache, num_tokens, codec)


def _check_buffer(
    op: str, name: str, buffer: Tensor, cache: Tensor, num_tokens: int, codec: int
) -> None:
    if buffer.dtype != torch.uint8 or buffer.ndim != 1 or not buffer.is_contiguous():
        raise ArgumentError(op, name, "is not one contiguous row of uint8")
    if buffer.device != cache.device and not (
        cache.device.type == "cuda" and buffer.device.type == "cpu" and buffer.is_pinned()
    ):
        raise ArgumentError(
            op, name, f"is neither on {cache.device} nor in host memory pinned for it"
        )
    layers, planes, _, _, heads, head_dim = cache.shape
    rows = layers * planes * num_tokens * heads
    expected = rows * _row_bytes(head_dim, cache.element_size(), codec)
    if buffer.numel() != expected:
        raise ArgumentError(op, name, f"has {buffer.numel()} bytes where {expected} belong")
    if cache.device.type == "cuda" and buffer.data_ptr() % 16 != 0:
        raise ArgumentError(op, name, "does not begin at a multiple of 16 bytes")


def _fields(
    cache: Tensor,
    block_table: Tensor,
    token_start: int,
    num_tokens: int,
    codec: int,
    buffer: Tensor,
    crc: Tensor,
) -> dict[str, int]:
    layers, planes, num_blocks, block_size, heads, head_dim = cache.shape
    strides = cache.stride()
    return {
        "cache": cache.data_ptr(),
        "block_table": block_table.data_ptr(),
        "crc": crc.data_ptr(),
        "layers": layers,
        "planes": planes,
        "tokens": num_tokens,
        "heads": heads,
        "head_dim": head_dim,
        "num_blocks": num_blocks,
        "block_size": block_size,
        "token_start": token_start,
        "layer_stride": strides[0],
        "plane_stride": strides[1],
        "block_stride": strides[2],
        "slot_stride": strides[3],
        "head_stride": strides[4],
        "dtype": native.DTYPE_CODES[cache.dtype],
        "codec": codec,
        "id_bytes": block_table.element_size(),
        "max_blocks": _max_blocks(cache.device, buffer.device),
        "num_threads": torch.get_num_threads(),
    }


def _max_blocks(device: torch.device, of_buffer: torch.device) -> int:
    if device.type != "cuda":
        return _BLOCKS_WITHOUT_GPU
    if of_buffer.type != "cuda":
        return _HOST_BLOCKS
    properties = torch.cuda.get_device_properties(device)
    return _BLOCKS_PER_MULTIPROCESSOR * int(properties.multi_processor_count)


def _pack(
    cache: Tensor,
    block_table: Tensor,
    token_start: int,
    num_tokens: int,
    codec: int,
    out: Tensor,
    crc: Tensor,
) -> None:
    _check("kv_pack", cache, block_table, token_start, num_tokens, codec, ("out", out), crc)
    crc.zero_()
    if out.numel() == 0:
        return
    fields = _fields(cache, block_table, token_start, num_tokens, codec, out, crc)
    if not native.call("kv_pack", cache.device, out=out.data_ptr(), **fields):
        fp8 = codec == _FP8
        out.copy_(reference.pack_kv(cache, block_table, token_start, num_tokens, fp8))
        _write_crc(crc, out)


def _unpack(
    payload: Tensor,
    cache: Tensor,
    block_table: Tensor,
    token_start: int,
    num_tokens: int,
    codec: int,
    crc: Tensor,
) -> None:
    buffer = ("payload", payload)
    _check("kv_unpack", cache, block_table, token_start, num_tokens, codec, buffer, crc)
    crc.zero_()
    if payload.numel() == 0:
        return
    fields = _fields(cache, block_table, token_start, num_tokens, codec, payload, crc)
    if not native.call("kv_unpack", cache.device, payload=payload.data_ptr(), **fields):
        fp8 = codec == _FP8
        rows = payload.to(cache.device)
        reference.unpack_kv(rows, cache, block_table, token_start, num_tokens, fp8)
        _write_crc(crc, payload)


def _kv_pack(
    cache: Tensor,
    block_table: Tensor,
    token_start: int,
    num_tokens: int,
    codec: int,
    out: Tensor,
    crc: Tensor,
) -> None:
    _check_ids("kv_pack", block_table, cache)
    _pack(cache, block_table, token_start, num_tokens, codec, out, crc)


def _kv_unpack(
    payload: Tensor,
    cache: Tensor,
    block_table: Tensor,
    token_start: int,
    num_tokens: int,
    codec: int,
    crc: Tensor,
) -> None:
    _check_ids("kv_unpack", block_table, cache)
    _unpack(payload, cache, block_table, token_start, num_tokens, codec, crc)


def _write_crc(crc: Tensor, payload: Tensor) -> None:
    value = reference.crc32c(payload)
    crc.fill_(value - (value >> 31 << 32))


def _kv_pack_meta(
    cache: Tensor,
    block_table: Tensor,
    token_start: int,
    num_tokens: int,
    codec: int,
    out: Tensor,
    crc: Tensor,
) -> None:
    _check("kv_pack", cache, block_table, token_start, num_tokens, codec, ("out", out), crc)


def _kv_unpack_meta(
    payload: Tensor,
    cache: Tensor,
    block_table: Tensor,
    token_start: int,
    num_tokens: int,
    codec: int,
    crc: Tensor,
) -> None:
    buffer = ("payload", payload)
    _check("kv_unpack", cache, block_table, token_start, num_tokens, codec, buffer, crc)


register(
    "kv_pack(Tensor cache, Tensor block_table, int token_start, int num_tokens, int codec,"
    " Tensor(a!) out, Tensor(b!) crc) -> ()",
    _kv_pack,
    _kv_pack_meta,
)
register(
    "kv_unpack(Tensor payload, Tensor(a!) cache, Tensor block_table, int token_start,"
    " int num_tokens, int codec, Tensor(b!) crc) -> ()",
    _kv_unpack,
    _kv_unpack_meta,
)
