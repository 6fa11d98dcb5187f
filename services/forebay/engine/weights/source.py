"""What a model's loader asks of a checkpoint, whatever its format."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from torch import Tensor

from forebay.core.errors import ModelFileError

_MAX_NAMES = 5


class TensorSource(Protocol):
    """Tensors under their names in Hugging Face checkpoints, read one at a time."""

    @property
    def path(self) -> Path: ...

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...

    def file_name(self, name: str) -> str:
        """What the file itself calls the tensor, for messages."""

    def read(self, name: str) -> Tensor:
        """A floating-point tensor of that shape on the CPU, in any dtype. Raises ModelFileError."""


def check_tensors(source: TensorSource, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raises ModelFileError naming what is missing, what is of another shape, and what is there
    though the model has no place for it."""
    missing = [source.file_name(name) for name in expected if name not in source.shapes]
    if missing:
        raise ModelFileError(f"{source.path}: missing tensors: {_listed(missing)}")
    unexpected = [source.file_name(name) for name in source.shapes if name not in expected]
    if unexpected:
        raise ModelFileError(f"{source.path}: unexpected tensors: {_listed(unexpected)}")
    for name, shape in expected.items():
        if source.shapes[name] != shape:
            raise ModelFileError(
                f"{source.path}: tensor {source.file_name(name)} has shape "
                f"{list(source.shapes[name])}, not {list(shape)}"
            )


def _listed(names: list[str]) -> str:
    rest = len(names) - _MAX_NAMES
    return ", ".join(names[:_MAX_NAMES]) + (f" and {rest} more" if rest > 0 else "")
