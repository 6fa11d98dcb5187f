from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from exact_rotations import DTYPES, EPS, TOLERANCE, angles, normed, turned
from torch import Tensor

from forebay_kernels import native, ops, reference
from forebay_kernels.checks import ArgumentError
from forebay_kernels.testkit import Inputs, error_of, written
from forebay_kernels.testkit.inputs import is_poison

E4M3 = torch.float8_e4m3fn


@dataclass(frozen=True)
class Case:
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    rotated: int
    interleaved: bool = False
    normed: bool = False
    block_size: int = 16

    def __str__(self) -> str:
        kind = "pairs" if self.interleaved else "halves"
        norm = "-norm" if self.normed else ""
        heads = f"{self.num_q_heads}q{self.num_kv_heads}kv"
        return f"{heads}-{self.head_dim}-{self.rotated}{kind}{norm}"


CASES = [
    Case(9, 3, 64, 64),
    Case(9, 3, 64, 64, normed=True),
    Case(8, 2, 128, 128, interleaved=True),
    Case(4, 1, 128, 64, normed=True, block_size=5),
    Case(3, 3, 96, 32, interleaved=True, normed=True, block_size=1),
    Case(1, 1, 256, 256),
    Case(2, 1, 40, 16),
    Case(2, 2, 24, 20),
    Case(1, 1, 64, 0, normed=True),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_qkv_post(implementation: str, case: Case, dtype: torch.dtype) -> None:
    inputs, tokens = Inputs(seed=case.head_dim), 5
    num_heads = case.num_q_heads + 2 * case.num_kv_heads
    qkv = inputs.normal(tokens, num_heads, case.head_dim, dtype=dtype)
    cos, sin = angles(inputs, tokens, case.rotated)
    weights: list[Tensor | None] = [None, None]
    if case.normed:
        weights = [inputs.normal(case.head_dim, dtype=dtype) for _ in range(2)]
    shape = (12, case.block_size, case.num_kv_heads, case.head_dim)
    caches = [inputs.poisoned(*shape, dtype=dtype) for _ in range(2)]
    slots = inputs.permutation(12 * case.block_size)[:tokens].clone()
    slots[3] = -1
    q = ops.qkv_post(
        qkv, cos, sin, *caches, slots,
        q_weight=weights[0], k_weight=weights[1], eps=EPS, interleaved=case.interleaved,
    )  # fmt: skip
    split = [case.num_q_heads, case.num_kv_heads, case.num_kv_heads]
    exact_q, exact_k, exact_v = qkv.split(split, dim=1)
    exact_q = turned(normed(exact_q, weights[0]), cos, sin, case.interleaved)
    exact_k = turned(normed(exact_k, weights[1]), cos, sin, case.interleaved)
    assert (q.shape, q.dtype, q.is_contiguous()) == (exact_q.shape, dtype, True)
    assert error_of(q, exact_q).relative < TOLERANCE[dtype]
    kept = slots[slots >= 0]
    for cache, exact in zip(caches, (exact_k, exact_v.double()), strict=True):
        rows = cache.view(-1, *shape[2:])
        assert error_of(rows[kept], exact[slots >= 0]).relative < TOLERANCE[dtype]
        others = torch.ones(len(rows), dtype=torch.bool)
        others[kept] = False
        assert bool(is_poison(rows[others]).all())
    assert torch.equal(caches[1].view(-1, *shape[2:])[kept], qkv[slots >= 0, -case.num_kv_heads :])


@pytest.mark.parametrize("interleaved", [False, True])
def test_without_a_norm_every_implementation_gives_the_same_bits(
    implementation: str, interleaved: bool
) -> None:
    inputs = Inputs(seed=1)
    qkv = inputs.normal(6, 7, 64, dtype=torch.bfloat16)
    cos, sin = angles(inputs, 6, 32)
    slots = inputs.permutation(32)[:6].clone()
    scales = torch.tensor([0.37]), torch.tensor([1.9])
    results = []
    for library in (native.libraries.of("cpu"), None):
        native.libraries.use("cpu", library)
        caches = [inputs.poisoned(2, 16, 2, 64, dtype=E4M3) for _ in range(2)]
        q = ops.qkv_post(
            qkv, cos, sin, *caches, slots,
            interleaved=interleaved, k_scale=scales[0], v_scale=scales[1],
        )  # fmt: skip
        results.append([tensor.view(torch.uint8) for tensor in (q, *caches)])
    for actual, expected in zip(*results, strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fp8_caches(implementation: str, dtype: torch.dtype) -> None:
    inputs = Inputs(seed=4)
    qkv = inputs.normal(3, 4, 64, dtype=dtype, scale=20.0)
    qkv[1, 3, 5] = torch.nan
    qkv[2, 3, 6], qkv[2, 3, 7] = 3000.0, -torch.inf
    caches = [inputs.poisoned(4, 1, 1, 64, dtype=E4M3) for _ in range(2)]
    scale = torch.tensor([0.3])
    cos, sin = angles(inputs, 3, 64)
    ops.qkv_post(qkv, cos, sin, *caches, torch.tensor([2, 0, 3]), v_scale=scale)
    values = qkv[:, 3].float() * (1.0 / scale)
    expected = values.clamp(-448.0, 448.0).to(E4M3).float()
    stored = caches[1].float()[[2, 0, 3], 0, 0]
    torch.testing.assert_close(stored, expected, rtol=0.0, atol=0.0, equal_nan=True)
    assert stored[1, 5].isnan() and stored[2, 6] == 448.0 and stored[2, 7] == -448.0
    exact = turned(qkv[:, 2:3], cos, sin, False)[:, 0]
    assert error_of(caches[0].float()[[2, 0, 3], 0, 0], exact).relative < 0.04
    assert all(bool(is_poison(cache[1]).all()) for cache in caches)


def test_views_with_gaps(implementation: str) -> None:
    """Rows cut from wider ones, head-major blocks, keys and values in one tensor."""
    inputs = Inputs(seed=2)
    wide = inputs.normal(4, 9, 128)
    qkv = wide[:, 1:7, 64:]
    cos, sin = angles(inputs, 4, 64)
    slots = torch.tensor([3, 17, -1, 40])
    both = inputs.poisoned(3, 2, 2, 16, 80)
    k_cache, v_cache = (both[:, i, :, :, 16:].transpose(1, 2) for i in range(2))
    q = ops.qkv_post(qkv, cos, sin, k_cache, v_cache, slots)
    plain = [inputs.poisoned(3, 16, 2, 64) for _ in range(2)]
    assert torch.equal(ops.qkv_post(qkv.contiguous(), cos, sin, *plain, slots), q)
    for view, cache in zip((k_cache, v_cache), plain, strict=True):
        assert torch.equal(view.contiguous().view(torch.uint8), cache.view(torch.uint8))
    assert bool(is_poison(both[..., :16].contiguous()).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
def test_every_width_and_every_share_of_it(
    interleaved: bool, dtype: torch.dtype, host_library: native.Library
) -> None:
    """Which thread holds and rotates what: the bits of the reference."""
    inputs, slots = Inputs(seed=11), torch.tensor([1])
    for width in range(16, 257, 16):
        qkv = inputs.normal(1, 3, width, dtype=dtype)
        for rotated in range(0, width + 1, 16):
            cos, sin = angles(inputs, 1, rotated)
            caches = [inputs.poisoned(1, 2, 1, width, dtype=dtype) for _ in range(4)]
            expected = reference.qkv_post(
                qkv, cos, sin, *caches[:2], slots, None, None, 0.0, interleaved, None, None
            )
            q = ops.qkv_post(qkv, cos, sin, *caches[2:], slots, interleaved=interleaved)
            assert torch.equal(q, expected)
            for actual, wanted in zip(caches[2:], caches[:2], strict=True):
                assert torch.equal(actual.view(torch.uint8), wanted.view(torch.uint8))


def test_threads_of_many_tokens_take_several_heads_each(host_library: native.Library) -> None:
    """Bits as those of few tokens, where every few threads take one head."""
    inputs, tokens = Inputs(seed=6), 4600
    qkv, weight = inputs.normal(tokens, 15, 64), inputs.normal(64)
    cos, sin = angles(inputs, tokens, 64)
    slots = inputs.permutation(tokens)

    def run(step: int) -> list[Tensor]:
        caches = [inputs.poisoned(tokens, 1, 3, 64) for _ in range(2)]
        outs = [
            ops.qkv_post(
                qkv[at : at + step], cos[at : at + step], sin[at : at + step], *caches,
                slots[at : at + step], q_weight=weight, eps=EPS,
            )
            for at in range(0, tokens, step)
        ]  # fmt: skip
        return [torch.cat(outs), *caches]

    for together, apart in zip(run(tokens), run(tokens // 2), strict=True):
        assert torch.equal(together, apart) and written(together)


def test_a_cache_of_more_than_two_to_the_31_elements(implementation: str) -> None:
    far = 2**31 + 64
    memory = torch.from_numpy(np.zeros(far + 16 * 64, dtype=np.uint8)).view(E4M3)
    cache = memory.as_strided((2, 16, 1, 64), (far, 64, 64, 1))
    qkv = Inputs(seed=8).normal(2, 3, 64)
    cos, sin = torch.ones(2, 32), torch.zeros(2, 32)
    ops.qkv_post(qkv, cos, sin, cache[:, :8], cache[:, 8:], torch.tensor([15, 0]))
    assert torch.equal(cache[1, 7, 0].float(), qkv[0, 1].to(E4M3).float())
    assert torch.equal(cache[1, 15, 0].float(), qkv[0, 2].to(E4M3).float())
    assert torch.equal(cache[0, 0, 0].float(), qkv[1, 1].to(E4M3).float())


@pytest.mark.parametrize("tokens", [0, 2])
def test_nothing_to_write(implementation: str, tokens: int) -> None:
    inputs = Inputs(seed=3)
    caches = [inputs.poisoned(1, 4, 1, 64) for _ in range(2)]
    qkv, (cos, sin) = inputs.normal(tokens, 4, 64), angles(inputs, tokens, 64)
    slots = torch.full((tokens,), -1)
    assert ops.qkv_post(qkv, cos, sin, *caches, slots).shape == (tokens, 2, 64)
    none = torch.empty(0, 4, 1, 64)
    assert ops.qkv_post(qkv, cos, sin, none, none, slots).shape == (tokens, 2, 64)
    assert all(bool(is_poison(cache).all()) for cache in caches)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_no_order_of_threads_changes_a_bit(host_library: native.Library, order: int) -> None:
    inputs = Inputs(seed=5)
    qkv, weight = inputs.normal(9, 7, 128), inputs.normal(128)
    cos, sin = angles(inputs, 9, 128)
    slots = inputs.permutation(32)[:9].clone()

    def run() -> list[Tensor]:
        caches = [inputs.poisoned(2, 16, 2, 128) for _ in range(2)]
        return [
            ops.qkv_post(qkv, cos, sin, *caches, slots, q_weight=weight, k_weight=weight, eps=EPS),
            *caches,
        ]

    expected = run()
    host_library.order_threads(order)
    for actual, wanted in zip(run(), expected, strict=True):
        assert torch.equal(actual.view(torch.uint8), wanted.view(torch.uint8))


def qkv_arguments() -> dict[str, Tensor]:
    return {
        "qkv": torch.ones(2, 6, 64),
        "cos": torch.ones(2, 32),
        "sin": torch.ones(2, 32),
        "k_cache": torch.ones(2, 4, 1, 64),
        "v_cache": torch.ones(2, 4, 1, 64),
        "slot_mapping": torch.tensor([0, 7]),
    }


BAD_QKV: dict[str, tuple[dict[str, object], str]] = {
    "qkv dtype": ({"qkv": torch.ones(2, 6, 64).double()}, "qkv: dtype torch.float64 is none of"),
    "qkv shape": ({"qkv": torch.ones(2, 384)}, r"qkv: shape \(2, 384\) where"),
    "qkv stride": ({"qkv": torch.ones(2, 64, 6).mT}, r"qkv: strides .* heads have gaps"),
    "qkv alignment": (
        {"qkv": torch.ones(2 * 6 * 64 + 1)[1:].view(2, 6, 64)},
        "qkv: does not begin at a multiple of 16",
    ),
    "few heads": ({"qkv": torch.ones(2, 1, 64)}, "qkv: 1 heads where the caches take 2"),
    "cache dtype": ({"k_cache": torch.ones(2, 4, 1, 64).half()}, "k_cache: dtype torch.float16"),
    "cache shape": ({"v_cache": torch.ones(2, 4, 2, 64)}, "v_cache: shape"),
    "cache stride": (
        {"k_cache": torch.ones(2, 4, 64, 1).mT.expand(2, 4, 1, 64)[..., :1].expand(2, 4, 1, 64)},
        "k_cache: strides",
    ),
    "cache device": ({"v_cache": torch.ones(2, 4, 1, 64, device="meta")}, "v_cache: is on meta"),
    "cos dtype": ({"cos": torch.ones(2, 32).half()}, "cos: dtype torch.float16"),
    "cos rows": ({"cos": torch.ones(3, 32)}, r"cos: shape \(3, 32\)"),
    "sin shape": ({"sin": torch.ones(2, 16)}, r"sin: shape \(2, 16\)"),
    "too many rotated": (
        {"cos": torch.ones(2, 33), "sin": torch.ones(2, 33)},
        "cos: rotates 66 of 64",
    ),
    "sin gaps": ({"sin": torch.ones(2, 64)[:, ::2]}, "sin: has gaps"),
    "slots dtype": ({"slot_mapping": torch.tensor([0, 7]).int()}, "slot_mapping: dtype"),
    "slots shape": ({"slot_mapping": torch.tensor([0])}, r"slot_mapping: shape \(1,\)"),
    "slots gaps": ({"slot_mapping": torch.zeros(4).long()[::2]}, "slot_mapping: has gaps"),
    "slot high": ({"slot_mapping": torch.tensor([0, 8])}, "slot_mapping: slot 8 of a cache of 8"),
    "slot low": ({"slot_mapping": torch.tensor([-2, 1])}, "slot_mapping: slot -2 of a cache"),
    "weight shape": ({"q_weight": torch.ones(32)}, r"q_weight: shape \(32,\)"),
    "weight dtype": ({"k_weight": torch.ones(64).half()}, "k_weight: dtype"),
    "eps": ({"eps": -1.0}, "eps: -1.0 is negative"),
    "scale of a float cache": ({"k_scale": torch.ones(1)}, "k_scale: belongs to fp8 caches"),
}


@pytest.mark.parametrize("name", BAD_QKV)
def test_bad_arguments_of_qkv_post_are_named(implementation: str, name: str) -> None:
    changes, message = BAD_QKV[name]
    arguments = qkv_arguments()
    caches = arguments["k_cache"], arguments["v_cache"]
    with pytest.raises(ArgumentError, match=f"^qkv_post: {message}"):
        ops.qkv_post(**(arguments | changes))
    assert all(bool((cache == 1.0).all()) for cache in caches)


def test_shapes_alone() -> None:
    arguments = {name: tensor.to("meta") for name, tensor in qkv_arguments().items()}
    assert ops.qkv_post(**arguments).shape == (2, 4, 64)
