from __future__ import annotations

import pytest
import torch
from exact_rotations import DTYPES, EPS, TOLERANCE, angles, normed, turned
from torch import Tensor

from forebay_kernels import native, ops
from forebay_kernels.checks import ArgumentError
from forebay_kernels.testkit import Inputs, error_of, written
from forebay_kernels.testkit.inputs import is_poison

E4M3 = torch.float8_e4m3fn


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("num_heads", [1, 16, 128])
def test_mla_post(
    implementation: str, num_heads: int, interleaved: bool, dtype: torch.dtype
) -> None:
    inputs, tokens = Inputs(seed=num_heads), 3
    kv = inputs.normal(tokens, 640, dtype=dtype)[:, 32:608]
    q_pe = inputs.normal(tokens, num_heads, 192, dtype=dtype)[..., 128:]
    weight, (cos, sin) = inputs.normal(512, dtype=dtype), angles(inputs, tokens, 64)
    cache = inputs.poisoned(3, 4, 576, dtype=dtype)
    slots = torch.tensor([7, -1, 2])
    out = ops.mla_post(kv, q_pe, weight, EPS, cos, sin, cache, slots, interleaved=interleaved)
    assert written(out)
    exact = turned(q_pe, cos, sin, interleaved)
    assert error_of(out, exact).relative < TOLERANCE[dtype]
    k_pe = turned(kv[:, None, 512:], cos, sin, interleaved)[:, 0]
    exact = torch.cat((normed(kv[:, :512], weight), k_pe), dim=-1)
    rows = cache.view(12, 576)
    assert error_of(rows[[7, 2]], exact[[0, 2]]).relative < TOLERANCE[dtype]
    assert bool(is_poison(rows[[0, 1, 3, 4, 5, 6, 8, 9, 10, 11]]).all())


def test_mla_post_to_fp8(implementation: str) -> None:
    inputs = Inputs(seed=9)
    kv, q_pe = inputs.normal(2, 96, dtype=torch.bfloat16), torch.zeros(2, 1, 32).bfloat16()
    weight, (cos, sin) = inputs.normal(64, dtype=torch.bfloat16), angles(inputs, 2, 32)
    kv[1, 80] = torch.nan
    cache, scale = inputs.poisoned(4, 1, 96, dtype=E4M3), torch.tensor([0.02])
    ops.mla_post(kv, q_pe, weight, EPS, cos, sin, cache, torch.tensor([1, 3]), scale=scale)
    k_pe = turned(kv[:, None, 64:], cos, sin, True)[:, 0]
    exact = torch.cat((normed(kv[:, :64], weight), k_pe), dim=-1)
    assert error_of(cache[[1, 3], 0].float() * scale, exact).relative < 0.04
    assert cache[3, 0].float().isnan().sum() == 2
    assert bool(is_poison(cache[[0, 2]]).all())


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("tokens", [3, 1030])
def test_no_order_of_threads_changes_a_bit(
    host_library: native.Library, tokens: int, order: int
) -> None:
    inputs = Inputs(seed=5)
    kv, q_pe, weight = inputs.normal(tokens, 96), inputs.normal(tokens, 3, 32), inputs.normal(64)
    (cos, sin), slots = angles(inputs, tokens, 32), inputs.permutation(tokens)

    def run() -> list[Tensor]:
        cache = inputs.poisoned(tokens, 1, 96)
        return [ops.mla_post(kv, q_pe, weight, EPS, cos, sin, cache, slots), cache]

    expected = run()
    assert written(*expected)
    host_library.order_threads(order)
    for actual, wanted in zip(run(), expected, strict=True):
        assert torch.equal(actual, wanted)


def mla_arguments() -> dict[str, Tensor | float]:
    return {
        "kv": torch.ones(2, 96),
        "q_pe": torch.ones(2, 3, 32),
        "weight": torch.ones(64),
        "eps": EPS,
        "cos": torch.ones(2, 16),
        "sin": torch.ones(2, 16),
        "cache": torch.ones(2, 4, 96),
        "slot_mapping": torch.tensor([0, 7]),
    }


BAD_MLA: dict[str, tuple[dict[str, object], str]] = {
    "kv shape": ({"kv": torch.ones(2, 1, 96)}, "kv: shape"),
    "weight": ({"weight": torch.ones(96)}, "weight: 96 values for rows of 96"),
    "q_pe width": ({"q_pe": torch.ones(2, 3, 64)}, "q_pe: shape"),
    "q_pe stride": ({"q_pe": torch.ones(2, 32, 3).mT}, "q_pe: strides"),
    "cache width": ({"cache": torch.ones(2, 4, 64)}, "cache: shape"),
    "partial": ({"cos": torch.ones(2, 8), "sin": torch.ones(2, 8)}, "cos: not all of q_pe"),
    "slot": ({"slot_mapping": torch.tensor([8, 0])}, "slot_mapping: slot 8 of a cache of 8"),
    "scale": (
        {"cache": torch.ones(2, 4, 96).to(E4M3), "scale": torch.ones(2)},
        r"scale: shape \(2,\)",
    ),
}


@pytest.mark.parametrize("name", BAD_MLA)
def test_bad_arguments_of_mla_post_are_named(name: str) -> None:
    changes, message = BAD_MLA[name]
    with pytest.raises(ArgumentError, match=f"^mla_post: {message}"):
        ops.mla_post(**(mla_arguments() | changes))


def test_shapes_alone() -> None:
    arguments = {
        name: value.to("meta") if isinstance(value, Tensor) else value
        for name, value in mla_arguments().items()
    }
    assert ops.mla_post(**arguments).shape == (2, 3, 32)
