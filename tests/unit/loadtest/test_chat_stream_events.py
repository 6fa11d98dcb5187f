"""What counts as a complete stream, and what as a broken one."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable

import pytest

from forebay_loadtest.chat_stream import (
    Answer,
    ChatStream,
    Ending,
    EventReader,
    http_client,
    run_chat,
)

ROLE = json.dumps({"choices": [{"delta": {"role": "assistant", "content": ""}}]})
HELLO = json.dumps({"choices": [{"delta": {"content": "hello"}}]})
STOP = json.dumps({"choices": [{"delta": {}, "finish_reason": "stop"}]})
USAGE = json.dumps({"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}})
ERROR = json.dumps({"error": {"message": "the worker is gone"}})
COMPLETE = [ROLE, HELLO, HELLO, STOP, USAGE, "[DONE]"]


def read(events: list[str]) -> tuple[EventReader, list[bool]]:
    reader = EventReader()
    return reader, [reader.feed(event) for event in events]


def test_a_complete_stream() -> None:
    reader, held_text = read(COMPLETE)
    assert held_text == [False, True, True, False, False, False]
    assert reader.answer() == Answer("hellohello", "stop", 3, 2)
    assert reader.error == ""


@pytest.mark.parametrize("missing", [STOP, USAGE, "[DONE]"])
def test_what_lacks_a_part_is_not_complete(missing: str) -> None:
    reader, _ = read([event for event in COMPLETE if event != missing])
    assert reader.answer() is None


def test_an_error_ends_a_stream() -> None:
    reader, _ = read([HELLO, ERROR])
    assert reader.error == "the worker is gone"
    assert reader.answer() is None


def test_done_after_an_error_is_a_second_fault() -> None:
    reader, _ = read([HELLO, STOP, USAGE, ERROR, "[DONE]"])
    assert "[DONE] after an error" in reader.error
    assert reader.answer() is None


def test_nothing_may_follow_done() -> None:
    reader, _ = read([*COMPLETE, HELLO])
    assert reader.error == "an event after [DONE]"
    assert reader.answer() is None


Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


async def answered(payload: bytes) -> ChatStream:
    """What a client makes of a server that sends `payload` and closes."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(payload)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    stream = ChatStream(client=0, spec=0, began=0.0)
    async with server, http_client(1) as http:
        await run_chat(http, f"http://127.0.0.1:{port}", {"stream": True}, stream)
    return stream


def events(*items: str) -> bytes:
    return b"".join(b"data: " + item.encode() + b"\n\n" for item in items)


OK_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n"


async def test_complete_over_http() -> None:
    stream = await answered(OK_HEAD + b"\r\n" + b": keep-alive\n\n" + events(*COMPLETE))
    assert stream.ending is Ending.COMPLETE
    assert stream.answer == Answer("hellohello", "stop", 3, 2)
    assert len(stream.chunk_times) == 2
    assert not stream.running_at(stream.ended)


async def test_a_silent_end_is_a_failure() -> None:
    stream = await answered(OK_HEAD + b"\r\n" + events(ROLE, HELLO))
    assert stream.ending is Ending.FAILED
    assert "without finish reason" in stream.error


async def test_a_connection_that_breaks_is_a_cut() -> None:
    stream = await answered(OK_HEAD + b"Content-Length: 9999\r\n\r\n" + events(ROLE, HELLO))
    assert stream.ending is Ending.CUT
    assert stream.answer is None


@pytest.mark.parametrize(
    ("status", "ending"),
    [(b"503 No", Ending.REFUSED), (b"429 No", Ending.REFUSED), (b"500 No", Ending.FAILED)],
)
async def test_refused_before_it_began(status: bytes, ending: Ending) -> None:
    head = b"HTTP/1.1 " + status + b"\r\nContent-Length: 4\r\nConnection: close\r\n\r\nbusy"
    stream = await answered(head)
    assert stream.ending is ending
    assert "busy" in stream.error


async def test_nobody_listens() -> None:
    server = await asyncio.start_server(lambda r, w: None, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    server.close()
    await server.wait_closed()
    stream = ChatStream(client=0, spec=0, began=0.0)
    async with http_client(1) as http:
        await run_chat(http, f"http://127.0.0.1:{port}", {}, stream)
    assert stream.ending is Ending.REFUSED
