"""silu_and_mul, with and without quantisation to fp8."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from forebay_kernels import ops, reference
from forebay_kernels.gpu_check.case import Arguments, Case, Peer, Target, imported
from forebay_kernels.testkit import Inputs, error_of, written


def cases(tiny: bool) -> list[Case]:
    shapes = [(5, 200), (3, 2048)] if tiny else [(4096, 14_336), (64, 14_336), (4096, 2048)]
    return [make(*shape) for shape in shapes for make in (_plain, _quantised)]


def _draw(rows: int, width: int) -> Any:
    def draw(inputs: Inputs) -> Arguments:
        return (inputs.normal(rows, 2 * width, dtype=torch.bfloat16),)

    return draw


def _exact(x: Tensor) -> Tensor:
    gate, up = x.double().chunk(2, dim=-1)
    return F.silu(gate) * up


def _check(arguments: Arguments, out: Any) -> None:
    assert written(out)
    error = error_of(out, _exact(*arguments))
    assert error.relative < 4e-3, str(error)


def _check_quantised(arguments: Arguments, result: Any) -> None:
    codes, scales = result
    assert written(scales)
    error = error_of(reference.dequantise_groups(codes, scales, 128), _exact(*arguments))
    assert error.relative < 0.04, str(error)


def _target(rows: int) -> Target:
    return Target(share=0.85) if rows >= 4096 else Target()


def _plain(rows: int, width: int) -> Case:
    return Case(
        op="silu_and_mul",
        shape=f"{rows}x{width} bf16",
        num_bytes=3 * rows * width * 2,
        inputs=_draw(rows, width),
        run=ops.silu_and_mul,
        check=_check,
        target=_target(rows),
        peers=(
            Peer("torch", lambda: _torch),
            Peer(
                "flashinfer",
                lambda: imported("flashinfer.activation", "silu_and_mul"),
                module="flashinfer",
            ),
        ),
    )


def _quantised(rows: int, width: int) -> Case:
    return Case(
        op="silu_and_mul_quant",
        shape=f"{rows}x{width} bf16",
        num_bytes=rows * (2 * width * 2 + width + -(-width // 128) * 4),
        inputs=_draw(rows, width),
        run=ops.silu_and_mul_quant,
        check=_check_quantised,
        target=_target(rows),
        peers=(Peer("torch", lambda: _torch_quantised),),
    )


def _torch(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def _torch_quantised(x: Tensor) -> Any:
    gate, up = x.float().chunk(2, dim=-1)
    return reference.quantise_groups(F.silu(gate) * up, 128)
