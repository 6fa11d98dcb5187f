"""How far a result is from the same computation in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from forebay_kernels.testkit.inputs import is_poison


@dataclass(frozen=True, slots=True)
class Error:
    """relative: norm of the difference over the norm of the reference (0 where both are 0);
    largest: of the differences, element by element. A NaN where the reference has none is
    infinitely far."""

    relative: float
    largest: float

    def __str__(self) -> str:
        return f"relative {self.relative:.2e}, largest {self.largest:.2e}"


Listener = Callable[[Error], None]
_listeners: list[Listener] = []


def listen(listener: Listener) -> Listener:
    """Tells it every error that is computed from now on, for a report of the largest."""
    _listeners.append(listener)
    return listener


def error_of(actual: Tensor, reference: Tensor) -> Error:
    """reference: float64, same shape, anywhere."""
    error = _error_of(actual, reference)
    for listener in _listeners:
        listener(error)
    return error


def _error_of(actual: Tensor, reference: Tensor) -> Error:
    assert actual.shape == reference.shape, f"{actual.shape} where {reference.shape} belongs"
    expected = reference.double()
    found = actual.double().to(expected.device)
    difference = (found - expected).abs()
    both_nan = found.isnan() & expected.isnan()
    difference = difference.masked_fill(both_nan, 0.0).nan_to_num(nan=float("inf"))
    if difference.numel() == 0:
        return Error(0.0, 0.0)
    size = float(expected.nan_to_num(nan=0.0).norm())
    distance = float(difference.norm())
    relative = 0.0 if distance == 0.0 else distance / size if size > 0.0 else float("inf")
    return Error(relative, float(difference.max()))


def written(*outputs: Tensor) -> bool:
    """No element is still the poison of `Inputs.poisoned`."""
    return not any(bool(is_poison(output).any()) for output in outputs)
