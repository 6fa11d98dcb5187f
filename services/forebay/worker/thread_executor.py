"""The production executor: one thread that owns the model and its KV memory."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import ParamSpec, TypeVar, TypeVarTuple

P = ParamSpec("P")
T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class ThreadExecutor:
    """Implements `Executor`."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="engine")
        self._loop: asyncio.AbstractEventLoop | None = None

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        self._loop = asyncio.get_running_loop()
        future = self._pool.submit(function, *args, **kwargs)
        waiter = asyncio.wrap_future(future)
        try:
            return await asyncio.shield(waiter)
        except asyncio.CancelledError:
            if not future.cancel():
                await _until_done(waiter)
            raise

    def post(self, callback: Callable[[*Ts], None], *args: *Ts) -> None:
        assert self._loop is not None, "post is for functions that run here"
        # RuntimeError: the loop has closed, as when a process ends in the middle of a step.
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(callback, *args)

    def close(self) -> None:
        """Waits for the function under way."""
        self._pool.shutdown(wait=True, cancel_futures=True)


async def _until_done(waiter: asyncio.Future[T]) -> None:
    """However often the caller is cancelled in the meantime; its own error is the cancellation."""
    while not waiter.done():
        with suppress(asyncio.CancelledError):
            await asyncio.wait([waiter])
    if not waiter.cancelled():
        waiter.exception()
