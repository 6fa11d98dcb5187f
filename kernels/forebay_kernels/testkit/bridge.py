"""Tests that are written for tensors on the CPU, computed on another device."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only


class OnDevice(TorchDispatchMode):
    """While it lasts, torch.ops.forebay computes CPU tensors on `device`.

    Whole storages are copied there and back: strides, offsets, alignment to 16 bytes and tensors
    that share memory are what they were, and what an op wrote beside its tensors shows as it would
    on the CPU.
    """

    def __init__(self, device: torch.device | str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._device = torch.device(device)

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = dict(kwargs or {})
        if func.namespace != "forebay":
            return func(*args, **given)
        storages = _Storages(self._device)
        there = tree_map_only(Tensor, storages.tensor, (args, given))
        out = func(*there[0], **there[1])
        storages.copy_back()
        return tree_map_only(Tensor, _to_cpu, out)


class _Storages:
    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copies: dict[int, tuple[Tensor, Tensor]] = {}

    def tensor(self, tensor: Tensor) -> Tensor:
        if tensor.device.type != "cpu":
            return tensor
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._copies:
            here = torch.empty(0, dtype=torch.uint8).set_(storage)
            there = torch.zeros(here.shape, dtype=torch.uint8, device=self._device)
            self._copies[storage.data_ptr()] = (here, there.copy_(here))
        _, there = self._copies[storage.data_ptr()]
        out = torch.empty(0, dtype=tensor.dtype, device=self._device)
        return out.set_(
            there.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride()
        )

    def copy_back(self) -> None:
        for here, there in self._copies.values():
            here.copy_(there)


def _to_cpu(tensor: Tensor) -> Tensor:
    return tensor if tensor.device.type == "meta" else tensor.cpu()
