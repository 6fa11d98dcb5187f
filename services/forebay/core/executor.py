"""The seam between asyncio code and blocking work (a model's step, a copy of KV)."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, Protocol, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class Executor(Protocol):
    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Runs one function at a time, in the order of the calls. When the caller is cancelled
        the call still returns only after a function that has begun has ended: memory that it
        writes to is safe to give away once `run` is over."""


class InlineExecutor:
    """Runs the function at once on the caller's own thread: simulation and tests."""

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return function(*args, **kwargs)
