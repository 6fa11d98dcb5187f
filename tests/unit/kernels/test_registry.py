from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from forebay_kernels import ops
from forebay_kernels.testkit import Inputs


def test_an_op_is_the_same_by_its_name_in_torch(implementation: str) -> None:
    x, weight = Inputs(seed=1).normal(3, 64), Inputs(seed=2).normal(64)
    expected = ops.rms_norm(x, weight, 1e-5)
    assert torch.equal(torch.ops.forebay.rms_norm(x, weight, 1e-5), expected)


def test_a_tensor_without_values_gets_one_of_the_right_shape() -> None:
    with FakeTensorMode():
        qkv, cos = torch.empty(5, 6, 64), torch.empty(5, 32)
        cache, slots = torch.empty(2, 16, 1, 64), torch.empty(5, dtype=torch.int64)
        q = ops.qkv_post(qkv, cos, cos, cache, cache, slots)
        normed, total = ops.add_rms_norm(qkv[0], qkv[1], cos.new_empty(64), 1e-5)
    assert isinstance(q, FakeTensor) and q.shape == (5, 4, 64)
    assert normed.shape == total.shape == (6, 64)
