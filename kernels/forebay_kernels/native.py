"""The compiled libraries, loaded when first wanted, and calls into them."""

from __future__ import annotations

import ctypes
import logging
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from forebay_kernels.build import VARIANTS, BuildError, build, library_path
from forebay_kernels.isa import best_isa
from forebay_kernels.params import constants, structs

logger = logging.getLogger(__name__)

_STATUS = constants("ForebayStatus")
OK, UNSUPPORTED = _STATUS["FOREBAY_OK"], _STATUS["FOREBAY_UNSUPPORTED"]
_CUDA_ERROR = _STATUS["FOREBAY_CUDA_ERROR"]
_DTYPES = constants("ForebayDtype")
DTYPE_CODES = {
    torch.float32: _DTYPES["FOREBAY_F32"],
    torch.bfloat16: _DTYPES["FOREBAY_BF16"],
    torch.float16: _DTYPES["FOREBAY_F16"],
    torch.float8_e4m3fn: _DTYPES["FOREBAY_E4M3"],
}


class KernelError(RuntimeError):
    """A kernel that could not be started or that failed."""


class Library:
    """One variant's entry points."""

    def __init__(self, variant: str, path: Path) -> None:
        self.variant = variant
        self._library = ctypes.CDLL(str(path))
        self._entries: dict[str, tuple[Any, type[ctypes.Structure]]] = {}

    def call(self, op: str, stream: int = 0, /, **fields: int | float | None) -> bool:
        """Fields of the op's struct by name; pointers as integers, None for null, absent ones 0.
        False when the op does not support what it was given. Raises KernelError."""
        return self.start(op, stream, fields)

    def start(self, op: str, stream: int, fields: dict[str, int | float | None]) -> bool:
        """As `call`, for callers that have the fields in a dictionary."""
        entry = self._entries.get(op)
        if entry is None:
            function = getattr(self._library, f"forebay_{op}")
            function.argtypes = (ctypes.c_void_p, ctypes.c_void_p)
            entry = self._entries[op] = (function, structs()[op])
        function, struct = entry
        params = struct(**fields)
        status = function(ctypes.addressof(params), stream)
        if status == OK:
            return True
        if status == UNSUPPORTED:
            return False
        raise KernelError(f"{op} ({self.variant}): {_describe(status)}")

    def order_threads(self, order: int) -> None:
        """Of the host shim: 0 ascending, 1 descending, more: shuffled by that seed."""
        self._library.forebay_host_order(ctypes.c_uint64(order))


@cache
def load(variant: str, cache_dir: Path | None = None) -> Library:
    """Builds the variant first where the cache lacks it. Raises BuildError."""
    path = build(VARIANTS[variant], cache_dir)
    try:
        return Library(variant, path)
    except OSError as error:
        raise BuildError(f"{variant} kernels do not load: {error}") from error


class Libraries:
    """What each kind of device uses. Chosen at the first use and kept; a kind whose library cannot
    be had is said so once and computes with plain torch."""

    def __init__(self) -> None:
        self._cache_dir: Path | None = None
        self._chosen: dict[str, Library | None] = {}
        self._of_device: dict[torch.device, Library | None] = {}

    def keep_in(self, cache_dir: Path) -> None:
        """Where libraries are kept, for those that have not been chosen yet."""
        self._cache_dir = cache_dir

    def use(self, device_type: str, library: Library | None) -> None:
        """Instead of the choice by itself; None: plain torch."""
        self._chosen[device_type] = library
        self._of_device.clear()

    def of_device(self, device: torch.device) -> Library | None:
        """As `of` its type, for every call of an op."""
        try:
            return self._of_device[device]
        except KeyError:
            return self._of_device.setdefault(device, self.of(device.type))

    def of(self, device_type: str) -> Library | None:
        try:
            return self._chosen[device_type]
        except KeyError:
            return self._chosen.setdefault(device_type, self._choose(device_type))

    def _choose(self, device_type: str) -> Library | None:
        if device_type not in ("cpu", "cuda"):
            return None
        variant = "cuda" if device_type == "cuda" else f"cpu-{best_isa()}"
        try:
            return load(variant, self._cache_dir)
        except BuildError as error:
            first_line = str(error).splitlines()[0]
            logger.warning("operations on %s run on plain torch: %s", device_type, first_line)
            return None


libraries = Libraries()


def call(op: str, device: torch.device, /, **fields: int | float | None) -> bool:
    """On the device's current stream. False when there is no library, or it does not support what
    it was given: the caller computes with torch. Raises KernelError."""
    library = libraries.of_device(device)
    if library is None:
        return False
    if library.variant != "cuda":
        return library.start(op, 0, fields)
    stream = torch.cuda.current_stream(device).cuda_stream
    if device.index == torch.cuda.current_device():
        return library.start(op, stream, fields)
    with torch.cuda.device(device):
        return library.start(op, stream, fields)


def address(tensor: Tensor | None) -> int | None:
    """Of an argument that may be missing."""
    return None if tensor is None else tensor.data_ptr()


def built(variant: str, cache_dir: Path) -> bool:
    return library_path(VARIANTS[variant], cache_dir).exists()


def _describe(status: int) -> str:
    if status >= _CUDA_ERROR:
        code = status - _CUDA_ERROR
        return (
            f"CUDA error {code} ({torch.cuda.cudart().cudaError(code).name})"
            if (torch.cuda.is_available())
            else f"CUDA error {code}"
        )
    return "invalid arguments" if status == _STATUS["FOREBAY_INVALID"] else f"status {status}"
