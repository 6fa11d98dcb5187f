"""The network seam: how processes reach each other, without saying over what.

`grpc_connector` and `grpc_listener` implement it over gRPC; the simulator in memory, in virtual
time. Code on either side of the seam imports neither grpc nor sockets. Every failure arrives as a
ForebayError; a peer that cannot be reached, or goes away, is `Unavailable`.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from forebay.core.clock import Deadline

Request = TypeVar("Request")
Response = TypeVar("Response")


@dataclass(frozen=True, slots=True)
class Method(Generic[Request, Response]):
    """One RPC. `service` is the full protobuf name. The four functions turn messages into bytes
    and back; raw methods use the identity."""

    service: str
    name: str
    encode_request: Callable[[Request], bytes]
    decode_request: Callable[[bytes], Request]
    encode_response: Callable[[Response], bytes]
    decode_response: Callable[[bytes], Response]

    @property
    def path(self) -> str:
        return f"/{self.service}/{self.name}"


_Sent = TypeVar("_Sent", contravariant=True)
_Received = TypeVar("_Received", covariant=True)


class Duplex(Protocol[_Sent, _Received]):
    """The client's end of a bidirectional stream."""

    async def send(self, message: _Sent) -> None: ...

    async def receive(self) -> _Received | None:
        """None when the peer has ended the stream in order."""

    def cancel(self) -> None:
        """Ends both directions now. Always call it when done: a stream that is merely dropped
        keeps running on the peer."""


class Channel(Protocol):
    """A connection to one address; connects on first use and again after a loss."""

    async def unary(
        self, method: Method[Request, Response], request: Request, deadline: Deadline
    ) -> Response: ...

    async def push(
        self,
        method: Method[Request, Response],
        requests: AsyncIterator[Request],
        deadline: Deadline,
    ) -> Response:
        """Streams requests, then awaits the one response."""

    def duplex(self, method: Method[Request, Response]) -> Duplex[Request, Response]: ...

    async def close(self) -> None: ...


class Connector(Protocol):
    def connect(self, address: str) -> Channel:
        """`address`: host:port. Does not wait for the peer."""


UnaryHandler = Callable[[Any], Awaitable[Any]]
PushHandler = Callable[[AsyncIterator[Any]], Awaitable[Any]]
DuplexHandler = Callable[[AsyncIterator[Any]], AsyncGenerator[Any, None]]


@dataclass(slots=True)
class Routes:
    """What a listener serves: method to handler. A handler raises ForebayError to fail its call;
    when the caller leaves, it is cancelled, or its messages end as if all had come: what must not
    be cut short needs a last message that says so."""

    unary: list[tuple[Method[Any, Any], UnaryHandler]] = field(default_factory=list)
    push: list[tuple[Method[Any, Any], PushHandler]] = field(default_factory=list)
    duplex: list[tuple[Method[Any, Any], DuplexHandler]] = field(default_factory=list)

    def services(self) -> list[str]:
        rows = [*self.unary, *self.push, *self.duplex]
        return sorted({method.service for method, _ in rows})
