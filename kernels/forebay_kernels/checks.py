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
    require(is_aligned(tensor), op, argument, "does not begin at a multiple of 16 bytes")


def is_aligned(tensor: Tensor) -> bool:
    return tensor.is_meta or tensor.data_ptr() % 16 == 0


def plain(tensor: Tensor, like: Tensor) -> bool:
    """Whether nothing can be wrong with the tensor but its shape and values: of like's dtype, on
    its device, without gaps, aligned. A quick look before the checks that find what is wrong."""
    return (
        tensor.dtype is like.dtype
        and tensor.device == like.device
        and tensor.is_contiguous()
        and is_aligned(tensor)
    )
