from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import pytest
from gateway_fakes import (
    MODEL,
    WAIT_S,
    Edges,
    FakeGenerator,
    chat_body,
    edge_settings,
    running_edges,
    sse_data,
    token,
)

from forebay.core import errors
from forebay.core.finish import FinishReason
from forebay.gateway.generation import (
    ChoiceEnd,
    Chunk,
    Completion,
    Event,
    GenerationRequest,
    Usage,
)


@pytest.fixture
async def edges() -> AsyncIterator[Edges]:
    async with running_edges(FakeGenerator()) as running:
        yield running


async def _chunks(edges: Edges, **fields: object) -> list[Any]:
    response = await edges.chat(stream=True, **fields)
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["x-request-id"]
    return [*sse_data(response.text)]


async def test_a_chat_stream(edges: Edges) -> None:
    *chunks, done = await _chunks(edges)
    assert done == "[DONE]"
    first = chunks[0]
    assert first["object"] == "chat.completion.chunk"
    assert first["id"].startswith("chatcmpl-")
    assert first["model"] == MODEL
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert len({chunk["created"] for chunk in chunks}) == 1
    assert all("usage" not in chunk for chunk in chunks)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas == [
        {"role": "assistant", "content": ""},
        {"content": "Hello"},
        {"content": " world"},
        {},
    ]
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons == [None, None, None, "stop"]


async def test_a_completion_stream(edges: Edges) -> None:
    response = await edges.complete(stream=True)
    *chunks, done = sse_data(response.text)
    assert done == "[DONE]"
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["Hello", " world", ""]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, "stop"]


async def test_usage_of_a_stream_equals_usage_without_one(edges: Edges) -> None:
    *chunks, last, _ = await _chunks(edges, stream_options={"include_usage": True}, n=2)
    assert last["choices"] == []
    assert last["usage"] == (await edges.chat(n=2)).json()["usage"]
    assert all(chunk["usage"] is None for chunk in chunks)


async def test_every_choice_has_its_role_text_and_end(edges: Edges) -> None:
    *chunks, _ = await _chunks(edges, n=3)
    for index in range(3):
        own = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
        assert own[0]["delta"]["role"] == "assistant"
        assert "".join(c["delta"].get("content", "") for c in own) == "Hello world"
        assert [c["finish_reason"] for c in own].count("stop") == 1


async def test_no_chunk_is_empty_and_logprobs_wait_for_their_text(edges: Edges) -> None:
    *chunks, _ = await _chunks(edges, logprobs=True, top_logprobs=1)
    choices = [chunk["choices"][0] for chunk in chunks[1:]]
    assert [c["delta"].get("content") for c in choices] == ["Hello", " world", None]
    tokens = [[t["token"] for t in (c["logprobs"] or {"content": []})["content"]] for c in choices]
    assert tokens == [["t1"], ["t2", "t3"], []]
    assert choices[1]["logprobs"]["content"][0]["logprob"] == -9999.0


async def test_tokens_without_text_at_the_end_come_with_the_finish_reason(edges: Edges) -> None:
    async def held(request: GenerationRequest) -> AsyncGenerator[Event, None]:
        yield Chunk(0, "a", (token(1, -1.0),))
        yield Chunk(0, "", (token(2, -2.0),))
        yield ChoiceEnd(0, FinishReason.STOP)
        yield Completion(Usage(1, 2, 0))

    edges.generator.script = held
    *_, end, done = await _chunks(edges, logprobs=True)
    assert done == "[DONE]"
    assert end["choices"][0]["finish_reason"] == "stop"
    assert [t["token"] for t in end["choices"][0]["logprobs"]["content"]] == ["t2"]


async def test_streamed_completion_logprobs_continue_the_offsets(edges: Edges) -> None:
    response = await edges.complete(stream=True, logprobs=0)
    *chunks, _ = sse_data(response.text)
    logs = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    assert [log and log["text_offset"] for log in logs] == [[0], [2, 4], None]


