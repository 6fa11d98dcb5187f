"""One outgoing stream per gateway: everything a step has for a gateway goes out as one message.

A gateway that reads slowly, or is away, never delays a step: its messages wait in a bounded
buffer, and a buffer that is full cuts the stream.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from forebay.core import clock
from forebay.core.errors import Overloaded, Unavailable
from forebay.rpc.v1 import worker_pb2

MAX_BUFFERED_MESSAGES = 4096


@dataclass(slots=True)
class _Stream:
    """`generation` counts the gateway's hellos; `detached_at` is None while it reads."""

    buffer: deque[worker_pb2.StepsResponse] = field(default_factory=deque)
    filled: asyncio.Event = field(default_factory=asyncio.Event)
    generation: int = 0
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
    ) -> AsyncIterator[worker_pb2.StepsResponse]:
        """Yields `hello`, then the gateway's messages, until the gateway leaves or says hello
        again elsewhere."""
        stream = self._streams.setdefault(gateway_id, _Stream())
        stream.generation += 1
        stream.detached_at = None
        stream.overrun = False
        stream.buffer.clear()
        generation = stream.generation
        stream.filled.set()
        try:
            yield hello
            while True:
                await stream.filled.wait()
                stream.filled.clear()
                if self._closed:
                    raise Unavailable("the worker stops")
                if stream.generation != generation:
                    raise Unavailable("the gateway has opened another step stream")
                while stream.buffer and not stream.overrun:
                    yield stream.buffer.popleft()
                if stream.overrun:
                    raise Overloaded("the gateway reads its step stream too slowly")
        finally:
            if stream.generation == generation:
                stream.detached_at = clock.now()
                stream.buffer.clear()

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
