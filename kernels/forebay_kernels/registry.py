"""The operations of `torch.ops.forebay`: each defined once, for CPU, CUDA and shapes alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_library = torch.library.Library("forebay", "DEF")


def register(schema: str, run: Callable[..., Any], meta: Callable[..., Any]) -> Any:
    """`run` computes on a CPU or a GPU; `meta` gives outputs of the right shapes without values.
    Returns the op as it is called."""
    name = schema.partition("(")[0]
    _library.define(schema)
    _library.impl(name, run, "CPU")
    _library.impl(name, run, "CUDA")
    _library.impl(name, meta, "Meta")
    return getattr(torch.ops.forebay, name).default
