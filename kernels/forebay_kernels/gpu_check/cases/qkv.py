"""What follows the projections (qkv_post, mla_post), and merge_lse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from forebay_kernels import ops, reference
from forebay_kernels.gpu_check.case import Arguments, Case, Peer, Target, imported
from forebay_kernels.reference.qkv import rotate
from forebay_kernels.testkit import Inputs, error_of, written

_BLOCK_SIZE = 16
_EPS = 1e-6
_TOLERANCE = 4e-3
_FP8_TOLERANCE = 0.04


def cases(tiny: bool) -> list[Case]:
    if tiny:
        return [
            _qkv_post(5, 4, 2, 64, False),
            _qkv_post(5, 4, 2, 64, True),
            _mla_post(3, 2, False),
            _mla_post(3, 2, True),
            _merge_lse(3, 5, 2, 64),
        ]
    return [
        *(_qkv_post(tokens, 32, 8, 128, fp8) for tokens in (64, 4096) for fp8 in (False, True)),
        *(_mla_post(tokens, 16, fp8) for tokens in (64, 4096) for fp8 in (False, True)),
        _merge_lse(2, 4096, 32, 128),
        _merge_lse(2, 64, 32, 128),
    ]


def _slots(inputs: Inputs, tokens: int) -> tuple[Tensor, int]:
    """A slot for each token, some of them none; and how many blocks there are."""
    num_blocks = -(-2 * tokens // _BLOCK_SIZE)
    slots = inputs.permutation(num_blocks * _BLOCK_SIZE)[:tokens]
    slots[tokens // 2] = -1
    return slots, num_blocks


def _cache(inputs: Inputs, fp8: bool, *shape: int) -> Tensor:
    if not fp8:
        return inputs.normal(*shape, dtype=torch.bfloat16)
    return inputs.normal(*shape).to(torch.float8_e4m3fn)


def _angles(inputs: Inputs, tokens: int, rotated: int) -> tuple[Tensor, Tensor]:
    angles = inputs.uniform(tokens, rotated // 2, low=-100.0, high=100.0)
    return angles.cos(), angles.sin()


def _scale(inputs: Inputs, fp8: bool) -> Tensor | None:
    return inputs.uniform(1, low=0.05, high=0.1) if fp8 else None


def _rows(cache: Tensor, slots: Tensor, scale: Tensor | None) -> Tensor:
    """float64, of the tokens that have a slot."""
    kept = slots[slots >= 0]
    rows = cache.view(torch.uint8).flatten(0, 1)[kept].view(cache.dtype)
    return rows.double() * (1.0 if scale is None else scale.double())


def _qkv_post(tokens: int, q_heads: int, kv_heads: int, head_dim: int, fp8: bool) -> Case:
    def draw(inputs: Inputs) -> Arguments:
        slots, num_blocks = _slots(inputs, tokens)
        shape = (num_blocks, _BLOCK_SIZE, kv_heads, head_dim)
        return (
            inputs.normal(tokens, q_heads + 2 * kv_heads, head_dim, dtype=torch.bfloat16),
            *_angles(inputs, tokens, head_dim),
            _cache(inputs, fp8, *shape),
            _cache(inputs, fp8, *shape),
            slots,
            _scale(inputs, fp8),
            _scale(inputs, fp8),
        )

    size = 1 if fp8 else 2
    per_token = (
        ((q_heads + 2 * kv_heads) * 2 + q_heads * 2 + 2 * kv_heads * size) * head_dim
        + head_dim * 4 + 8
    )  # fmt: skip
    return Case(
        op="qkv_post",
        shape=f"T {tokens} {q_heads}+2x{kv_heads} heads of {head_dim} {_cached(fp8)}",
        num_bytes=tokens * per_token,
        inputs=draw,
        run=_run_qkv_post,
        check=_check_qkv_post,
        target=_post_target(tokens, {} if fp8 else {"flashinfer": 1.5}),
        peers=(
            Peer("torch", lambda: _torch_qkv_post),
            *(() if fp8 else (Peer("flashinfer", _flashinfer, module="flashinfer"),)),
        ),
    )


def _cached(fp8: bool) -> str:
    return "bf16, cache fp8" if fp8 else "bf16"


def _post_target(tokens: int, times: dict[str, float]) -> Target:
    if tokens >= 4096:
        return Target(share=0.8, times=times)
    return Target(seconds=3e-6, times=times) if tokens == 64 else Target()


def _run_qkv_post(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> Tensor:
    return ops.qkv_post(qkv, cos, sin, k_cache, v_cache, slots, k_scale=k_scale, v_scale=v_scale)


def _check_qkv_post(arguments: Arguments, q: Any) -> None:
    qkv, cos, sin, k_cache, v_cache, slots, k_scale, v_scale = arguments
    kv_heads = k_cache.shape[2]
    q_heads = qkv.shape[1] - 2 * kv_heads
    wanted_q, wanted_k, wanted_v = qkv.double().split([q_heads, kv_heads, kv_heads], dim=1)
    wanted_q, wanted_k = (_rotated(x, cos, sin) for x in (wanted_q, wanted_k))
    kept = slots >= 0
    assert written(q)
    assert error_of(q, wanted_q).relative < _TOLERANCE
    tolerance = _FP8_TOLERANCE if k_cache.element_size() == 1 else _TOLERANCE
    for cache, wanted, scale in ((k_cache, wanted_k, k_scale), (v_cache, wanted_v, v_scale)):
        error = error_of(_rows(cache, slots, scale), wanted[kept])
        assert error.relative < tolerance, str(error)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """float64; pairs (i, i + D / 2)."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos.double()[:, None], sin.double()[:, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def _torch_qkv_post(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> Tensor:
    """Rotation and index_copy_, a slot for every token; what has none goes to the first."""
    if k_scale is not None:
        scales = (k_scale, v_scale)
        unused = (None, None, 0.0, False)
        return reference.qkv_post(qkv, cos, sin, k_cache, v_cache, slots, *unused, *scales)
    kv_heads = k_cache.shape[2]
    q, k, v = qkv.split([qkv.shape[1] - 2 * kv_heads, kv_heads, kv_heads], dim=1)
    places = slots.clamp(0)
    k_cache.flatten(0, 1).index_copy_(0, places, rotate(k, cos, sin, False).to(k.dtype))
    v_cache.flatten(0, 1).index_copy_(0, places, v)
    return rotate(q, cos, sin, False).to(q.dtype)


