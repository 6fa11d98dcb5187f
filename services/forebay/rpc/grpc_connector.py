"""The connector over grpc.aio."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, Generic, NoReturn

import grpc
import grpc.aio

from forebay.core.clock import Deadline
from forebay.core.errors import ForebayError
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
        call = self._channel.unary_unary(
            method.path, method.encode_request, method.decode_response
        )(request, timeout=deadline.remaining_s())
        try:
            response: Response = await call
            return response
        except grpc.aio.AioRpcError as error:
            raise _translated(error, self._address) from error
        finally:
            call.cancel()

    async def push(
        self,
        method: Method[Request, Response],
        requests: AsyncIterator[Request],
        deadline: Deadline,
    ) -> Response:
        call = self._channel.stream_unary(
            method.path, method.encode_request, method.decode_response
        )(timeout=deadline.remaining_s())
        try:
            try:
                async for request in requests:
                    await call.write(request)
                await call.done_writing()
            except grpc.aio.UsageError:
                pass  # the peer ended the call early; awaiting it below raises its reason
            response: Response = await call
            return response
        except grpc.aio.AioRpcError as error:
            raise _translated(error, self._address) from error
        finally:
            call.cancel()

    def duplex(self, method: Method[Request, Response]) -> Duplex[Request, Response]:
        call = self._channel.stream_stream(
            method.path, method.encode_request, method.decode_response
        )()
        return GrpcDuplex(call, self._address)

    async def close(self) -> None:
        await self._channel.close()


class GrpcDuplex(Generic[Request, Response]):
    """Implements `Duplex`."""

    def __init__(self, call: Any, address: str) -> None:
        self._call = call
        self._address = address

    async def send(self, message: Request) -> None:
        try:
            await self._call.write(message)
        except grpc.aio.UsageError:
            await self._raise_outcome()
        except grpc.aio.AioRpcError as error:
            raise _translated(error, self._address) from error

    async def receive(self) -> Response | None:
        try:
            message = await self._call.read()
        except grpc.aio.AioRpcError as error:
            raise _translated(error, self._address) from error
        if message is not _EOF:
            response: Response = message
            return response
        if await self._call.code() is not grpc.StatusCode.OK:
            await self._raise_outcome()
        return None

    def cancel(self) -> None:
        self._call.cancel()

    async def _raise_outcome(self) -> NoReturn:
        metadata = dict(await self._call.trailing_metadata() or ())
        code, details = await self._call.code(), await self._call.details()
        raise from_grpc(code, f"{self._address}: {details}", metadata)


def _translated(error: grpc.aio.AioRpcError, address: str) -> ForebayError:
    trailing: Any = error.trailing_metadata()
    metadata = dict(trailing or ())
    return from_grpc(error.code(), f"{address}: {error.details()}", metadata)
