from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from forebay_kernels import ops

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
DTYPES = list(TOLERANCE)
CPU = torch.device("cpu")


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    tolerance = TOLERANCE[actual.dtype]
    torch.testing.assert_close(actual.double(), expected.double(), rtol=tolerance, atol=tolerance)


def dense_attention(q: Tensor, keys: Tensor, values: Tensor, seen: Tensor) -> Tensor:
    """fp64. q: [T, Hq, D]; keys, values: [S, Hkv, D]; seen: bool [T, S]."""
    group = q.shape[1] // keys.shape[1]
    keys, values = (x.double().repeat_interleave(group, dim=1) for x in (keys, values))
    scores = torch.einsum("thd,shd->hts", q.double(), keys) / math.sqrt(q.shape[-1])
    weights = scores.masked_fill(~seen, -math.inf).softmax(-1)
    return torch.einsum("hts,shd->thd", weights, values)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm(dtype: torch.dtype) -> None:
    x, weight = random(5, 64, dtype=dtype), random(64, dtype=dtype, seed=1)
    expected = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt()
    assert_close(ops.rms_norm(x, weight, 1e-5), expected * weight.double())


@pytest.mark.parametrize("dtype", DTYPES)
def test_add_rms_norm(dtype: torch.dtype) -> None:
    x, residual = random(5, 64, dtype=dtype), random(5, 64, dtype=dtype, seed=1)
    weight = random(64, dtype=dtype, seed=2)
    total = x + residual
    normed, new_residual = ops.add_rms_norm(x.clone(), residual, weight, 1e-6)
    assert torch.equal(new_residual, total)
    assert torch.equal(normed, ops.rms_norm(total, weight, 1e-6))


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_and_mul(dtype: torch.dtype) -> None:
    x = random(5, 24, dtype=dtype)
    gate, up = x.double()[:, :12], x.double()[:, 12:]
    assert_close(ops.silu_and_mul(x), gate / (1 + (-gate).exp()) * up)


def paged(
    lengths: list[int], block_size: int, num_kv_heads: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, list[list[int]], list[tuple[Tensor, Tensor]]]:
    """Caches, block tables, and each sequence's dense keys and values; unused slots hold 1e4."""
    num_blocks = sum(-(-length // block_size) for length in lengths) + 3
    shape = (num_blocks, block_size, num_kv_heads, 16)
    k_cache, v_cache = (torch.full(shape, 1e4).to(dtype) for _ in range(2))
    free = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(3)).tolist()
    tables, dense = [], []
    for i, length in enumerate(lengths):
        table = [free.pop() for _ in range(-(-length // block_size))]
        keys = random(length, num_kv_heads, 16, dtype=dtype, seed=10 + i)
        values = random(length, num_kv_heads, 16, dtype=dtype, seed=50 + i)
        slots = torch.tensor(
            [table[p // block_size] * block_size + p % block_size for p in range(length)]
        )
        k_cache.view(-1, num_kv_heads, 16)[slots] = keys
        v_cache.view(-1, num_kv_heads, 16)[slots] = values
        tables.append(table)
        dense.append((keys, values))
    return k_cache, v_cache, tables, dense


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_kv_heads", [1, 2, 6])
@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_paged_decode(dtype: torch.dtype, num_kv_heads: int, block_size: int) -> None:
    lengths = [1, 4, 5, 33, 64]
    k_cache, v_cache, tables, dense = paged(lengths, block_size, num_kv_heads, dtype)
    q = random(len(lengths), 6, 16, dtype=dtype, seed=2)
    plan = ops.DecodePlan.build(tables, lengths, block_size, dtype, CPU)
    out = ops.paged_decode(q, k_cache, v_cache, plan)
    assert (out.shape, out.dtype) == (q.shape, dtype)
    for i, (keys, values) in enumerate(dense):
        seen = torch.ones(1, lengths[i], dtype=torch.bool)
        assert_close(out[i : i + 1], dense_attention(q[i : i + 1], keys, values, seen))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_kv_heads", [1, 2, 6])
@pytest.mark.parametrize(("start", "num_tokens"), [(0, 2), (0, 33), (1, 32), (17, 9), (32, 1)])
def test_paged_prefill(dtype: torch.dtype, num_kv_heads: int, start: int, num_tokens: int) -> None:
    k_cache, v_cache, (table,), ((keys, values),) = paged([33], 8, num_kv_heads, dtype)
    end = start + num_tokens
    q = random(num_tokens, 6, 16, dtype=dtype, seed=2)
    plan = ops.PrefillPlan.build([*table, 0, 0], start, num_tokens, 8, dtype, CPU)
    out = ops.paged_prefill(q, k_cache, v_cache, plan)
    assert (out.shape, out.dtype) == (q.shape, dtype)
    seen = torch.arange(end) <= torch.arange(start, end)[:, None]
    assert_close(out, dense_attention(q, keys[:end], values[:end], seen))


def test_decode_plan_pads_tables_with_a_block_of_the_sequence() -> None:
    plan = ops.DecodePlan.build([[5, 6, 9], [7, 8, 3]], [9, 3], 4, torch.float32, CPU)
    assert plan.block_tables.tolist() == [[5, 6, 9], [7, 7, 7]]
    assert (plan.mask[:, 0, 0] == 0).sum(-1).tolist() == [9, 3]
