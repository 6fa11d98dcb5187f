"""Where a GPU and a CPU must give the same bits, and what only a GPU has: pinned memory, tensors
past 2^31 elements, ids that nobody could check before the launch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from forebay_kernels import ops, reference
from forebay_kernels.gpu_check.case import Case
from forebay_kernels.gpu_check.cases import GROUPS
from forebay_kernels.gpu_check.speed import Tally
from forebay_kernels.testkit import Inputs, poisoned_allocations, written

SEEDS = [torch.seed() % (1 << 31) for _ in range(5)]
IDENTICAL = [
    case
    for group in ("kv", "sampling", "moe", "activation")
    for case in GROUPS[group](True)
    if case.op != "silu_and_mul"
]
GIB = 1 << 30


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("case", IDENTICAL, ids=lambda case: case.name)
def test_the_bits_of_the_cpu(case: Case, seed: int, device: torch.device, library: Tally) -> None:
    here = case.inputs(Inputs(seed))
    there = tree_map_only(Tensor, lambda tensor: _moved(tensor, device), here)
    with poisoned_allocations():
        results = [case.run(*here), case.run(*there)]
    for one, other in zip(*(tree_leaves([each, arguments]) for each, arguments in
                            zip(results, (here, there), strict=True)), strict=True):  # fmt: skip
        if isinstance(one, Tensor):
            assert torch.equal(_bytes(one), _bytes(other.cpu()))


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy with the same strides."""
    out = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
    return out.copy_(tensor)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


def test_ten_thousand_draws_are_those_of_the_cpu(device: torch.device, library: Tally) -> None:
    inputs = Inputs(SEEDS[0])
    count, rows, vocabulary = 10_000, 16, 5_000
    arguments: tuple[Any, ...] = (
        inputs.normal(rows, vocabulary, scale=2.0),
        inputs.integers(count, low=0, high=rows, dtype=torch.int32),
        inputs.uniform(count, low=0.3, high=2.0),
        inputs.integers(count, low=0, high=80, dtype=torch.int32),
        inputs.uniform(count, low=0.5, high=1.2),
        inputs.uniform(count, low=-0.05, high=0.05),
        inputs.integers(count, low=0, high=1 << 62),
        inputs.integers(count, low=0, high=4, dtype=torch.int32),
        inputs.integers(count, low=0, high=1 << 20, dtype=torch.int32),
    )
    there = [tensor.to(device) for tensor in arguments]
    for one, other in zip(ops.sample(*arguments), ops.sample(*there), strict=True):
        assert torch.equal(_bytes(one), _bytes(other.cpu()))


@pytest.mark.parametrize("codec", ["raw", "fp8"])
def test_pinned_host_memory(codec: str, device: torch.device, library: Tally) -> None:
    if device.type != "cuda":
        pytest.skip("pinned memory is CUDA's")
    cache = Inputs(SEEDS[0], device).normal(2, 2, 9, 16, 4, 64, dtype=torch.bfloat16)
    table = [3, 1, 8, -1, 0]
    size = ops.payload_bytes(2, 2, 70, 4, 64, 2, codec)
    out = torch.full((size,), 0x7B, dtype=torch.uint8).pin_memory()
    crc = ops.kv_pack(cache, table, 5, 70, out, codec)
    torch.cuda.synchronize(device)
    wanted = reference.pack_kv(cache.cpu(), torch.tensor(table), 5, 70, codec == "fp8")
    assert torch.equal(out, wanted) and crc == reference.crc32c(wanted)
    other = torch.zeros_like(cache)
    assert ops.kv_unpack(out, other, table, 5, 70, codec) == crc
    back = torch.full((size,), 0x7B, dtype=torch.uint8).pin_memory()
    again = ops.kv_pack(other, table, 5, 70, back, codec)
    torch.cuda.synchronize(device)
    if codec == "raw":
        assert again == crc and torch.equal(back, out)


def test_ids_out_of_range_are_passed_over(device: torch.device, library: Tally) -> None:
    """On a GPU nobody reads them before the launch."""
    if device.type != "cuda":
        pytest.skip("a CPU refuses them")
    inputs = Inputs(SEEDS[0], device)
    cache = inputs.normal(1, 2, 4, 16, 2, 64, dtype=torch.bfloat16)
    kept = cache.clone()
    table = torch.tensor([1, 1 << 40, -7, 2], device=device)
    out = inputs.poisoned(ops.payload_bytes(1, 2, 64, 2, 64, 2, "raw"), dtype=torch.uint8)
    crc = ops.kv_pack(cache, table, 0, 64, out)
    wanted = reference.pack_kv(cache, table, 0, 64, False)
    assert torch.equal(out, wanted) and crc == reference.crc32c(wanted)
    payload = inputs.integers(out.numel(), low=0, high=256, dtype=torch.uint8)
    ops.kv_unpack(payload, cache, table, 0, 64)
    assert torch.equal(_bytes(cache[:, :, [0, 3]]), _bytes(kept[:, :, [0, 3]]))
    rows = inputs.normal(2, 6, 64, dtype=torch.bfloat16)
    angles = inputs.uniform(2, 32)
    k_cache, v_cache = cache[0, 0], cache[0, 1]
    kept = cache.clone()
    slots = torch.tensor([1 << 40, -5], device=device)
    q = ops.qkv_post(rows, angles.cos(), angles.sin(), k_cache, v_cache, slots)
    assert written(q) and torch.equal(_bytes(cache), _bytes(kept))


def test_more_than_2_to_the_31_elements(device: torch.device, library: Tally) -> None:
    if device.type != "cuda" or torch.cuda.mem_get_info(device)[0] < 40 * GIB:
        pytest.skip("no GPU with 40 GiB to spare")
    rows, width = (1 << 31) // 4096 + 3, 4096
    x = torch.zeros(rows, width, dtype=torch.bfloat16, device=device)
    x[-1] = Inputs(SEEDS[0], device).normal(width, dtype=torch.bfloat16)
    weight = torch.ones(width, dtype=torch.bfloat16, device=device)
    out, total = ops.add_rms_norm(x, x, weight, 1e-5)
    assert torch.equal(total[-1], x[-1] * 2)
    assert torch.equal(out[-1:], ops.add_rms_norm(x[-1:], x[-1:], weight, 1e-5)[0])
    del out, total
    blocks = x.view(1, 1, -1, 16, 2, 128)[:, :, : rows * width // 4096]
    last = blocks.shape[2] - 1
    payload = torch.empty(16 * 2 * 128 * 2, dtype=torch.uint8, device=device)
    ops.kv_pack(blocks, [last], 0, 16, payload)
    assert torch.equal(payload, _bytes(blocks[0, 0, last]).flatten())
