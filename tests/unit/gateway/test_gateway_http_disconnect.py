"""Clients that leave, stall, dawdle or flood: work stops, memory stays bounded, others go on."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import suppress

import pytest
from gateway_fakes import (
    MODEL,
    WAIT_S,
    Edges,
    FakeGenerator,
    Script,
    chat_body,
    edge_settings,
    hello,
    running_edges,
)

from forebay.core.errors import InternalError
from forebay.core.finish import FinishReason
from forebay.gateway import openai_route
from forebay.gateway.exchange import Exchange
from forebay.gateway.generation import (
    ChoiceEnd,
    Chunk,
    Completion,
    Event,
    GenerationRequest,
    Usage,
)
from forebay.gateway.http_protocol import MAX_HEAD_BYTES, BoundedHttpProtocol


async def never(request: GenerationRequest) -> AsyncGenerator[Event, None]:
    await asyncio.Event().wait()
    yield Chunk(0, "", ())


async def one_then_never(request: GenerationRequest) -> AsyncGenerator[Event, None]:
    yield Chunk(0, "Hel", ())
    await asyncio.Event().wait()


async def all_but_the_result(request: GenerationRequest) -> AsyncGenerator[Event, None]:
    yield Chunk(0, "Hel", ())
    yield ChoiceEnd(0, FinishReason.STOP)
    await asyncio.Event().wait()


def raw_request(**fields: object) -> bytes:
    body = json.dumps(chat_body(**fields)).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode() + body


async def connect(edges: Edges) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection("127.0.0.1", edges.server.http_port)


async def leave(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with suppress(ConnectionError):
        await writer.wait_closed()


async def until_closed(reader: asyncio.StreamReader) -> bytes:
    """All that comes until the server closes; a reset counts as closed."""
    received = b""
    async with asyncio.timeout(WAIT_S):
        with suppress(ConnectionError):
            while data := await reader.read(65536):
                received += data
    return received


@pytest.mark.parametrize("script", [never, one_then_never, all_but_the_result])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_ends_the_generation(script: Script, stream: bool) -> None:
    async with running_edges(FakeGenerator(script)) as edges:
        reader, writer = await connect(edges)
        writer.write(raw_request(stream=stream))
        async with asyncio.timeout(WAIT_S):
            if stream and script is not never:
                await reader.readuntil(b"Hel")
            await edges.generator.started.wait()
        assert edges.generator.num_open == 1
        await leave(writer)
        await edges.closed()
        assert edges.generator.num_finished == 0
        model = {"model_name": MODEL}
        assert edges.metric("forebay_num_requests_running", **model) == 0
        assert edges.metric("forebay_request_errors_total", code="cancelled", **model) == 1
        edges.generator.script = hello
        assert (await edges.chat()).status_code == 200


async def test_leaving_with_several_prompts_ends_them_all() -> None:
    async with running_edges(FakeGenerator(one_then_never)) as edges:
        call = asyncio.create_task(edges.complete(prompt=["a", "b", "c"], stream=True))
        async with asyncio.timeout(WAIT_S):
            while edges.generator.num_open < 3:
                await asyncio.sleep(0)
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        await edges.closed()
        assert edges.generator.num_open == 0


async def test_leaving_before_the_body_is_whole_starts_nothing() -> None:
    async with running_edges(FakeGenerator()) as edges:
        _, writer = await connect(edges)
        writer.write(raw_request()[:-5])
        await writer.drain()
        await leave(writer)
        assert (await edges.chat()).status_code == 200
        assert len(edges.generator.requests) == 1


async def test_leaving_ends_pipelined_requests_too() -> None:
    async with running_edges(FakeGenerator(never)) as edges:
        _, writer = await connect(edges)
        writer.write(raw_request() * 2)
        async with asyncio.timeout(WAIT_S):
            await edges.generator.started.wait()
        await leave(writer)
        await edges.closed()


async def test_a_reader_that_stalls_holds_the_generation_back_and_is_cut_at_the_deadline(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(openai_route, "_DEADLINE_MARGIN_S", 0.0)
    monkeypatch.setattr("forebay.gateway.exchange._LAST_WORD_S", 0.01)
    num_events = 0

    async def flood(request: GenerationRequest) -> AsyncGenerator[Event, None]:
        nonlocal num_events
        while True:
            num_events += 1
            yield Chunk(0, "x" * 10_000, ())
            await asyncio.sleep(0)

    settings = edge_settings(request_timeout_s=0.5)
    async with running_edges(FakeGenerator(flood), settings) as edges:
        reader, writer = await connect(edges)
        writer.transport.pause_reading()
        writer.write(raw_request(stream=True))
        await edges.closed()
        assert num_events * 10_000 < 64 * 1024 * 1024
        async with asyncio.timeout(WAIT_S):
            while len(edges.server._exchanges):
                await asyncio.sleep(0)
        writer.transport.resume_reading()
        received = await until_closed(reader)
        assert received.startswith(b"HTTP/1.1 200")
        assert b"[DONE]" not in received
        await leave(writer)


async def test_a_generation_that_ignores_its_deadline_is_cut(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(openai_route, "_DEADLINE_MARGIN_S", 0.0)
    settings = edge_settings(request_timeout_s=0.05)
    async with running_edges(FakeGenerator(never), settings) as edges:
        response = await edges.chat()
        assert response.status_code == 504
        edges.generator.script = one_then_never
        response = await edges.chat(stream=True)
        assert response.status_code == 200
        assert '"timeout_error"' in response.text
        assert "[DONE]" not in response.text


@pytest.mark.parametrize("half", [b"", b"POST /v1/chat", b"GET /health HTTP/1.1\r\nhost: x\r\nx"])
async def test_a_head_that_does_not_arrive_is_cut(
    half: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BoundedHttpProtocol, "head_timeout_s", 0.05)
    async with running_edges(FakeGenerator()) as edges:
        reader, writer = await connect(edges)
        writer.write(half)
        assert await until_closed(reader) == b""
        await leave(writer)
        assert (await edges.chat()).status_code == 200


async def test_a_second_head_that_does_not_arrive_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BoundedHttpProtocol, "head_timeout_s", 0.05)
    async with running_edges(FakeGenerator()) as edges:
        reader, writer = await connect(edges)
        writer.write(raw_request())
        await reader.readuntil(b"Hello world")
        writer.write(b"\r\n")
        await until_closed(reader)
        await leave(writer)


async def test_a_body_that_does_not_arrive_is_a_408(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai_route, "BODY_TIMEOUT_S", 0.05)
    async with running_edges(FakeGenerator()) as edges:
        reader, writer = await connect(edges)
        writer.write(raw_request()[:-1])
        assert (await until_closed(reader)).startswith(b"HTTP/1.1 408")
        await leave(writer)
        assert edges.generator.requests == []


@pytest.mark.parametrize(
    "flood",
    [
        b"GET /health HTTP/1.1\r\n" + b"x: y\r\n" * 100_000,
        b"GET /health HTTP/1.1\r\nx: " + b"y" * 500_000,
        b"GET /" + b"a" * 500_000,
        b"\r\n" * 300_000,
    ],
)
async def test_a_flood_in_the_head_is_cut(flood: bytes) -> None:
    assert len(flood) > MAX_HEAD_BYTES
    async with running_edges(FakeGenerator()) as edges:
        reader, writer = await connect(edges)
        writer.write(flood)
        received = await until_closed(reader)
        assert received == b"" or received.startswith(b"HTTP/1.1 431")
        await leave(writer)
        assert (await edges.chat()).status_code == 200


async def test_trailers_and_endless_chunks_are_bounded() -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
    async with running_edges(FakeGenerator(), edge_settings(max_body_kib=4)) as edges:
        for flood in (b"0\r\n" + b"x: y\r\n" * 200_000, b"1\r\n \r\n" * 200_000):
            reader, writer = await connect(edges)
            writer.write(head + flood)
            received = await until_closed(reader)
            assert received == b"" or received.startswith(b"HTTP/1.1 4")
            await leave(writer)
        assert (await edges.chat()).status_code == 200


@pytest.mark.parametrize("raw", [b"\x16\x03\x01\x02\x00", b"GET\r\n\r\n", b"G" * 100 + b"\r\n\r\n"])
async def test_what_is_not_http_is_refused(raw: bytes) -> None:
    async with running_edges(FakeGenerator()) as edges:
        reader, writer = await connect(edges)
        writer.write(raw)
        assert (await until_closed(reader)).startswith(b"HTTP/1.1 400")
        await leave(writer)
        assert (await edges.chat()).status_code == 200


async def test_a_result_sent_just_as_the_client_leaves_is_no_error() -> None:
    """cut() after the work is done changes nothing."""

    async def receive() -> dict[str, object]:
        await asyncio.Event().wait()
        return {}

    sent: list[object] = []

    async def send(message: object) -> None:
        sent.append(message)

    exchange = Exchange({"headers": [], "type": "http"}, receive, send, "req-1")

    async def work() -> None:
        await exchange.respond(200, b"{}")

    await exchange.run(work(), timeout_s=WAIT_S, keep_alive_s=WAIT_S, keep_alive=b"")
    exchange.cut(InternalError("too late"))
    assert len(sent) == 2


async def test_a_thousand_clients_that_leave_leave_nothing_behind() -> None:
    async with running_edges(FakeGenerator(one_then_never)) as edges:

        async def visit(index: int) -> None:
            reader, writer = await connect(edges)
            writer.write(raw_request(stream=index % 2 == 0))
            if index % 4 == 0:
                await reader.readuntil(b"Hel")
            await leave(writer)

        for start in range(0, 1000, 50):
            async with asyncio.timeout(WAIT_S):
                await asyncio.gather(*(visit(start + i) for i in range(50)))
        async with asyncio.timeout(WAIT_S):
            while edges.generator.num_open or len(edges.server._exchanges):
                await asyncio.sleep(0)
        assert len(edges.generator.requests) >= 250
        assert edges.metric("forebay_num_requests_running", model_name=MODEL) == 0


async def test_an_answer_after_the_reader_stalled_a_while_is_whole() -> None:
    num_chunks = 400

    async def long(request: GenerationRequest) -> AsyncGenerator[Event, None]:
        for _ in range(num_chunks):
            yield Chunk(0, "x" * 10_000, ())
        yield ChoiceEnd(0, FinishReason.LENGTH)
        yield Completion(Usage(1, num_chunks, 0))

    async with running_edges(FakeGenerator(long)) as edges:
        reader, writer = await connect(edges)
        writer.transport.pause_reading()
        writer.write(raw_request(stream=True))
        async with asyncio.timeout(WAIT_S):
            await edges.generator.started.wait()
        writer.transport.resume_reading()
        async with asyncio.timeout(WAIT_S):
            received = b""
            while b"[DONE]\n\n" not in received[-200:]:
                received += await reader.read(1 << 20)
        assert received.count(b"x" * 10_000) == num_chunks
        await leave(writer)
