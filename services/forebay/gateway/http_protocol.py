"""uvicorn's HTTP protocol with the limits it lacks: size of a request's head, and time to send it.

Bodies are bounded by Exchange.read_body. A connection that opens and stays silent, or that sends
its head a byte at a time, is closed after HEAD_TIMEOUT_S.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from forebay.gateway.exchange import ABORT_EXTENSION

MAX_HEAD_BYTES = 64 * 1024
HEAD_TIMEOUT_S = 30.0

_TOO_LARGE = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\n"
    b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n%b"
)
_TOO_LARGE_BODY = (
    b'{"error":{"message":"the request line and headers are too large",'
    b'"type":"invalid_request_error","param":null,"code":null}}'
)


class BoundedHttpProtocol(HttpToolsProtocol):
    """`max_message_bytes`: a request on the wire, chunk headers and trailers included."""

    head_timeout_s = HEAD_TIMEOUT_S
    max_message_bytes = 64 * 1024 * 1024

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._head_timer: asyncio.TimerHandle | None = None
        self._num_head_bytes = 0
        self._num_message_bytes = 0
        self._in_head = True
        self._open_cycles: list[RequestResponseCycle] = []

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._arm()

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        super().connection_lost(exc)
        # uvicorn tells only the newest of pipelined requests.
        for cycle in self._open_cycles:
            if not cycle.response_complete:
                cycle.disconnected = True
            cycle.message_event.set()
        self._open_cycles = []

    def data_received(self, data: bytes) -> None:
        if self._in_head:
            self._num_head_bytes += len(data)
        else:
            self._num_message_bytes += len(data)
        super().data_received(data)
        if self._in_head:
            if self._num_head_bytes > MAX_HEAD_BYTES:
                self._refuse_head()
            elif self._num_head_bytes > 0:
                self._arm()
        elif self._num_message_bytes > self.max_message_bytes:
            self.transport.abort()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head = True
        self._arm()
        self.scope["extensions"] = {ABORT_EXTENSION: self.transport.abort}  # type: ignore[dict-item]

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_head:  # later ones are trailers, which nobody here reads
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._disarm()
        self._in_head = False
        self._num_head_bytes = 0
        self._num_message_bytes = 0
        super().on_headers_complete()
        self._open_cycles = [c for c in self._open_cycles if not c.response_complete]
        self._open_cycles.append(self.cycle)

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._in_head = True

    def _arm(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(self.head_timeout_s, self._head_too_late)

    def _disarm(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_too_late(self) -> None:
        self._head_timer = None
        self.transport.abort()

    def _refuse_head(self) -> None:
        if not self.transport.is_closing():
            self.transport.write(_TOO_LARGE % (len(_TOO_LARGE_BODY), _TOO_LARGE_BODY))
            self.transport.close()
