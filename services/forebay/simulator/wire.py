"""What travels between two simulated processes: calls, their messages, and errors as a peer sees
them."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any

from forebay.core import errors

END = object()
"""In an inbox: the peer has nothing more to say."""

_KNOWN: tuple[type[errors.ForebayError], ...] = (
    errors.InvalidRequest,
    errors.NotFound,
    errors.Overloaded,
    errors.DeadlineExceeded,
    errors.RequestCancelled,
    errors.Unavailable,
    errors.KvTransferError,
)
_ABOUT_THE_REQUEST = (errors.InvalidRequest, errors.NotFound, errors.Overloaded)


def as_seen_by_peer(error: Exception, address: str) -> errors.ForebayError:
    """The error that a handler's error becomes on the other side; subclasses are lost on the way,
    and what is no ForebayError is an internal one."""
    if not isinstance(error, errors.ForebayError):
        return errors.InternalError(f"{address}: internal error")
    known = next((cls for cls in _KNOWN if isinstance(error, cls)), errors.InternalError)
    about_request = isinstance(error, _ABOUT_THE_REQUEST)
    message = error.message if about_request else f"{address}: {error.message}"
    if isinstance(error, errors.Overloaded):
        return errors.Overloaded(message, retry_after_s=int(error.retry_after_s * 1000) / 1000)
    if isinstance(error, errors.InvalidRequest):
        return errors.InvalidRequest(message, param=error.param, code=error.code)
    if isinstance(error, errors.NotFound):
        return errors.NotFound(message, param=error.param, code=error.code)
    return known(message)


class Inbox:
    """Messages that have arrived at one end of a call; END and exceptions are items too, and
    nothing comes after one. `num_taken`: how many items its reader has had."""

    __slots__ = ("_items", "_waiter", "closed", "num_taken")

    def __init__(self) -> None:
        self._items: deque[Any] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self.closed = False
        self.num_taken = 0

    def put(self, item: Any) -> None:
        if self.closed:
            return
        self.closed = item is END or isinstance(item, Exception)
        self._items.append(item)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def get(self) -> Any:
        """The next item; the last one again and again."""
        while not self._items:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        self.num_taken += 1
        if self.closed and len(self._items) == 1:
            return self._items[0]
        return self._items.popleft()
