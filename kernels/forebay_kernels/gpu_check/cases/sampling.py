"""sample: from logits to tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from forebay_kernels import ops, reference
from forebay_kernels.gpu_check.case import Arguments, Case, Peer, Target, dtype_name, imported
from forebay_kernels.testkit import Inputs, error_of

_TOP_K, _TOP_P = 50, 0.9


def cases(tiny: bool) -> list[Case]:
    dtypes = (torch.float32, torch.bfloat16)
    if tiny:
        return [_sample(6, 1000, dtype, how) for dtype in dtypes for how in _SETTINGS]
    return [
        *(_sample(64, 131_072, torch.float32, how) for how in _SETTINGS),
        _sample(64, 131_072, torch.bfloat16, "top-k top-p"),
        _sample(1, 131_072, torch.float32, "top-k top-p"),
        _sample(256, 131_072, torch.float32, "top-k top-p"),
    ]


_SETTINGS = {
    "greedy": (0.0, 0, 1.0, 0.0),
    "temperature": (1.0, 0, 1.0, 0.0),
    "top-p": (1.0, 0, _TOP_P, 0.0),
    "top-k top-p": (1.0, _TOP_K, _TOP_P, 0.0),
    "min-p masked": (1.0, 0, 1.0, 0.05),
}
"""Temperature, top-k, top-p, min-p. `masked`: half of the ids do not exist."""


def _sample(rows: int, vocabulary: int, dtype: torch.dtype, how: str) -> Case:
    temperature, top_k, top_p, min_p = _SETTINGS[how]
    masked = "masked" in how

    def draw(inputs: Inputs) -> Arguments:
        def same(value: float, as_dtype: torch.dtype) -> Tensor:
            return torch.full((rows,), value, dtype=as_dtype, device=inputs.device)

        words = -(-vocabulary // 32)
        return (
            inputs.normal(rows, vocabulary, dtype=dtype, scale=3.0),
            torch.arange(rows, dtype=torch.int32, device=inputs.device),
            same(temperature, torch.float32),
            same(top_k, torch.int32),
            same(top_p, torch.float32),
            same(min_p, torch.float32),
            inputs.integers(rows, low=0, high=1 << 62),
            same(0, torch.int32),
            inputs.integers(rows, low=0, high=10_000, dtype=torch.int32),
            inputs.integers(rows, words, low=-(1 << 31), high=1 << 31, dtype=torch.int32)
            if masked
            else None,
        )

    num_bytes = rows * vocabulary * dtype.itemsize + (rows * vocabulary // 8 if masked else 0)
    target = Target(seconds=40e-6) if rows == 64 and vocabulary == 131_072 else Target()
    return Case(
        op="sample",
        shape=f"B {rows} V {vocabulary} {dtype_name(dtype)} {how}",
        num_bytes=num_bytes,
        inputs=draw,
        run=ops.sample,
        check=_check,
        target=target,
        peers=_peers(how),
    )


def _check(arguments: Arguments, result: Any) -> None:
    """The very tokens of the reference."""
    tokens, logprobs = result
    compute: Callable[..., Any] = reference.sample
    wanted, wanted_logprobs = compute(*arguments, True)
    assert torch.equal(tokens, wanted), f"{int((tokens != wanted).sum())} tokens differ"
    assert error_of(logprobs, wanted_logprobs.double()).largest < 1e-5


def _peers(how: str) -> tuple[Peer, ...]:
    if how == "greedy":
        return (Peer("torch", lambda: _torch_greedy),)
    if how == "temperature":
        return (Peer("torch", lambda: _torch_temperature, graph=False),)
    if how == "top-k top-p":
        return (
            Peer("torch", lambda: _torch_top_k_top_p, graph=False),
            Peer("flashinfer", _flashinfer, module="flashinfer"),
        )
    if how == "top-p":
        return (Peer("torch", lambda: _torch_top_p, graph=False),)
    return ()


def _torch_greedy(logits: Tensor, *_: Any) -> Tensor:
    return logits.argmax(-1)


def _torch_temperature(logits: Tensor, *_: Any) -> Tensor:
    """multinomial asks the device whether the probabilities are any: it cannot be captured."""
    return torch.multinomial(logits.float().softmax(-1), 1)


def _torch_top_p(logits: Tensor, *_: Any) -> Tensor:
    probabilities, ids = logits.float().softmax(-1).sort(descending=True)
    left_out = probabilities.cumsum(-1) - probabilities >= _TOP_P
    chosen = torch.multinomial(probabilities.masked_fill(left_out, 0.0), 1)
    return ids.gather(1, chosen)


def _torch_top_k_top_p(logits: Tensor, *_: Any) -> Tensor:
    values, ids = logits.float().topk(_TOP_K)
    probabilities = values.softmax(-1)
    left_out = probabilities.cumsum(-1) - probabilities >= _TOP_P
    chosen = torch.multinomial(probabilities.masked_fill(left_out, 0.0), 1)
    return ids.gather(1, chosen)


def _flashinfer() -> Callable[..., Any]:
    sample = imported("flashinfer.sampling", "top_k_top_p_sampling_from_logits")

    def run(logits: Tensor, *_: Any) -> Any:
        return sample(logits.float(), _TOP_K, _TOP_P)

    return run
