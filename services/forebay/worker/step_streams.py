"""One stream per gateway: everything a step has for a gateway goes out as one message, and what the
gateway says comes in beside it.

A gateway that reads slowly, or is away, never delays a step: its messages wait in a bounded
buffer, and a buffer that is full cuts the stream.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import dataclass, field

from forebay.core import clock
from forebay.core.errors import (
    ForebayError,
    InternalError,
    InvalidRequest,
    Overloaded,
    Unavailable,
)
from forebay.rpc.v1 import worker_pb2

MAX_BUFFERED_MESSAGES = 4096
STEP_HEARTBEAT_S = 0.5
"""An attached gateway hears something at least this often."""
HELLO_S = 5.0
"""How long a stream may be open before it says whose it is."""


async def read_hello(messages: AsyncIterator[worker_pb2.StepsRequest]) -> str:
    """The gateway's id. Raises InvalidRequest for a stream that begins with anything else, or with
    nothing in time."""
    try:
        async with asyncio.timeout(HELLO_S):
            first = await anext(messages, None)
    except TimeoutError:
        first = None
    if first is None or not first.hello.gateway_id:
        raise InvalidRequest("a step stream begins with a hello", param="hello.gateway_id")
    return first.hello.gateway_id


@dataclass(slots=True, eq=False)
class _Stream:
    """One hello's stream; `detached_at` is None while its gateway reads. `error`: what it ends
    with."""

    sent_at: float
    buffer: deque[worker_pb2.StepsResponse] = field(default_factory=deque)
    filled: asyncio.Event = field(default_factory=asyncio.Event)
    detached_at: float | None = None
    error: ForebayError | None = None

    @property
    def is_attached(self) -> bool:
        return self.detached_at is None and self.error is None

    def send(self, message: worker_pb2.StepsResponse) -> None:
        if not self.is_attached:
            return
        self.sent_at = clock.now()
        if len(self.buffer) >= MAX_BUFFERED_MESSAGES:
            self.cut(Overloaded("the gateway reads its step stream too slowly"))
        else:
            self.buffer.append(message)
            self.filled.set()

    def end(self, error: ForebayError) -> None:
        """After what waits in the buffer. The first error counts."""
        self.error = self.error or error
        self.filled.set()

    def cut(self, error: ForebayError) -> None:
        self.buffer.clear()
        self.end(error)

    async def read(
        self,
        messages: AsyncIterator[worker_pb2.StepsRequest],
        on_message: Callable[[worker_pb2.StepsRequest], None],
    ) -> None:
        try:
            async for message in messages:
                on_message(message)
        except ForebayError as error:
            self.end(error)
        except Exception as error:
            self.end(InternalError(f"the step stream cannot be read: {error!r}"))


class StepStreams:
    """The streams of one worker. `sign_of_life` makes a message without outputs; `on_message` gets
    every message of a gateway but the hello, and raises a ForebayError to end its stream."""

    def __init__(
        self,
        sign_of_life: Callable[[], worker_pb2.StepsResponse],
        on_message: Callable[[str, worker_pb2.StepsRequest], None],
    ) -> None:
        self._sign_of_life = sign_of_life
        self._on_message = on_message
        self._streams: dict[str, _Stream] = {}

    @property
    def all_taken(self) -> bool:
        """Whether nothing waits to be read by a gateway that is there."""
        return not any(stream.is_attached and stream.buffer for stream in self._streams.values())

    def is_attached(self, gateway_id: str) -> bool:
        stream = self._streams.get(gateway_id)
        return stream is not None and stream.is_attached

    def send(self, gateway_id: str, message: worker_pb2.StepsResponse) -> None:
        """Never waits. Messages to a gateway that is not attached are dropped: its sequences are
        about to be aborted."""
        stream = self._streams.get(gateway_id)
        if stream is not None:
            stream.send(message)

    def announce(self) -> None:
        """A sign of life to everyone, at once."""
        for stream in self._streams.values():
            stream.send(self._sign_of_life())

    def send_signs_of_life(self) -> None:
        """To every gateway that got nothing for STEP_HEARTBEAT_S and has read what it got."""
        silent_since = clock.now() - STEP_HEARTBEAT_S
        for stream in self._streams.values():
            if stream.is_attached and stream.sent_at <= silent_since and not stream.buffer:
                stream.send(self._sign_of_life())

    async def serve(
        self, gateway_id: str, messages: AsyncIterator[worker_pb2.StepsRequest]
    ) -> AsyncGenerator[worker_pb2.StepsResponse, None]:
        """Yields a sign of life, then the gateway's messages, until the gateway leaves or says
        hello again elsewhere. Raises what the stream ends with."""
        stream = _Stream(sent_at=clock.now())
        before, self._streams[gateway_id] = self._streams.get(gateway_id), stream
        if before is not None:
            before.cut(Unavailable("the gateway has opened another step stream"))
        reading = asyncio.create_task(
            stream.read(messages, lambda message: self._on_message(gateway_id, message))
        )
        try:
            yield self._sign_of_life()
            while True:
                if stream.buffer:
                    yield stream.buffer.popleft()
                elif stream.error is not None:
                    raise stream.error
                else:
                    stream.filled.clear()
                    await stream.filled.wait()
        finally:
            stream.detached_at = clock.now()
            stream.buffer.clear()
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)

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

    def close(self, reason: str) -> None:
        """Ends every stream there is as Unavailable."""
        for stream in self._streams.values():
            stream.end(Unavailable(reason))
