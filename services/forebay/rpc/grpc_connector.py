"""The connector over grpc.aio."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any, Generic

import grpc
import grpc.aio

from forebay.core.clock import Deadline
from forebay.core.errors import Unavailable
from forebay.rpc.connector import Channel, Duplex, Method, Request, Response
from forebay.rpc.status import from_grpc

_EOF: Any = grpc.aio.EOF  # type: ignore[attr-defined]  # the stubs lack it
MAX_MESSAGE_BYTES = 64 * 1024 * 1024

CHANNEL_OPTIONS: tuple[tuple[str, Any], ...] = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2_000),
)


class GrpcConnector:
    """Implements `Connector`; plaintext."""

    def connect(self, address: str) -> Channel:
        return GrpcChannel(address)


class GrpcChannel:
    """Implements `Channel`."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._channel: Any = grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)

    async def unary(
        self, method: Method[Request, Response], request: Request, deadline: Deadline
    ) -> Response:
        with _translated(self._address):
            call = self._channel.unary_unary(
                method.path, method.encode_request, method.decode_response
            )(request, timeout=deadline.remaining_s())
            try:
                response: Response = await call
                return response
            finally:
                call.cancel()

    async def push(
        self,
        method: Method[Request, Response],
        requests: AsyncIterator[Request],
        deadline: Deadline,
    ) -> Response:
        with _translated(self._address):
            call = self._channel.stream_unary(
                method.path, method.encode_request, method.decode_response
            )(timeout=deadline.remaining_s())
            try:
                async for request in requests:
                    if not await _written(call, request):
                        break  # the peer ended the call early; awaiting it raises its reason
                await call.done_writing()
                response: Response = await call
                return response
            finally:
                call.cancel()

    def duplex(self, method: Method[Request, Response]) -> Duplex[Request, Response]:
        with _translated(self._address):
            call = self._channel.stream_stream(
                method.path, method.encode_request, method.decode_response
            )()
        return GrpcDuplex(call, self._address)

    async def close(self) -> None:
        """Calls under way end as Unavailable."""
        await self._channel.close()


class GrpcDuplex(Generic[Request, Response]):
    """Implements `Duplex`."""

    def __init__(self, call: Any, address: str) -> None:
        self._call = call
        self._address = address

    async def send(self, message: Request) -> None:
        with _translated(self._address):
            if not await _written(self._call, message):
                await self._check_outcome()
                raise Unavailable(f"{self._address}: the peer has ended the stream")

    async def receive(self) -> Response | None:
        with _translated(self._address):
            message = await self._call.read()
            if message is not _EOF:
                response: Response = message
                return response
            await self._check_outcome()
            return None

    def cancel(self) -> None:
        self._call.cancel()

    async def _check_outcome(self) -> None:
        """Waits for the stream's end; raises unless it was in order."""
        code = await self._call.code()
        if code is not grpc.StatusCode.OK:
            metadata = dict(await self._call.trailing_metadata() or ())
            details = await self._call.details()
            raise from_grpc(code, f"{self._address}: {details}", metadata)


async def _written(call: Any, message: Any) -> bool:
    """False when the call has ended already."""
    try:
        await call.write(message)
    except asyncio.InvalidStateError:
        return False
    return True


@contextmanager
def _translated(address: str) -> Iterator[None]:
    """grpc.aio's own failures as ours. It raises CancelledError both when the calling task is
    cancelled and when the call was, by closing its channel: only the first may pass for one."""
    task = asyncio.current_task()
    num_cancels = task.cancelling() if task else 0
    try:
        yield
    except grpc.aio.AioRpcError as error:
        trailing: Any = error.trailing_metadata()
        metadata = dict(trailing or ())
        raise from_grpc(error.code(), f"{address}: {error.details()}", metadata) from error
    except grpc.aio.UsageError as error:
        raise Unavailable(f"{address}: the connection is closed") from error
    except asyncio.CancelledError:
        if task is None or task.cancelling() > num_cancels:
            raise
        raise Unavailable(f"{address}: the connection was closed") from None
