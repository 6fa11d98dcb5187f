"""Mixture of experts around its matrix products, in DeepSeek-V3's sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from forebay_kernels import ops, reference
from forebay_kernels.gpu_check.case import Arguments, Case, Peer, Target
from forebay_kernels.testkit import Inputs, error_of, written

_SCALE = 2.5


@dataclass(frozen=True, slots=True)
class _Model:
    """width: values of a token; multiple: what an expert's rows are padded to."""

    experts: int
    top_k: int
    groups: int
    kept_groups: int
    width: int
    multiple: int

    def ids(self, inputs: Inputs, tokens: int) -> Tensor:
        """int32 [T, K]; no expert twice for one token."""
        ranks = inputs.uniform(tokens, self.experts)
        return ranks.topk(self.top_k).indices.int()

    def slots(self, tokens: int) -> int:
        return reference.num_slots(tokens * self.top_k, self.experts, self.multiple)


_DEEPSEEK = _Model(256, 8, 8, 4, 7168, 64)
_TINY = _Model(16, 4, 4, 2, 192, 8)


def cases(tiny: bool) -> list[Case]:
    if tiny:
        makers = (_route, _align, _permute, _unpermute)
        return [make(_TINY, tokens) for make in makers for tokens in (1, 9)]
    return [
        *(_route(_DEEPSEEK, tokens) for tokens in (128, 4096)),
        *(_align(_DEEPSEEK, tokens) for tokens in (128, 4096)),
        *(make(_DEEPSEEK, tokens) for make in (_permute, _unpermute) for tokens in (128, 4096)),
    ]


def _name(model: _Model, tokens: int) -> str:
    return f"T {tokens} {model.top_k} of {model.experts}"


def _movers_target(tokens: int) -> Target:
    return Target(share=0.85) if tokens >= 4096 else Target()


def _route(model: _Model, tokens: int) -> Case:
    def draw(inputs: Inputs) -> Arguments:
        return (
            inputs.normal(tokens, model.experts),
            inputs.normal(model.experts, scale=0.1),
            *(model.top_k, model.groups, model.kept_groups),
        )

    return Case(
        op="moe_route",
        shape=f"{_name(model, tokens)} fp32, {model.kept_groups} of {model.groups} groups",
        num_bytes=tokens * (model.experts * 4 + model.top_k * 8) + model.experts * 4,
        inputs=draw,
        run=_run_route,
        check=_check_route,
        target=Target(seconds=5e-6) if tokens == 128 else Target(),
        peers=(Peer("torch", lambda: _torch_route),),
    )


def _run_route(
    logits: Tensor, bias: Tensor, top_k: int, groups: int, kept: int
) -> tuple[Tensor, Tensor]:
    return ops.moe_route(logits, bias, top_k, groups, kept, "sigmoid", True, _SCALE)


def _torch_route(logits: Tensor, bias: Tensor, top_k: int, groups: int, kept: int) -> Any:
    """As DeepSeek's own code does it: ties may fall otherwise."""
    scores = logits.sigmoid()
    biased = (scores + bias).unflatten(-1, (groups, -1))
    best = biased.topk(2).values.sum(-1).topk(kept).indices
    dropped = torch.ones_like(biased[..., 0], dtype=torch.bool).scatter_(1, best, False)
    ids = biased.masked_fill(dropped[..., None], -torch.inf).flatten(-2).topk(top_k).indices
    weights = scores.gather(1, ids)
    return weights / weights.sum(-1, keepdim=True) * _SCALE, ids


def _check_route(arguments: Arguments, result: Any) -> None:
    """Ids by the reference in fp64 but where the fp32 ranks tie; weights of the ids chosen."""
    logits, bias, top_k, groups, kept = arguments
    weights, ids = result
    assert written(weights) and ids.shape == weights.shape == (len(logits), top_k)
    scores = logits.double().sigmoid()
    _, wanted = reference.moe_route(
        logits, bias, top_k, groups, kept, softmax=False, renormalise=True, scale=_SCALE
    )
    differing = int((ids != wanted).any(-1).sum())
    assert differing <= len(logits) // 500, f"{differing} tokens go elsewhere"
    own = scores.gather(1, ids.long())
    assert error_of(weights, own / own.sum(-1, keepdim=True) * _SCALE).relative < 1e-6


def _align(model: _Model, tokens: int) -> Case:
    choices = tokens * model.top_k

    def draw(inputs: Inputs) -> Arguments:
        return model.ids(inputs, tokens), model.experts, model.multiple

    return Case(
        op="moe_align",
        shape=f"{_name(model, tokens)} multiple {model.multiple}",
        num_bytes=choices * 8 + model.slots(tokens) * 4 + model.experts * 4,
        inputs=draw,
        run=ops.moe_align,
        check=_check_align,
        peers=(Peer("torch", lambda: reference.moe_align),),
    )


def _check_align(arguments: Arguments, result: Any) -> None:
    for found, wanted in zip(result, reference.moe_align(*arguments), strict=True):
        assert torch.equal(found, wanted)


def _permute(model: _Model, tokens: int) -> Case:
    def draw(inputs: Inputs) -> Arguments:
        order, _, _ = reference.moe_align(model.ids(inputs, tokens), model.experts, model.multiple)
        return inputs.normal(tokens, model.width, dtype=torch.bfloat16), order, model.top_k

    row = model.width * 2
    return Case(
        op="moe_permute",
        shape=f"{_name(model, tokens)} x{model.width} bf16",
        num_bytes=tokens * row + model.slots(tokens) * (row + 4),
        inputs=draw,
        run=ops.moe_permute,
        check=_check_permute,
        target=_movers_target(tokens),
        peers=(Peer("torch", lambda: _torch_permute),),
    )


def _check_permute(arguments: Arguments, out: Any) -> None:
    assert torch.equal(out, reference.moe_permute(*arguments))


def _torch_permute(x: Tensor, order: Tensor, top_k: int) -> Tensor:
    """Rows of padding get the first token's."""
    return x.index_select(0, order.clamp(0) // top_k)


def _unpermute(model: _Model, tokens: int) -> Case:
    def draw(inputs: Inputs) -> Arguments:
        _, _, inverse = reference.moe_align(
            model.ids(inputs, tokens), model.experts, model.multiple
        )
        return (
            inputs.normal(model.slots(tokens), model.width, dtype=torch.bfloat16),
            inverse,
            inputs.uniform(tokens, model.top_k),
            inputs.normal(tokens, model.width, dtype=torch.bfloat16),
        )

    row = model.width * 2
    return Case(
        op="moe_unpermute",
        shape=f"{_name(model, tokens)} x{model.width} bf16, shared",
        num_bytes=tokens * (model.top_k * (row + 8) + 2 * row),
        inputs=draw,
        run=ops.moe_unpermute,
        check=_check_unpermute,
        target=_movers_target(tokens),
        peers=(Peer("torch", lambda: _torch_unpermute),),
    )


def _check_unpermute(arguments: Arguments, out: Any) -> None:
    y, inverse, weights, shared = arguments
    rows = y[inverse.long()].double().unflatten(0, weights.shape)
    wanted = shared.double() + (weights.double()[..., None] * rows).sum(1)
    assert written(out)
    error = error_of(out, wanted)
    assert error.relative < 4e-3, str(error)


def _torch_unpermute(y: Tensor, inverse: Tensor, weights: Tensor, shared: Tensor) -> Any:
    rows = y.index_select(0, inverse).unflatten(0, weights.shape)
    return shared + (rows * weights[..., None].to(y.dtype)).sum(1)
