"""The operations of `torch.ops.forebay`: each defined once, for CPU, CUDA and shapes alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_library = torch.library.Library("forebay", "DEF")


def register(schema: str, run: Callable[..., Any], meta: Callable[..., Any]) -> Any:
    """`run` computes on a CPU or a GPU; `meta` gives outputs of the right shapes without values.

    Returns the op as it is called. Plain tensors with values go straight to `run`: finding the way
    there through torch takes longer than many an op on a few tokens. Everything else, such as the
    fake tensors of a compilation, goes through `torch.ops.forebay`.
    """
    name = schema.partition("(")[0]
    _library.define(schema)
    _library.impl(name, run, "CPU")
    _library.impl(name, run, "CUDA")
    _library.impl(name, meta, "Meta")
    op = getattr(torch.ops.forebay, name).default

    def call(first: Tensor, *others: Any) -> Any:
        plain = type(first) is Tensor and (first.is_cpu or first.is_cuda)
        watched = torch._C._len_torch_dispatch_stack() > 0  # by a mode that wants to see every op
        if plain and not watched and not torch.compiler.is_compiling():
            return run(first, *others)
        return op(first, *others)

    return call
