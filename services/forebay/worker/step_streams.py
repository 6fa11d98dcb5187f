"""One outgoing stream per gateway: everything a step has for a gateway goes out as one message.

A gateway that reads slowly, or is away, never delays a step: its messages wait in a bounded
buffer, and a buffer that is full cuts the stream.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field

from forebay.core import clock
from forebay.core.errors import Overloaded, Unavailable
from forebay.rpc.v1 import worker_pb2

MAX_BUFFERED_MESSAGES = 4096


@dataclass(slots=True, eq=False)
class _Stream:
    """One hello's stream; `detached_at` is None while its gateway reads."""

    buffer: deque[worker_pb2.StepsResponse] = field(default_factory=deque)
    filled: asyncio.Event = field(default_factory=asyncio.Event)
    detached_at: float | None = None
    overrun: bool = False


class StepStreams:
    """The streams of one worker."""

    def __init__(self) -> None:
        self._streams: dict[str, _Stream] = {}
        self._closed = False

    def is_attached(self, gateway_id: str) -> bool:
        stream = self._streams.get(gateway_id)
        return stream is not None and stream.detached_at is None

    def send(self, gateway_id: str, message: worker_pb2.StepsResponse) -> None:
        """Never waits. Messages to a gateway that is not attached are dropped: its sequences are
        about to be aborted."""
        stream = self._streams.get(gateway_id)
        if stream is None or stream.detached_at is not None:
            return
        if len(stream.buffer) >= MAX_BUFFERED_MESSAGES:
            stream.overrun = True
        else:
            stream.buffer.append(message)
        stream.filled.set()

    async def serve(
        self, gateway_id: str, hello: worker_pb2.StepsResponse
    ) -> AsyncGenerator[worker_pb2.StepsResponse, None]:
        """Yields `hello`, then the gateway's messages, until the gateway leaves or says hello
        again elsewhere."""
        stream = _Stream()
        before, self._streams[gateway_id] = self._streams.get(gateway_id), stream
        if before is not None:
            before.filled.set()
        try:
            yield hello
            while True:
                self._check_current(gateway_id, stream)
                if not stream.buffer:
                    if self._closed:
                        raise Unavailable("the worker stops")
                    stream.filled.clear()
                    await stream.filled.wait()
                    continue
                yield stream.buffer.popleft()
        finally:
            stream.detached_at = clock.now()
            stream.buffer.clear()

    def _check_current(self, gateway_id: str, stream: _Stream) -> None:
        """Raises Unavailable or Overloaded when `stream` has to end."""
        if self._streams.get(gateway_id) is not stream:
            raise Unavailable("the gateway has opened another step stream")
        if stream.overrun:
            raise Overloaded("the gateway reads its step stream too slowly")

    def expire(self, before: float) -> list[str]:
        """Forgets gateways that have been away since `before` or longer, and returns them."""
        gone = [
            gateway_id
            for gateway_id, stream in self._streams.items()
            if stream.detached_at is not None and stream.detached_at <= before
        ]
        for gateway_id in gone:
            del self._streams[gateway_id]
        return gone

    def close(self) -> None:
        """Ends every stream."""
        self._closed = True
        for stream in self._streams.values():
            stream.filled.set()
