"""Arguments refused before anything is launched: errors that name the op and the argument."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class ArgumentError(ValueError):
    """`op: argument: what is wrong with it`."""

    def __init__(self, op: str, argument: str, problem: str) -> None:
        super().__init__(f"{op}: {argument}: {problem}")


def require(condition: bool, op: str, argument: str, problem: str) -> None:
    if not condition:
        raise ArgumentError(op, argument, problem)


def check_tensor(
    op: str,
    argument: str,
    tensor: Tensor,
    *,
    dtypes: tuple[torch.dtype, ...],
    shape: tuple[int | None, ...],
    device: torch.device,
) -> None:
    """None in `shape` stands for any size."""
    if tensor.dtype not in dtypes:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ArgumentError(op, argument, f"dtype {tensor.dtype} is none of {names}")
    if tensor.device != device:
        raise ArgumentError(op, argument, f"is on {tensor.device}, not on {device}")
    if len(shape) != tensor.ndim or any(
        wanted is not None and wanted != size
        for wanted, size in zip(shape, tensor.shape, strict=True)
    ):
        wanted_shape = ", ".join("*" if size is None else str(size) for size in shape)
        raise ArgumentError(
            op, argument, f"shape {tuple(tensor.shape)} where [{wanted_shape}] belongs"
        )


def check_aligned(op: str, argument: str, tensor: Tensor) -> None:
    """The first element to 16 bytes: kernels read and write that much at once."""
    if tensor.device.type != "meta" and tensor.data_ptr() % 16 != 0:
        raise ArgumentError(op, argument, "does not begin at a multiple of 16 bytes")