def _flashinfer() -> Callable[..., Any]:
    """Its two separate ops, in place; what they want to know of the tokens is made ready when the
    arguments are first seen."""
    rope = imported("flashinfer.rope", "apply_rope_with_cos_sin_cache_inplace")
    append = imported("flashinfer.page", "append_paged_kv_cache")
    ready: dict[int, tuple[Tensor, ...]] = {}

    def run(
        qkv: Tensor,
        cos: Tensor,
        sin: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        slots: Tensor,
        *_: Tensor | None,
    ) -> Any:
        if slots.data_ptr() not in ready:
            places = slots.clamp(0)
            numbers = torch.arange(len(slots) + 1, device=slots.device, dtype=torch.int32)
            ready[slots.data_ptr()] = (
                numbers[:-1].long(),
                torch.cat((cos, sin), dim=-1),
                numbers[:-1].clone(),
                (places % _BLOCK_SIZE).int(),
                (places // _BLOCK_SIZE).int(),
                numbers,
                (places % _BLOCK_SIZE + 1).int(),
            )
        positions, table, batch, offsets, pages, starts, lengths = ready[slots.data_ptr()]
        kv_heads, head_dim = k_cache.shape[2:]
        q, k, v = qkv.split([qkv.shape[1] - 2 * kv_heads, kv_heads, kv_heads], dim=1)
        rope(positions, q.flatten(1), k.flatten(1), head_dim, table)
        append(k, v, batch, offsets, (k_cache, v_cache), pages, starts, lengths)
        return q

    return run


def _mla_post(tokens: int, heads: int, fp8: bool) -> Case:
    latent, rotated = 512, 64

    def draw(inputs: Inputs) -> Arguments:
        slots, num_blocks = _slots(inputs, tokens)
        return (
            inputs.normal(tokens, latent + rotated, dtype=torch.bfloat16),
            inputs.normal(tokens, heads, rotated, dtype=torch.bfloat16),
            inputs.normal(latent, dtype=torch.bfloat16),
            _EPS,
            *_angles(inputs, tokens, rotated),
            _cache(inputs, fp8, num_blocks, _BLOCK_SIZE, latent + rotated),
            slots,
            _scale(inputs, fp8),
        )

    row = latent + rotated
    per_token = row * 2 + 2 * heads * rotated * 2 + row * (1 if fp8 else 2) + rotated * 4 + 8
    return Case(
        op="mla_post",
        shape=f"T {tokens} {heads} heads {latent}+{rotated} {_cached(fp8)}",
        num_bytes=tokens * per_token + latent * 2,
        inputs=draw,
        run=_run_mla_post,
        check=_check_mla_post,
        target=_post_target(tokens, {}),
        peers=(Peer("torch", lambda: _torch_mla_post),),
    )


def _run_mla_post(*arguments: Any) -> Tensor:
    *given, scale = arguments
    return ops.mla_post(*given, scale=scale)


def _torch_mla_post(*arguments: Any) -> Tensor:
    kv, q_pe, weight, eps, cos, sin, cache, slots, scale = arguments
    return reference.mla_post(kv, q_pe, weight, eps, cos, sin, cache, slots, True, scale)


def _check_mla_post(arguments: Arguments, q: Any) -> None:
    kv, q_pe, weight, eps, cos, sin, cache, slots, scale = arguments
    latent = kv[:, : len(weight)].double()
    factor = (latent.square().mean(-1, keepdim=True) + eps).rsqrt()
    k_pe = _rotated_pairs(kv[:, None, len(weight) :].double(), cos, sin)[:, 0]
    wanted = torch.cat((latent * factor * weight.double(), k_pe), dim=-1)[slots >= 0]
    assert written(q)
    assert error_of(q, _rotated_pairs(q_pe.double(), cos, sin)).relative < _TOLERANCE
    error = error_of(_rows(cache, slots, scale), wanted)
    assert error.relative < (_TOLERANCE if scale is None else _FP8_TOLERANCE), str(error)


def _rotated_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """float64; pairs (2i, 2i + 1)."""
    first, second = x[..., 0::2], x[..., 1::2]
    cos, sin = cos.double()[:, None], sin.double()[:, None]
    turned = (first * cos - second * sin, second * cos + first * sin)
    return torch.stack(turned, dim=-1).flatten(-2)


def _merge_lse(parts: int, tokens: int, heads: int, head_dim: int) -> Case:
    def draw(inputs: Inputs) -> Arguments:
        lses = inputs.normal(parts, tokens, heads, scale=4.0)
        lses[0, 0] = -torch.inf
        return inputs.normal(parts, tokens, heads, head_dim, dtype=torch.bfloat16), lses

    rows = tokens * heads
    return Case(
        op="merge_lse",
        shape=f"{parts} parts T {tokens} {heads} heads of {head_dim} bf16",
        num_bytes=(parts + 1) * rows * (head_dim * 2 + 4),
        inputs=draw,
        run=ops.merge_lse,
        check=_check_merge_lse,
        target=Target(share=0.85) if tokens >= 4096 else Target(),
        peers=(
            Peer("torch", lambda: reference.merge_lse),
            *((Peer("flashinfer", _merge_state, module="flashinfer"),) if parts == 2 else ()),
        ),
    )


def _check_merge_lse(arguments: Arguments, result: Any) -> None:
    outs, lses = arguments
    out, lse = result
    weights = lses.double().softmax(0)
    assert written(out, lse)
    assert error_of(out, (weights[..., None] * outs.double()).sum(0)).relative < _TOLERANCE
    assert error_of(lse, lses.double().logsumexp(0)).relative < 1e-6


def _merge_state() -> Callable[..., Any]:
    merge = imported("flashinfer.cascade", "merge_state")

    def run(outs: Tensor, lses: Tensor) -> Any:
        """The same bytes, though it takes its logarithms to base 2."""
        return merge(outs[0], lses[0], outs[1], lses[1])

    return run