async def test_any_text_survives(edges: Edges) -> None:
    texts = [
        '"\\\n\r\t',
        "\u2028\u2029\x85\x0b\x0c\x1c",
        "é漢👩‍👩‍👧",
        "\x00\x7f",
        "data: [DONE]\n\n",
    ]

    async def odd(request: GenerationRequest) -> AsyncGenerator[Event, None]:
        for text in texts:
            yield Chunk(0, text, ())
        yield ChoiceEnd(0, FinishReason.LENGTH)
        yield Completion(Usage(1, 1, 0))

    edges.generator.script = odd
    response = await edges.chat(stream=True)
    assert response.content.isascii()
    lines = response.text.splitlines()
    assert all(not line or line.startswith("data: ") for line in lines)
    *chunks, done = sse_data(response.text)
    assert done == "[DONE]"
    assert [c["choices"][0]["delta"].get("content") for c in chunks[1:-1]] == texts
    whole = (await edges.chat()).json()
    assert whole["choices"][0]["message"]["content"] == "".join(texts)


@pytest.mark.parametrize(
    ("error", "type_"),
    [
        (errors.WorkerLost("the worker is gone"), "unavailable_error"),
        (errors.DeadlineExceeded("late"), "timeout_error"),
        (errors.RequestCancelled("aborted"), "cancelled_error"),
        (ValueError("secret"), "server_error"),
    ],
)
@pytest.mark.parametrize("with_end", [False, True])
async def test_an_error_in_mid_stream_ends_it_without_done(
    edges: Edges, error: Exception, type_: str, with_end: bool
) -> None:
    async def failing(request: GenerationRequest) -> AsyncGenerator[Event, None]:
        yield Chunk(0, "Hel", ())
        if with_end:
            yield ChoiceEnd(0, FinishReason.STOP)
        raise error

    edges.generator.script = failing
    response = await edges.chat(stream=True)
    assert response.status_code == 200
    assert "[DONE]" not in response.text
    assert "secret" not in response.text
    *_, last = sse_data(response.text)
    assert last["error"]["type"] == type_
    assert edges.metric("forebay_num_requests_running", model_name=MODEL) == 0


async def test_nothing_is_sent_before_the_first_event_and_silence_is_filled_after() -> None:
    go_on = asyncio.Event()

    async def slow(request: GenerationRequest) -> AsyncGenerator[Event, None]:
        yield Chunk(0, "Hel", ())
        await go_on.wait()
        yield Chunk(0, "lo", ())
        yield ChoiceEnd(0, FinishReason.STOP)
        yield Completion(Usage(1, 2, 0))

    settings = edge_settings(keep_alive_s=0.02)
    async with running_edges(FakeGenerator(slow), settings) as edges:
        received = b""
        async with (
            asyncio.timeout(WAIT_S),
            edges.http.stream(
                "POST", "/v1/chat/completions", json=chat_body(stream=True)
            ) as response,
        ):
            async for part in response.aiter_raw():
                received += part
                if received.count(b": keep-alive\n\n") >= 3:
                    go_on.set()
        assert received.count(b": keep-alive\n\n") >= 3
        *chunks, done = sse_data(received.decode())
        assert done == "[DONE]"
        assert [c["choices"][0]["delta"].get("content") for c in chunks] == ["", "Hel", "lo", None]


async def test_a_deadline_before_the_first_event_is_a_504() -> None:
    async def never(request: GenerationRequest) -> AsyncGenerator[Event, None]:
        await asyncio.Event().wait()
        yield Chunk(0, "", ())

    async with running_edges(FakeGenerator(never)) as edges:
        edges.generator.failure = errors.DeadlineExceeded("late")
        assert (await edges.chat(stream=True)).status_code == 504


async def test_frames_are_exactly_openais(edges: Edges) -> None:
    text = (await edges.chat(stream=True)).text
    second = json.loads(text.split("\n\n")[1].removeprefix("data: "))
    assert set(second) == {"id", "object", "created", "model", "choices"}
    assert second["choices"] == [
        {"index": 0, "delta": {"content": "Hello"}, "logprobs": None, "finish_reason": None}
    ]
