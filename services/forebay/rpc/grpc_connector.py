"""The connector over grpc.aio."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, Generic

import grpc
import grpc.aio

from forebay.core.clock import Deadline
from forebay.core.errors import ForebayError, Unavailable
from forebay.rpc.connector import Channel, Duplex, Method, Request, Response
from forebay.rpc.status import from_grpc

_EOF: Any = grpc.aio.EOF  # type: ignore[attr-defined]  # the stubs lack it
_ENDED = (asyncio.InvalidStateError, grpc.aio.AioRpcError)
"""What a write raises into a call that has ended."""
_MADE_UP = "Internal error from Core"
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
            outcome = _Outcome(self._address)
            call.add_done_callback(outcome.note)
            # A task of its own: a write into a call that ends too early can wait for ever.
            writer = asyncio.create_task(_write_all(call, requests))
            try:
                await asyncio.wait((writer, outcome.noted), return_when=asyncio.FIRST_COMPLETED)
                if writer.done():
                    await writer
                response: Response = await call
                return response
            except grpc.aio.AioRpcError as error:
                if outcome.error is None:
                    raise
                raise outcome.error from error
            finally:
                call.cancel()
                writer.cancel()
                await asyncio.gather(writer, return_exceptions=True)

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
            try:
                await self._call.write(message)
            except _ENDED as error:
                if isinstance(error, asyncio.InvalidStateError):
                    await self._check_outcome()
                raise Unavailable(f"{self._address}: the peer has ended the stream") from error

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


class _Outcome:
    """How a call failed, noted at its end: a write that fails after that puts a made-up INTERNAL in
    its place. When the write fails first it is the other way round, and awaiting the call tells."""

    def __init__(self, address: str) -> None:
        self.error: ForebayError | None = None
        self.noted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._address = address

    def note(self, call: Any) -> None:
        if not self.noted.done():
            self.noted.set_result(None)
        code, details = _result(call.code()), _result(call.details())
        if code is not grpc.StatusCode.OK and details != _MADE_UP:
            metadata = dict(_result(call.trailing_metadata()) or ())
            self.error = from_grpc(code, f"{self._address}: {details}", metadata)


def _result(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Of a coroutine that has nothing to wait for."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        return end.value
    raise AssertionError("the call has not ended")


async def _write_all(call: Any, requests: AsyncIterator[Any]) -> None:
    """Returns early when the peer ends the call early."""
    try:
        async for request in requests:
            try:
                await call.write(request)
            except _ENDED:
                return
        await call.done_writing()
    except grpc.aio.InternalError:
        return


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
        raise from_grpc(error.code(), _message(error, address), metadata) from error
    except grpc.aio.UsageError as error:
        raise Unavailable(f"{address}: the connection is closed") from error
    except asyncio.CancelledError:
        if task is None or task.cancelling() > num_cancels:
            raise
        raise Unavailable(f"{address}: the connection was closed") from None


def _message(error: grpc.aio.AioRpcError, address: str) -> str:
    """What the peer said of a request may reach the client as it is; what is said of the peer, or
    of the way to it, names it."""
    details = error.details() or ""
    about_the_request = error.code() in (
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
    )
    return details if about_the_request else f"{address}: {details}"
