"""The connector in memory: messages are encoded, delayed and decoded, never shared."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from typing import Any, Generic, TypeVar

from forebay.core.clock import Deadline
from forebay.core.errors import DeadlineExceeded, InternalError, Unavailable
from forebay.core.randomness import Rng
from forebay.rpc.connector import Channel, Duplex, Method, Request, Response, Routes

T = TypeVar("T")

_END = object()


class SimNetwork:
    """Listeners by address. Implements `Connector`. Every message takes `latency_s`, and up to as
    much again by chance."""

    def __init__(self, rng: Rng, latency_s: float) -> None:
        self._rng = rng
        self._latency_s = latency_s
        self._listeners: dict[str, Routes] = {}
        self._calls: dict[str, set[asyncio.Task[Any]]] = {}

    def listen(self, address: str, routes: Routes) -> None:
        self._listeners[address] = routes
        self._calls[address] = set()

    def unplug(self, address: str) -> None:
        """The listener and every call to it end at once, as when a process dies."""
        del self._listeners[address]
        for task in self._calls.pop(address):
            task.cancel()

    def connect(self, address: str) -> Channel:
        return SimChannel(self, address)

    async def delay(self) -> None:
        await asyncio.sleep(self._latency_s * (1 + self._rng.uniform()))

    def handler(self, address: str, kind: str, method: Method[Any, Any]) -> Any:
        routes = self._listeners.get(address)
        if routes is None:
            raise Unavailable(f"{address}: nobody listens")
        for known, handler in getattr(routes, kind):
            if known.path == method.path:
                return handler
        raise InternalError(f"{address} does not serve {method.path}")

    def start(self, address: str, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Runs the server's side of a call, which ends with its listener."""
        task = asyncio.create_task(work)
        self._calls[address].add(task)
        task.add_done_callback(lambda _: self._calls.get(address, set()).discard(task))
        return task


class SimChannel:
    """Implements `Channel`."""

    def __init__(self, network: SimNetwork, address: str) -> None:
        self._network = network
        self._address = address

    async def unary(
        self, method: Method[Request, Response], request: Request, deadline: Deadline
    ) -> Response:
        data = method.encode_request(request)

        async def call() -> bytes:
            await self._network.delay()
            handler = self._network.handler(self._address, "unary", method)
            response = await self._serve(handler(method.decode_request(data)))
            await self._network.delay()
            return method.encode_response(response)

        return method.decode_response(await self._limited(call(), deadline))

    async def push(
        self,
        method: Method[Request, Response],
        requests: AsyncIterator[Request],
        deadline: Deadline,
    ) -> Response:
        async def received() -> AsyncIterator[Request]:
            async for request in requests:
                await self._network.delay()
                yield method.decode_request(method.encode_request(request))

        async def call() -> bytes:
            handler = self._network.handler(self._address, "push", method)
            response = await self._serve(handler(received()))
            await self._network.delay()
            return method.encode_response(response)

        return method.decode_response(await self._limited(call(), deadline))

    def duplex(self, method: Method[Request, Response]) -> Duplex[Request, Response]:
        return SimDuplex(self._network, self._address, method)

    async def close(self) -> None:
        """Nothing is kept between calls."""

    async def _serve(self, work: Coroutine[Any, Any, T]) -> T:
        task = self._network.start(self._address, work)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if not task.cancelled():
                task.cancel()
                raise
            raise Unavailable(f"{self._address}: the connection broke") from None

    async def _limited(self, call: Coroutine[Any, Any, bytes], deadline: Deadline) -> bytes:
        try:
            async with asyncio.timeout(deadline.remaining_s()):
                return await call
        except TimeoutError:
            raise DeadlineExceeded(f"{self._address}: deadline exceeded") from None


class SimDuplex(Generic[Request, Response]):
    """Implements `Duplex`."""

    def __init__(
        self, network: SimNetwork, address: str, method: Method[Request, Response]
    ) -> None:
        self._network = network
        self._address = address
        self._method = method
        self._sent: asyncio.Queue[bytes] = asyncio.Queue()
        self._received: asyncio.Queue[Any] = asyncio.Queue()
        self._task: asyncio.Task[None] | None = None

    async def send(self, message: Request) -> None:
        if self._task is None:
            handler = self._network.handler(self._address, "duplex", self._method)
            self._task = self._network.start(self._address, self._serve(handler))
        await self._network.delay()
        self._sent.put_nowait(self._method.encode_request(message))

    async def receive(self) -> Response | None:
        item = await self._received.get()
        if item is _END:
            return None
        if isinstance(item, Exception):
            raise item
        return self._method.decode_response(item)

    def cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()

    async def _requests(self) -> AsyncIterator[Request]:
        while True:
            yield self._method.decode_request(await self._sent.get())

    async def _serve(self, handler: Any) -> None:
        responses = handler(self._requests())
        try:
            async for response in responses:
                await self._network.delay()
                self._received.put_nowait(self._method.encode_response(response))
            self._received.put_nowait(_END)
        except asyncio.CancelledError:
            self._received.put_nowait(Unavailable(f"{self._address}: the connection broke"))
            raise
        except Exception as error:
            self._received.put_nowait(error)
        finally:
            await responses.aclose()
