"""The seam between asyncio code and blocking work (a model's step, a copy of KV)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import ParamSpec, Protocol, TypeVar, TypeVarTuple

P = ParamSpec("P")
T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class Executor(Protocol):
    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Runs one function at a time, in the order of the calls: a call has its place in that
        order before it first waits. When the caller is cancelled the call still returns only after
        a function that has begun has ended: memory that it writes to is safe to give away once
        `run` is over."""

    def post(self, callback: Callable[[*Ts], None], *args: *Ts) -> None:
        """For functions that `run` is running: has the event loop call `callback` soon, in the
        order of the posts and before `run` returns to a caller that waits on another thread. Once
        the loop is closed the callback is dropped: nobody is left to care."""


class InlineExecutor:
    """Runs the function at once on the caller's own thread: simulation and tests."""

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return function(*args, **kwargs)

    def post(self, callback: Callable[[*Ts], None], *args: *Ts) -> None:
        asyncio.get_running_loop().call_soon(callback, *args)
