"""One call between two simulated processes, both ends of it: what gRPC does, without gRPC."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from typing import Any

from forebay.core.errors import ForebayError, InternalError, Overloaded, Unavailable
from forebay.rpc.connector import Method
from forebay.simulator.fabric import Network
from forebay.simulator.loop import Node
from forebay.simulator.wire import END, Inbox, as_seen_by_peer

WINDOW = 64
"""Messages of one direction that may be on their way or unread before the sender has to wait."""
PUSH_WINDOW = 4


class Call:
    """Opened by a client node towards an address; `server` is None if nobody listened there.

    answers: what came back to the client. Both ends see the same numbers of messages sent and
    read, which stands for HTTP/2's flow control.
    """

    def __init__(
        self, network: Network, client: Node, address: str, method: Method[Any, Any]
    ) -> None:
        self.client = client
        self.server: Node | None = None
        self.address = address
        self.method = method
        self.answers = Inbox()
        self.requests = Inbox()
        self.ended = False
        self.held_back: Any = None
        """A message that is sent after the next one."""
        self._network = network
        self._handler: Any = None
        self._task: asyncio.Task[None] | None = None
        self._num_sent = [0, 0]
        self._arrival = [0.0, 0.0]
        self._blocked: list[asyncio.Future[None] | None] = [None, None]

    def open(self) -> bool:
        """Finds the server. False when there is none: `answers` gets the failure."""
        network = self._network
        listener = network.listener(self.address)
        if listener is None or network.link(self.client, listener.node).is_broken:
            reason = f"{self.address}: failed to connect"
            network.refuse(self.client, self.answers.put, Unavailable(reason))
            self.ended = True
            return False
        self.server = listener.node
        self._handler = listener.handlers[self.method.path]
        network.begin(self)
        return True

    # The client's end.

    def start_unary(self, data: Any) -> None:
        if self.open():
            self._to_server(self._serve_unary, data)

    def start_push(self) -> None:
        if self.open():
            self._to_server(self._serve_push)

    def start_duplex(self) -> None:
        if self.open():
            self._to_server(self._serve_duplex)

    def send_request(self, item: Any, late_s: float = 0.0) -> None:
        if self.server is not None and not self.ended:
            self._num_sent[0] += 1
            self._arrival[0] = max(self._arrival[0], self._network.loop.now) + late_s
            self._to_server(self.requests.put, item)

    def send_held_back(self) -> None:
        held, self.held_back = self.held_back, None
        if held is not None:
            self.send_request(held)

    async def room_for_request(self, window: int) -> None:
        while not self.ended and self._num_sent[0] - self.requests.num_taken >= window:
            self._blocked[0] = blocked = asyncio.get_running_loop().create_future()
            await blocked

    def cancel(self) -> None:
        """Idempotent. The server notices a moment later."""
        if self.ended:
            return
        self._finish()
        self.answers.put(Unavailable(f"{self.address}: the call was cancelled"))
        if self.server is not None:
            self._to_server(self.server_broken, "the caller cancelled")

    def client_broken(self, reason: str) -> None:
        self.ended = True
        self._wake(0)
        self.answers.put(Unavailable(f"{self.address}: {reason}"))

    # The server's end.

    def server_broken(self, _: str) -> None:
        """The handler is cancelled; by chance its messages seem to end in order before."""
        self._wake(1)
        task = self._task
        if task is None:
            self._handler = None
            return
        if self._network.dice.chance(0.5):
            self.requests.put(END)
            self._network.loop.call_soon(task.cancel)
        else:
            task.cancel()

    def _serve_unary(self, data: Any) -> None:
        self._start(self._answer(self.method.decode_request(data)))

    def _serve_push(self) -> None:
        if self._network.on_push is not None and self.server is not None:
            self._network.on_push(self.client, self.server)
        self._start(self._answer(self._received()))

    def _serve_duplex(self) -> None:
        self._start(self._stream())

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        network = self._network
        assert self.server is not None
        if self._handler is None:
            work.close()
            network.end(self, self.server)
            return
        if network.timeline.on:
            what = f"{self.method.name} from {self.client.name}"
            network.timeline.add(network.loop.now, self.server.name, what)
        self._task = network.loop.spawn(self.server, work)

    async def _answer(self, request: Any) -> None:
        network = self._network
        assert self.server is not None
        try:
            response = await self._handler(request)
        except Exception as error:
            self._reply(self._failure(error))
            return
        finally:
            network.end(self, self.server)
        after = network.after_call.get(self.method.name)
        if after is not None:
            after(self.server, request)
        lost = network.tampering.lost_answer(self.method.name)
        if lost is None:
            self._reply(self.method.encode_response(response))
            return
        if network.timeline.on:
            what = f"FAULT: the answer to {self.method.name} is lost"
            network.timeline.add(network.loop.now, self.server.name, what)
        if not lost.silent:
            self._reply(Unavailable(f"{self.address}: the connection was reset"))

    async def _stream(self) -> None:
        responses = self._handler(self._received())
        try:
            async for response in responses:
                await self._room_for_response()
                self._send_response(self.method.encode_response(response))
        except Exception as error:
            self._reply(self._failure(error))
        else:
            self._reply(END)
        finally:
            assert self.server is not None
            self._network.end(self, self.server)
            await responses.aclose()

    def _failure(self, error: Exception) -> ForebayError:
        if not isinstance(error, ForebayError) or isinstance(error, InternalError):
            assert self.server is not None
            self._network.on_bug(f"{self.method.name} on {self.server.name}", error)
        self._network.num_refused += isinstance(error, Overloaded)
        return as_seen_by_peer(error, self.address)

    async def _received(self) -> AsyncIterator[Any]:
        while True:
            item = await self.requests.get()
            waiter = self._blocked[0]
            if waiter is not None:
                self._to_client(self._wake, 0)
            if item is END:
                return
            yield self.method.decode_request(item)

    async def _room_for_response(self) -> None:
        while not self.ended and self._num_sent[1] - self.answers.num_taken >= WINDOW:
            self._blocked[1] = blocked = asyncio.get_running_loop().create_future()
            await blocked

    def took_answer(self) -> None:
        if self._blocked[1] is not None and self.server is not None:
            self._to_server(self._wake, 1)

    def _send_response(self, data: Any) -> None:
        self._num_sent[1] += 1
        self._to_client(self.answers.put, data)

    def _reply(self, item: Any) -> None:
        """The last thing the client hears."""
        self._to_client(self._take_last, item)

    def _take_last(self, item: Any) -> None:
        if not self.ended:
            self._finish()
            self.answers.put(item)

    def _finish(self) -> None:
        self.ended = True
        self._network.end(self, self.client)
        self._wake(0)

    def _wake(self, direction: int) -> None:
        waiter, self._blocked[direction] = self._blocked[direction], None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def _to_server(self, callback: Any, *args: Any) -> None:
        assert self.server is not None
        self._arrival[0] = self._network.send(
            self.client, self.server, self._arrival[0], callback, *args
        )

    def _to_client(self, callback: Any, *args: Any) -> None:
        assert self.server is not None
        self._arrival[1] = self._network.send(
            self.server, self.client, self._arrival[1], callback, *args
        )
