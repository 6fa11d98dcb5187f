"""The connector over the simulated network."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, Generic

from forebay.core.clock import Deadline
from forebay.core.errors import DeadlineExceeded, Unavailable
from forebay.rpc.connector import Channel, Duplex, Method, Request, Response
from forebay.simulator.calls import PUSH_WINDOW, Call
from forebay.simulator.fabric import Network
from forebay.simulator.loop import Node
from forebay.simulator.tampering import Delivery, Replay
from forebay.simulator.wire import END


class SimConnector:
    """Implements `Connector` for one node."""

    def __init__(self, network: Network, node: Node) -> None:
        self._network = network
        self._node = node

    def connect(self, address: str) -> Channel:
        return SimChannel(self._network, self._node, address)


class SimChannel:
    """Implements `Channel`."""

    def __init__(self, network: Network, node: Node, address: str) -> None:
        self._network = network
        self._node = node
        self._address = address
        self._closed = False
        self._calls: dict[Call, None] = {}

    async def unary(
        self, method: Method[Request, Response], request: Request, deadline: Deadline
    ) -> Response:
        call = self._call(method)
        before = self._network.before_call.get(method.name)
        data = method.encode_request(before(self._address, request) if before else request)
        call.start_unary(data)
        replay = self._network.tampering.replay(method.name)
        try:
            return await self._answer(call, method, deadline)
        finally:
            if replay is not None:
                self._replay(replay, method, [data])

    async def push(
        self,
        method: Method[Request, Response],
        requests: AsyncIterator[Request],
        deadline: Deadline,
    ) -> Response:
        call = self._call(method)
        call.start_push()
        replay = self._network.tampering.replay(method.name)
        sent: list[Any] = []
        writer = asyncio.create_task(self._write_all(call, method, requests, sent))
        try:
            return await self._answer(call, method, deadline)
        finally:
            writer.cancel()
            await asyncio.gather(writer, return_exceptions=True)
            if replay is not None:
                self._replay(replay, method, sent)

    def _replay(self, replay: Replay, method: Method[Any, Any], sent: list[Any]) -> None:
        """What a proxy that doubles traffic does: it goes on without the caller."""
        network = self._network
        world = network.loop.world

        def again() -> None:
            if network.timeline.on:
                what = f"FAULT: {method.name} to {self._address} comes again"
                network.timeline.add(network.loop.now, self._node.name, what)
            call = Call(network, world, self._address, method)
            if len(sent) == 1 and isinstance(sent[0], bytes) and method.name != "Push":
                call.start_unary(sent[0])
            else:
                call.start_push()
                for data in sent:
                    call.send_request(data)
                call.send_request(END)
            replay.num_hit += call.server is not None

        network.loop.call_node(world, network.loop.now + replay.late_s, again)

    def duplex(self, method: Method[Request, Response]) -> Duplex[Request, Response]:
        return SimDuplex(self._call(method), method)

    async def close(self) -> None:
        self._closed = True
        for call in list(self._calls):
            call.cancel()
        self._calls.clear()

    def _call(self, method: Method[Any, Any]) -> Call:
        if self._closed:
            raise Unavailable(f"{self._address}: the connection is closed")
        for call in [call for call in self._calls if call.ended]:
            del self._calls[call]
        call = Call(self._network, self._node, self._address, method)
        self._calls[call] = None
        return call

    async def _answer(
        self, call: Call, method: Method[Request, Response], deadline: Deadline
    ) -> Response:
        try:
            async with asyncio.timeout(deadline.remaining_s()):
                item = await call.answers.get()
        except TimeoutError:
            raise DeadlineExceeded(f"{self._address}: Deadline Exceeded") from None
        finally:
            call.cancel()
        if isinstance(item, Exception):
            raise item
        return method.decode_response(item)

    async def _write_all(
        self,
        call: Call,
        method: Method[Request, Any],
        requests: AsyncIterator[Request],
        sent: list[Any],
    ) -> None:
        """Returns early when the call ends early; what `requests` raises ends the call. `sent` gets
        what was sent."""
        try:
            async for request in requests:
                await call.room_for_request(PUSH_WINDOW)
                if call.ended:
                    return
                sent.append(method.encode_request(request))
                self._send_tampered(call, sent[-1])
            call.send_held_back()
            call.send_request(END)
        except Exception as error:
            call.answers.put(error)

    def _send_tampered(self, call: Call, data: Any) -> None:
        network = self._network
        deliveries = network.tampering.deliveries(data)
        if network.timeline.on and deliveries != [Delivery(data)]:
            network.timeline.add(network.loop.now, self._node.name, "FAULT: a KV message")
        for delivery in deliveries:
            if delivery.hold:
                call.held_back = delivery.data
                return
            call.send_request(delivery.data, delivery.late_s)
            call.send_held_back()


class SimDuplex(Generic[Request, Response]):
    """Implements `Duplex`."""

    def __init__(self, call: Call, method: Method[Request, Response]) -> None:
        self._call = call
        self._method = method
        self._started = False

    async def send(self, message: Request) -> None:
        if not self._started:
            self._started = True
            self._call.start_duplex()
        elif self._call.ended:
            raise Unavailable(f"{self._call.address}: the peer has ended the stream")
        self._call.send_request(self._method.encode_request(message))

    async def receive(self) -> Response | None:
        item = await self._call.answers.get()
        if item is END:
            return None
        if isinstance(item, Exception):
            raise item
        self._call.took_answer()
        return self._method.decode_response(item)

    def cancel(self) -> None:
        self._call.cancel()
