"""What kv_pack and kv_unpack refuse before anything is launched."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from forebay_kernels import ops
from forebay_kernels.checks import ArgumentError

CACHE = torch.zeros(1, 2, 4, 16, 2, 64)
OUT = torch.zeros(ops.payload_bytes(1, 2, 20, 2, 64, 4, "raw"), dtype=torch.uint8)


def _pack(
    cache: Tensor = CACHE,
    table: object = (3, 1),
    start: int = 2,
    tokens: int = 20,
    out: Tensor = OUT,
    codec: str = "raw",
) -> Callable[[], int]:
    return lambda: ops.kv_pack(cache, table, start, tokens, out, codec)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (_pack(cache=CACHE.double()), r"cache: dtype torch.float64 is none"),
        (_pack(cache=CACHE[0]), r"cache: shape .* where \[L, P, blocks, slots, H, D\]"),
        (_pack(cache=CACHE.transpose(4, 5)), r"cache: strides .*: heads have gaps"),
        (_pack(table=[3]), r"block_table: 1 blocks of 16 tokens do not reach token 21"),
        (_pack(table=[3, 4]), r"block_table: ids from 3 to 4 for a cache of 4 blocks"),
        (_pack(table=[-2, 1]), r"block_table: ids from -2 to 1 for a cache of 4 blocks"),
        (_pack(table=torch.tensor([0, 9])), r"block_table: ids from 0 to 9 for"),
        (_pack(table=[0.5, 1]), r"block_table: no list of block ids"),
        (_pack(table=[1 << 70, 1]), r"block_table: no list of block ids"),
        (_pack(table=torch.zeros(2)), r"block_table: is not one contiguous row of int32 or int64"),
        (_pack(table=torch.zeros(2, 2).int()), r"block_table: is not one contiguous row"),
        (_pack(start=-1), r"token_start: -1 is negative"),
        (_pack(tokens=-1), r"num_tokens: -1 is negative"),
        (_pack(codec="zip"), r"codec: 'zip' is none of raw, fp8"),
        (_pack(out=OUT[:-1]), r"out: has 20479 bytes where 20480 belong"),
        (_pack(out=OUT.view(torch.int8)), r"out: is not one contiguous row of uint8"),
        (_pack(out=OUT.to("meta")), r"out: is neither on cpu nor in host memory pinned"),
    ],
)
def test_bad_arguments_are_named(call: Callable[[], int], message: str) -> None:
    with pytest.raises(ArgumentError, match="kv_pack: " + message):
        call()


def test_payloads_of_another_size_are_refused() -> None:
    before = CACHE.clone()
    with pytest.raises(ArgumentError, match="kv_unpack: payload: has 20480 bytes where 5440"):
        ops.kv_unpack(OUT, CACHE, [3, 1], 2, 20, "fp8")
    assert torch.equal(CACHE, before)


def test_the_op_checks_by_itself() -> None:
    crc = torch.zeros(1, dtype=torch.int32)
    table = torch.tensor([3, 1])
    with pytest.raises(ArgumentError, match="codec: 7 is none of"):
        torch.ops.forebay.kv_pack(CACHE, table, 2, 20, 7, OUT, crc)
    with pytest.raises(ArgumentError, match="ids from 1 to 8"):
        torch.ops.forebay.kv_unpack(OUT, CACHE, torch.tensor([8, 1]), 2, 20, 0, crc)
    with pytest.raises(ArgumentError, match="crc: is not one int32 on cpu"):
        torch.ops.forebay.kv_pack(CACHE, table, 2, 20, 0, OUT, crc.long())


def test_shapes_alone() -> None:
    tensors = (CACHE.to("meta"), torch.tensor([3, 1]).to("meta"))
    crc = torch.zeros(1, dtype=torch.int32, device="meta")
    torch.ops.forebay.kv_pack(*tensors, 2, 20, 0, OUT.to("meta"), crc)
    torch.ops.forebay.kv_unpack(OUT.to("meta"), *tensors, 2, 20, 0, crc)
    with pytest.raises(ArgumentError, match="out: has 20480 bytes where"):
        torch.ops.forebay.kv_pack(*tensors, 2, 21, 0, OUT.to("meta"), crc)
