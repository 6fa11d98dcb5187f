"""Connector and listener over real gRPC on loopback: what a handler raises is what its caller gets,
and a caller that leaves ends its handler."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from forebay.core import errors
from forebay.core.clock import Deadline
from forebay.deploy.ports import free_ports
from forebay.rpc import methods
from forebay.rpc.connector import Channel, Method, Routes
from forebay.rpc.grpc_connector import GrpcConnector
from forebay.rpc.grpc_listener import GrpcListener
from forebay.rpc.v1 import kv_transfer_pb2

Text = Method[bytes, bytes]


def text_method(name: str) -> Text:
    def same(data: bytes) -> bytes:
        return data

    return Method("forebay.test.Service", name, same, same, same, same)


ECHO = text_method("Echo")
PUSH = text_method("Push")
TALK = text_method("Talk")
ALL_ERRORS: list[errors.ForebayError] = [
    errors.InvalidRequest("bad", param="messages[0].role", code="a_code"),
    errors.InvalidRequest("bad"),
    errors.NotFound("who", param="model", code="model_not_found"),
    errors.Overloaded("full", retry_after_s=2.5),
    errors.DeadlineExceeded("late"),
    errors.RequestCancelled("gone"),
    errors.Unavailable("away"),
    errors.KvTransferError("torn"),
    errors.InternalError("broken"),
]


async def echo(request: bytes) -> bytes:
    return request


@asynccontextmanager
async def served(routes: Routes) -> AsyncIterator[Channel]:
    listener = GrpcListener(routes, "127.0.0.1", 0)
    await listener.start()
    channel = GrpcConnector().connect(f"127.0.0.1:{listener.port}")
    try:
        yield channel
    finally:
        await channel.close()
        await listener.stop(0)


def soon() -> Deadline:
    return Deadline.after(10)


async def requests(*items: bytes) -> AsyncIterator[bytes]:
    for item in items:
        yield item


def check_same(caught: errors.ForebayError, raised: errors.ForebayError) -> None:
    assert type(caught) is type(raised)
    assert caught.message.endswith(raised.message)
    for name in ("param", "code", "retry_after_s"):
        assert getattr(caught, name, None) == getattr(raised, name, None)


@pytest.mark.parametrize("raised", ALL_ERRORS, ids=lambda e: type(e).__name__)
async def test_every_error_comes_back_as_it_was_raised(raised: errors.ForebayError) -> None:
    async def unary(_: bytes) -> bytes:
        raise raised

    async def push(_: AsyncIterator[bytes]) -> bytes:
        raise raised

    async def talk(_: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        yield b"first"
        raise raised

    routes = Routes(unary=[(ECHO, unary)], push=[(PUSH, push)], duplex=[(TALK, talk)])
    async with served(routes) as channel:
        with pytest.raises(type(raised)) as caught:
            await channel.unary(ECHO, b"x", soon())
        check_same(caught.value, raised)
        with pytest.raises(type(raised)) as caught:
            await channel.push(PUSH, requests(b"x"), soon())
        check_same(caught.value, raised)
        duplex = channel.duplex(TALK)
        assert await duplex.receive() == b"first"
        with pytest.raises(type(raised)) as caught:
            await duplex.receive()
        check_same(caught.value, raised)
        duplex.cancel()


async def test_a_bug_in_a_handler_does_not_leak_its_message() -> None:
    async def unary(_: bytes) -> bytes:
        raise ValueError("secret")

    async def talk(_: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        for _ in ():
            yield b""
        raise ValueError("secret")

    async with served(Routes(unary=[(ECHO, unary)], duplex=[(TALK, talk)])) as channel:
        duplex = channel.duplex(TALK)
        for call in (channel.unary(ECHO, b"x", soon()), duplex.receive()):
            with pytest.raises(errors.InternalError) as caught:
                await call
            assert "secret" not in caught.value.message


@pytest.mark.parametrize("num_read", [0, 1, 3])
async def test_a_push_that_is_refused_on_the_way_raises_the_reason(num_read: int) -> None:
    """At its start, in the middle and at the end; however much is sent after it."""

    async def push(messages: AsyncIterator[bytes]) -> bytes:
        for _ in range(num_read):
            await anext(messages)
        raise errors.KvTransferError("enough")

    async def long() -> AsyncIterator[bytes]:
        for _ in range(300):
            yield bytes(100_000)
            await asyncio.sleep(0)

    async with served(Routes(push=[(PUSH, push)])) as channel:
        with pytest.raises(errors.KvTransferError, match="enough"):
            await channel.push(PUSH, long(), soon())


async def test_a_push_gives_the_response_even_when_the_peer_reads_no_further() -> None:
    async def push(messages: AsyncIterator[bytes]) -> bytes:
        return await anext(messages)

    async def long() -> AsyncIterator[bytes]:
        for i in range(300):
            yield bytes([i % 256]) * 50_000
            await asyncio.sleep(0)

    async with served(Routes(push=[(PUSH, push)])) as channel:
        assert await channel.push(PUSH, long(), soon()) == bytes(50_000)


async def test_an_error_of_the_sender_ends_the_push_on_both_sides() -> None:
    """The handler may be cancelled, or may see its messages end as if all had come."""
    begun, ended = asyncio.Event(), asyncio.Event()

    async def push(messages: AsyncIterator[bytes]) -> bytes:
        try:
            async for _ in messages:
                begun.set()
        finally:
            ended.set()
        return b"whole"

    async def broken() -> AsyncIterator[bytes]:
        yield b"x"
        await begun.wait()
        raise errors.KvTransferError("cannot read")

    async with served(Routes(push=[(PUSH, push)])) as channel:
        with pytest.raises(errors.KvTransferError, match="cannot read"):
            await channel.push(PUSH, broken(), soon())
        async with asyncio.timeout(10):
            await ended.wait()


async def test_a_conversation_ends_in_order() -> None:
    async def talk(messages: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        for _ in range(3):
            yield (await anext(messages)).upper()

    async with served(Routes(duplex=[(TALK, talk)])) as channel:
        duplex = channel.duplex(TALK)
        for word in (b"a", b"b", b"c"):
            await duplex.send(word)
            assert await duplex.receive() == word.upper()
        assert await duplex.receive() is None
        assert await duplex.receive() is None
        with pytest.raises(errors.Unavailable, match="ended the stream"):
            await duplex.send(b"d")
        duplex.cancel()


async def test_sending_into_a_stream_that_failed_raises_the_reason() -> None:
    async def talk(_: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        for _ in ():
            yield b""
        raise errors.Overloaded("too slow", retry_after_s=3.0)

    async with served(Routes(duplex=[(TALK, talk)])) as channel:
        duplex = channel.duplex(TALK)
        for call in (duplex.receive, lambda: duplex.send(b"x")):
            with pytest.raises(errors.Overloaded) as caught:
                await call()
            assert caught.value.retry_after_s == 3.0
        duplex.cancel()


class Handlers:
    """Handlers that hang, and tell when they begin and how they end."""

    def __init__(self) -> None:
        self.begun = asyncio.Event()
        self.cancelled = asyncio.Event()

    async def hang(self) -> bytes:
        self.begun.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        return b""

    def routes(self) -> Routes:
        async def unary(_: bytes) -> bytes:
            return await self.hang()

        async def push(_: AsyncIterator[bytes]) -> bytes:
            return await self.hang()

        async def talk(_: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
            yield await self.hang()

        return Routes(unary=[(ECHO, unary)], push=[(PUSH, push)], duplex=[(TALK, talk)])


async def _forever() -> AsyncIterator[bytes]:
    while True:
        yield b"x"
        await asyncio.sleep(0.001)


CALLS: dict[str, Callable[[Channel, Deadline], Awaitable[object]]] = {
    "unary": lambda channel, deadline: channel.unary(ECHO, b"x", deadline),
    "push": lambda channel, deadline: channel.push(PUSH, requests(b"x"), deadline),
    "push under way": lambda channel, deadline: channel.push(PUSH, _forever(), deadline),
}


@pytest.mark.parametrize("kind", CALLS)
async def test_a_caller_that_leaves_ends_the_handler(kind: str) -> None:
    handlers = Handlers()
    async with served(handlers.routes()) as channel:
        task = asyncio.ensure_future(CALLS[kind](channel, soon()))
        async with asyncio.timeout(10):
            await handlers.begun.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await handlers.cancelled.wait()


@pytest.mark.parametrize("kind", CALLS)
async def test_a_deadline_ends_the_call_and_its_handler(kind: str) -> None:
    handlers = Handlers()
    async with served(handlers.routes()) as channel:
        with pytest.raises(errors.DeadlineExceeded):
            await CALLS[kind](channel, Deadline.after(0.5))
        async with asyncio.timeout(10):
            await handlers.cancelled.wait()
        with pytest.raises(errors.DeadlineExceeded):
            await CALLS[kind](channel, Deadline.after(0))


async def test_a_cancelled_stream_ends_the_handler() -> None:
    handlers = Handlers()
    async with served(handlers.routes()) as channel:
        duplex = channel.duplex(TALK)
        async with asyncio.timeout(10):
            await handlers.begun.wait()
            duplex.cancel()
            await handlers.cancelled.wait()


async def test_a_stream_cancelled_while_its_handler_writes_is_closed_at_once() -> None:
    """The handler's generator is suspended at a yield then: nothing inside it can be cancelled."""
    closed = asyncio.Event()

    async def talk(_: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        try:
            while True:
                yield bytes(1_000_000)
        finally:
            closed.set()

    async with served(Routes(duplex=[(TALK, talk)])) as channel:
        duplex = channel.duplex(TALK)
        assert await duplex.receive() == bytes(1_000_000)
        duplex.cancel()
        async with asyncio.timeout(10):
            await closed.wait()


@pytest.mark.parametrize("kind", CALLS)
async def test_closing_the_channel_is_no_cancellation_of_its_callers(kind: str) -> None:
    handlers = Handlers()
    async with served(handlers.routes()) as channel:
        task = asyncio.ensure_future(CALLS[kind](channel, soon()))
        async with asyncio.timeout(10):
            await handlers.begun.wait()
            await channel.close()
            with pytest.raises(errors.Unavailable):
                await task
        with pytest.raises(errors.Unavailable):
            await CALLS[kind](channel, soon())
        with pytest.raises(errors.Unavailable):
            channel.duplex(TALK)


async def test_closing_the_channel_ends_a_stream_that_is_read() -> None:
    handlers = Handlers()
    async with served(handlers.routes()) as channel:
        duplex = channel.duplex(TALK)
        reading = asyncio.create_task(duplex.receive())
        async with asyncio.timeout(10):
            await handlers.begun.wait()
            await channel.close()
            with pytest.raises(errors.Unavailable):
                await reading


@pytest.mark.parametrize("kind", CALLS)
async def test_a_listener_that_stops_is_unavailable(kind: str) -> None:
    handlers = Handlers()
    listener = GrpcListener(handlers.routes(), "127.0.0.1", 0)
    await listener.start()
    channel = GrpcConnector().connect(f"127.0.0.1:{listener.port}")
    task = asyncio.ensure_future(CALLS[kind](channel, soon()))
    async with asyncio.timeout(10):
        await handlers.begun.wait()
        await listener.stop(0)
        with pytest.raises(errors.Unavailable):
            await task
        await handlers.cancelled.wait()
    await channel.close()


async def test_a_stream_to_a_listener_that_stops_is_unavailable() -> None:
    handlers = Handlers()
    listener = GrpcListener(handlers.routes(), "127.0.0.1", 0)
    await listener.start()
    channel = GrpcConnector().connect(f"127.0.0.1:{listener.port}")
    duplex = channel.duplex(TALK)
    async with asyncio.timeout(10):
        await handlers.begun.wait()
        await listener.stop(0)
        with pytest.raises(errors.Unavailable):
            await duplex.receive()
    await channel.close()


async def test_nobody_there_is_unavailable() -> None:
    (port,) = free_ports(1)
    channel = GrpcConnector().connect(f"127.0.0.1:{port}")
    for kind in CALLS:
        with pytest.raises(errors.Unavailable):
            await CALLS[kind](channel, soon())
    duplex = channel.duplex(TALK)
    with pytest.raises(errors.Unavailable):
        await duplex.send(b"x")
    with pytest.raises(errors.Unavailable):
        await duplex.receive()
    await channel.close()


async def test_a_taken_port_is_a_configuration_error() -> None:
    first = GrpcListener(Routes(unary=[(ECHO, echo)]), "127.0.0.1", 0)
    await first.start()
    second = GrpcListener(Routes(unary=[(ECHO, echo)]), "127.0.0.1", first.port)
    with pytest.raises(errors.ConfigurationError, match="port in use"):
        await second.start()
    await first.stop(0)


async def test_a_push_of_raw_frames_arrives_as_sent() -> None:
    received: list[bytes] = []

    async def push(messages: AsyncIterator[bytes]) -> kv_transfer_pb2.PushResponse:
        async for message in messages:
            received.append(message)
        return kv_transfer_pb2.PushResponse(num_bytes=sum(map(len, received)))

    sent = [b"", b"x", bytes(2_000_000)]
    async with served(Routes(push=[(methods.KV_PUSH, push)])) as channel:
        response = await channel.push(methods.KV_PUSH, requests(*sent), soon())
    assert received == sent
    assert response.num_bytes == 2_000_001
