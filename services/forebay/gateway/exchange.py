"""One HTTP request and its response, on bare ASGI: reading, watching the client, writing.

    body ---> run(work) --+-- the work ends
                          +-- the client leaves       (the work is cancelled)
                          +-- the deadline passes     (the work is cancelled)
                          +-- cut() at shutdown       (the work is cancelled)

Writing is pull based: the server's flow control holds `write` back once a slow reader's socket and
buffer are full, and then nothing more is taken from the generation. A reader that never catches
up is cut at the request's deadline.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable
from typing import Any

from starlette.exceptions import HTTPException
from starlette.types import Message, Receive, Scope, Send

from forebay.core.clock import now
from forebay.core.errors import DeadlineExceeded, ForebayError, RequestCancelled
from forebay.gateway.timeline import RequestTimeline

ABORT_EXTENSION = "forebay.abort"
"""Key in the scope's extensions of a function that drops the connection at once."""
_LAST_WORD_S = 1.0
"""How long a reader gets to take the error that ends its stream."""
_DISCARD_FACTOR = 4
"""A body up to this many times too long is read to its end, unkept: a client that is refused while
it still writes sees a reset connection in place of the answer."""

Headers = Iterable[tuple[bytes, bytes]]


class Exchange:
    """Used by one task. `arrived_at`: seconds on the loop's clock. `explained`: what the client
    wants to know the course of."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, request_id: str) -> None:
        self.request_id = request_id
        self.arrived_at = now()
        self.response_started = False
        self.client_left = False
        self.explained: list[RequestTimeline] = []
        self._scope = scope
        self._receive = receive
        self._send = send
        self._finished = False
        self._streaming = False
        self._writing = asyncio.Lock()
        self._last_write_at = self.arrived_at
        self._work: asyncio.Task[None] | None = None
        self._cut_by: ForebayError | None = None

    async def read_body(self, max_bytes: int, timeout_s: float) -> bytes:
        """Raises HTTPException 413 or 408, or RequestCancelled when the client leaves."""
        too_long = HTTPException(413, f"the body is longer than {max_bytes} bytes")
        if self._content_length() > _DISCARD_FACTOR * max_bytes:
            raise too_long
        parts: list[bytes] = []
        num_bytes = 0
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    message = await self._receive()
                    if message["type"] == "http.disconnect":
                        self.client_left = True
                        raise RequestCancelled("the client left")
                    part: bytes = message.get("body", b"")
                    num_bytes += len(part)
                    if num_bytes <= max_bytes:
                        parts.append(part)
                    more = message.get("more_body", False)
                    if num_bytes > (_DISCARD_FACTOR if more else 1) * max_bytes:
                        raise too_long
                    if not more:
                        return b"".join(parts)
        except TimeoutError:
            raise HTTPException(408, "the body did not arrive in time") from None

    def header(self, name: str) -> str:
        """The request's first one of that name (lower case); empty where it has none."""
        wanted = name.encode("ascii")
        for key, value in self._scope["headers"]:
            if key == wanted:
                return str(value, "latin-1")
        return ""

    def _content_length(self) -> int:
        for name, value in self._scope["headers"]:
            if name == b"content-length" and value.isdigit():
                return int(value[:20])
        return 0

    async def run(
        self,
        work: Coroutine[Any, Any, None],
        *,
        timeout_s: float,
        keep_alive_s: float,
        keep_alive: bytes,
    ) -> None:
        """Raises what `work` raises, or what cut it short, after it has ended. Call it once,
        after `read_body`: from then on the client has nothing to say but goodbye."""
        self._work = asyncio.create_task(work)
        watch = asyncio.create_task(self._watch(keep_alive_s, keep_alive))
        try:
            await asyncio.wait(
                (self._work, watch), timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED
            )
            if not self._work.done():
                left = watch.result() if watch.done() else None
                self.cut(left or DeadlineExceeded("the request's deadline passed"))
                await asyncio.wait((self._work,))
        finally:
            self._work.cancel()
            watch.cancel()
            await asyncio.gather(self._work, watch, return_exceptions=True)
        if self._work.cancelled() and self._cut_by is not None:
            raise self._cut_by
        self._work.result()

    def cut(self, error: ForebayError) -> None:
        """Ends the work; `run` raises `error` unless the work was done already."""
        if self._work is not None and self._cut_by is None:
            self._cut_by = error
            self._work.cancel()

    async def _watch(self, keep_alive_s: float, keep_alive: bytes) -> RequestCancelled:
        """Returns when the client has left. Meanwhile fills the silences of a stream."""
        while True:
            silent_s = now() - self._last_write_at if self._streaming else 0.0
            try:
                async with asyncio.timeout(max(keep_alive_s - silent_s, 0.001)):
                    message = await self._receive()
            except TimeoutError:
                if self._streaming and now() - self._last_write_at >= keep_alive_s:
                    await self._write(keep_alive)
                continue
            if message["type"] == "http.disconnect":
                self.client_left = True
                return RequestCancelled("the client left")

    async def respond(self, status: int, body: bytes, headers: Headers = ()) -> None:
        """A whole JSON response."""
        await self._start(
            status,
            (
                (b"content-type", b"application/json"),
                (b"content-length", str(len(body)).encode("ascii")),
                *headers,
            ),
        )
        await self._write(body, last=True)

    async def start_stream(self, headers: Headers = ()) -> None:
        await self._start(
            200,
            (
                (b"content-type", b"text/event-stream; charset=utf-8"),
                (b"cache-control", b"no-cache"),
                (b"x-accel-buffering", b"no"),
                *headers,
            ),
        )
        self._streaming = True

    async def write(self, frame: bytes, *, last: bool = False) -> None:
        await self._write(frame, last=last)

    async def fail_stream(self, frame: bytes) -> None:
        """Ends a response that has begun: with `frame` where that is a stream whose reader takes
        it, else by dropping the connection."""
        if self._streaming:
            try:
                async with asyncio.timeout(_LAST_WORD_S):
                    await self._write(frame, last=True)
                return
            except TimeoutError:
                pass
        abort = self._scope.get("extensions", {}).get(ABORT_EXTENSION)
        if abort is not None:
            abort()

    async def _start(self, status: int, headers: Headers) -> None:
        self.response_started = True
        request_id = (b"x-request-id", self.request_id.encode("ascii"))
        message: Message = {
            "type": "http.response.start",
            "status": status,
            "headers": [*headers, request_id],
        }
        await self._send(message)

    async def _write(self, body: bytes, *, last: bool = False) -> None:
        async with self._writing:
            if self._finished:
                return
            self._finished = last
            await self._send({"type": "http.response.body", "body": body, "more_body": not last})
            self._last_write_at = now()
